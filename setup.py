"""The optional C module, which pyproject.toml has no words for.

AIOTUN_SPEEDUPS=require makes an installation without it an error, =forbid does not try. Otherwise
it is left out where there is no compiler, or no Python.h, and aiotun works all the same.
"""

import os

from setuptools import Extension, setup

choice = os.environ.get("AIOTUN_SPEEDUPS", "")
if choice not in ("", "require", "forbid"):
    raise SystemExit(f"AIOTUN_SPEEDUPS is {choice!r}; it may be 'require' or 'forbid', or unset")

if choice == "forbid":
    setup()
else:
    setup(
        ext_modules=[
            Extension(
                "aiotun._packets._speedups",
                ["src/aiotun/_packets/_speedups.c"],
                extra_compile_args=["-O3", "-Wall", "-Wextra"],
                optional=choice != "require",
                py_limited_api=True,
            )
        ],
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
