#!/bin/sh
# coverage.sh [PYTEST'S ARGUMENTS]: branch coverage of src/aiotun by all tests and their child
# processes; first with the C module, then its Python twins without it. Fails if the coverage is
# below fail_under in pyproject.toml (tool.coverage.report).
set -u
bin=.venvs/coverage/bin
folder=build/coverage
rm -rf $folder
# Processes of ordinary users write here, too.
mkdir -p $folder
chmod 1777 $folder
# Each Python reads this when it starts (by coverage's .pth file). `coverage run` would not follow
# pytest when it restarts in its namespaces.
export COVERAGE_PROCESS_START=$PWD/pyproject.toml COVERAGE_FILE=$PWD/$folder/data
# Measuring changes the memory and time that some tests check, so tests may fail here that pass in
# `make test`. Only the figure counts.
AIOTUN_SPEEDUPS=require $bin/python -m pytest -q -m "not peers and not slow" "$@"
AIOTUN_SPEEDUPS=forbid $bin/python -m pytest -q -m "not peers and not slow" tests/test_native.py \
    tests/test_gso.py tests/test_offload.py tests/integration/test_waiting.py
unset COVERAGE_PROCESS_START
# A process that was killed may have written its data in part.
$bin/python -m coverage combine -q $folder 2>/dev/null
$bin/python -m coverage html -q -d $folder/html
exec $bin/python -m coverage report --skip-covered --show-missing
