#!/bin/sh
# fuzz_offload.sh [SECONDS]: tests/fuzz/fuzz_offload.py on a C module built with sanitizers.
set -eu
python=.venv/bin/python
compiler=${CC:-cc}
include=$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')
mkdir -p build
module=build/_speedups_fuzz.so
"$compiler" -g -O1 -shared -fPIC -Wall -Wextra -Werror -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=all -DFUZZING \
    "-I$include" src/aiotun/_speedups.c -o $module
# The sanitizer has to be there before Python's own allocator, which would hide what it looks for.
LD_PRELOAD=$("$compiler" -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
    PYTHONMALLOC=malloc exec $python -m tests.fuzz.fuzz_offload $module "${1:-60}"
