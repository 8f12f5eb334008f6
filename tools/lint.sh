#!/bin/sh
# lint.sh [ruff] [mypy] [pyright]: runs these linters, or all of them.
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
            # All public types must be complete, or pyright fails. Pyright asks the first `python`
            # on PATH for the packages, and ignores its options about that.
            said=$(PATH=$PWD/$bin:$PATH pyright --verifytypes aiotun --ignoreexternal 2>&1) || {
                echo "$said"
                exit 1
            }
            echo "$said" | grep -i "completeness"
            ;;
        *) echo "aiotun: unknown linter '$linter'; ruff, mypy and pyright are known" >&2; exit 1 ;;
    esac
done
