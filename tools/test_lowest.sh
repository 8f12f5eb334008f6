#!/bin/sh
# Runs the tests with the lowest versions that pyproject.toml allows users; other targets use the
# highest. In .venvs/lowest, on the first usable Python.
set -eu
python=$(tools/python.sh)
venv=.venvs/lowest
"$python" -m venv --clear $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install -q "pip>=25.1"  # older versions don't support dependency groups
"$python" - >$venv/lowest.txt <<'END'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"].values()
for each in sorted({*project["dependencies"], *(one for extra in extras for one in extra)}):
    print(re.sub(r"\[.*?\]", "", each).replace(">=", "=="))
END
pip install -q --group test -e . -c $venv/lowest.txt
cat $venv/lowest.txt
exec $venv/bin/python -m pytest -m "not peers and not slow" "$@"
