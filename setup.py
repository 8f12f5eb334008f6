"""Build the optional C module, which pyproject.toml can't describe.

With AIOTUN_SPEEDUPS=require the installation fails if the module can't be built; with =forbid the
module is not built. If the variable is not set, the module is left out if there is no compiler or
no Python.h, and aiotun uses its Python code instead.

One module serves every CPython, but a free-threaded one has no limited API and gets its own.

The package index shows README.md apart from the repository, so its links get absolute here.
"""

import os
import re
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent

limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")
choice = os.environ.get("AIOTUN_SPEEDUPS", "")
if choice not in ("", "require", "forbid"):
    raise SystemExit(f"AIOTUN_SPEEDUPS must be 'require', 'forbid' or unset, got {choice!r}")

source = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["urls"]["Source"]
readme = (HERE / "README.md").read_text()
# Images first: "raw" gives the file, and "blob" a page that shows it.
readme = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{source}/raw/main/", readme)
readme = re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", rf"\1{source}/blob/main/", readme)
described = {"long_description": readme, "long_description_content_type": "text/markdown"}

if choice == "forbid":
    setup(**described)
else:
    setup(
        **described,
        ext_modules=[
            Extension(
                "aiotun._packets._speedups",
                ["src/aiotun/_packets/_speedups.c"],
                extra_compile_args=["-O3", "-Wall", "-Wextra"],
                optional=choice != "require",
                py_limited_api=limited_api,
            )
        ],
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited_api else {},
    )
