#!/bin/sh
# Runs the tests with the lowest version of everything that pyproject.toml names, where it is the
# highest elsewhere; in .venvs/lowest, on the first Python that will do.
set -eu
python=$(tools/python.sh)
uv=.venvs/release/bin/uv
venv=.venvs/lowest
"$uv" venv -q --clear -p "$python" $venv
"$uv" pip install -q -p $venv/bin/python --resolution lowest-direct \
    -r pyproject.toml --all-extras --group test -e .
"$uv" pip list -q -p $venv/bin/python | grep -E '^(aiohttp|cffi|cryptography|dpkt|pyroute2|uvloop) '
exec $venv/bin/python -m pytest -m "not peers and not slow" "$@"
