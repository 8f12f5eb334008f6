#!/bin/sh
# Runs the tests with the lowest version of everything that pyproject.toml names for users, where it
# is the highest elsewhere; in .venvs/lowest, on the first Python that will do.
set -eu
python=$(tools/python.sh)
venv=.venvs/lowest
"$python" -m venv --clear $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install -q "pip>=25.1"  # before, it knows no dependency groups
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
