#!/bin/sh
# Checks the packages that aiotun and its extras install for known vulnerabilities (PyPI's list).
set -eu
python=$(tools/python.sh)
venv=.venvs/audit
"$python" -m venv --clear $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install -q ".[dpkt,examples,uvloop]"
pip freeze --exclude aiotun >$venv/list.txt
# Strict: a package that could not be checked is a failure.
exec .venvs/release/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip --requirement $venv/list.txt
