#!/bin/sh
# lint.sh [ruff] [mypy] [pyright]: what these linters say, or all of them.
set -eu
bin=.venv/bin
for linter in ${*:-ruff mypy pyright}; do
    echo "$linter"
    case $linter in
        ruff)
            $bin/python -m ruff check --quiet .
            $bin/python -m ruff format --check --quiet .
            ;;
        mypy) $bin/python -m mypy ;;
        pyright)
            # The types that users see must be complete: 100%, or pyright fails. It asks the first
            # `python` on PATH where packages are, whatever its options say.
            said=$(PATH=$PWD/$bin:$PATH pyright --verifytypes aiotun --ignoreexternal 2>&1) || {
                echo "$said"
                exit 1
            }
            echo "$said" | grep -i "completeness"
            ;;
        *) echo "aiotun: unknown linter '$linter'; ruff, mypy and pyright are known" >&2; exit 1 ;;
    esac
done
