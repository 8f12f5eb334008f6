#!/bin/sh
# coverage.sh [PYTEST'S ARGUMENTS]: branch coverage of src/aiotun by all tests, child processes among
# them; first with the C module, then what it stands for without. Less than pyproject.toml asks for
# (tool.coverage.report, fail_under) is a failure.
set -u
bin=.venvs/coverage/bin
folder=build/coverage
rm -rf $folder
# Ordinary users' processes write here, too.
mkdir -p $folder
chmod 1777 $folder
# Read by each Python as it starts (coverage's own .pth file); coverage.py run would miss pytest's
# going into its namespaces.
export COVERAGE_PROCESS_START=$PWD/pyproject.toml COVERAGE_FILE=$PWD/$folder/data
# A test that fails here and not in `make test` measures memory or time, which this changes; what
# counts is the figure.
AIOTUN_SPEEDUPS=require $bin/python -m pytest -q -m "not peers and not slow" "$@"
AIOTUN_SPEEDUPS=forbid $bin/python -m pytest -q -m "not peers and not slow" tests/test_native.py \
    tests/test_gso.py tests/test_offload.py tests/integration/test_waiting.py
unset COVERAGE_PROCESS_START
# Of a process that was killed only a part was written.
$bin/python -m coverage combine -q $folder 2>/dev/null
$bin/python -m coverage html -q -d $folder/html
exec $bin/python -m coverage report --skip-covered --show-missing
