"""Build the optional C module, which pyproject.toml can't describe.

With AIOTUN_SPEEDUPS=require the installation fails if the module can't be built; with =forbid the
module is not built. If the variable is not set, the module is left out if there is no compiler or
no Python.h, and aiotun uses its Python code instead.
"""

import os

from setuptools import Extension, setup

choice = os.environ.get("AIOTUN_SPEEDUPS", "")
if choice not in ("", "require", "forbid"):
    raise SystemExit(f"AIOTUN_SPEEDUPS must be 'require', 'forbid' or unset, got {choice!r}")

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
