#!/bin/sh
# Everything that can be said about the source without running it.
set -eu
bin=.venv/bin
echo "ruff check" && $bin/python -m ruff check --quiet .
echo "ruff format" && $bin/python -m ruff format --check --quiet .
echo "mypy" && $bin/python -m mypy src tests $(ls -d examples benchmarks fuzz 2>/dev/null)
# The types that users see must be complete: 100%, or pyright fails. It asks the first `python` on
# PATH where packages are, whatever its options say.
echo "pyright --verifytypes"
said=$(PATH=$PWD/$bin:$PATH pyright --verifytypes aiotun --ignoreexternal 2>&1) || {
    echo "$said"
    exit 1
}
echo "$said" | grep -i "completeness"
