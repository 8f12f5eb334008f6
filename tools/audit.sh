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
status=0
.venvs/release/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip \
    --requirement $venv/list.txt 2>$venv/log || status=$?
# pip-audit has the same exit status for a vulnerability, which it prints, and for no answer.
if [ $status != 0 ] && grep -q '^ERROR\|^Traceback' $venv/log; then
    echo "aiotun: could not ask PyPI for known vulnerabilities; is there a network? Mirrors have no such list. ($(tail -n 1 $venv/log); all of it in $venv/log)" >&2
    exit 1
fi
cat $venv/log >&2
exit $status
