#!/bin/sh
# Asks PyPI's list of known vulnerabilities about what aiotun and its extras install.
set -eu
python=$(tools/python.sh)
venv=.venvs/audit
"$python" -m venv --clear $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install -q ".[dpkt,examples,uvloop]"
pip freeze --exclude aiotun >$venv/list.txt
# Strict: what could not be asked about has not been found innocent.
exec .venvs/release/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip --requirement $venv/list.txt
