#!/bin/sh
# Runs the tests on every Python that tools/python.sh finds, except the one of .venv; each has a
# virtual environment under .venvs. Continues after a failure, and fails at the end.
set -u
ours=$(tools/python.sh) || exit 1
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
skip=$(version "$ours")
others=0 failed=""
for python in $(PYTHON='' tools/python.sh --all); do
    version=$(version "$python")
    [ "$version" = "$skip" ] && continue
    others=$((others + 1))
    mkdir -p .venvs
    if ! tools/venv.sh ".venvs/$version" "$python" test; then
        failed="$failed $version"
        continue
    fi
    echo "--- Python $version"
    ".venvs/$version/bin/python" -m pytest -m "not peers and not slow" "$@" || failed="$failed $version"
done
if [ $others = 0 ]; then
    echo "no other Python from 3.11 on this machine"
fi
if [ -n "$failed" ]; then
    echo "aiotun: failed on Python$failed" >&2
    exit 1
fi
