#!/bin/sh
# Builds dist/: the source distribution, and from its contents a wheel in pure Python and one with
# the C module, for every CPython from 3.11 and every glibc from 2.17. Checks all of them.
set -eu
umask 022  # a wheel keeps the modes of its files
bin=$PWD/.venvs/release/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The times in the archives are the last commit's, so that the same sources give the same bytes.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

build() {
    "$bin/python" -m build --no-isolation "$@" >"$work/log" 2>&1 || {
        cat "$work/log" >&2
        exit 1
    }
}

rm -rf dist
build --sdist --outdir dist .
"$bin/python" tools/repack.py dist/aiotun-*.tar.gz "$SOURCE_DATE_EPOCH"
tar -xzf dist/aiotun-*.tar.gz -C "$work"
source=$(echo "$work"/aiotun-*)
AIOTUN_SPEEDUPS=forbid build --wheel --outdir dist "$source"
rm -rf "$source/build"
# Python's own LDSHARED may name the folder that this Python was installed in, as a RUNPATH.
AIOTUN_SPEEDUPS=require CFLAGS="${CFLAGS:-} -g0" LDSHARED="${CC:-cc} -shared" build --wheel --outdir "$work/wheels" "$source"
# Fails if the module uses a symbol that an older C library lacks.
PATH=$bin:$PATH "$bin/auditwheel" repair --plat "manylinux_2_17_$(uname -m)" --only-plat \
    --wheel-dir dist "$work"/wheels/*.whl >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
"$bin/abi3audit" --strict dist/*abi3*.whl >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
"$bin/python" tools/check_dist.py dist/*
"$bin/twine" --no-color check --strict dist/*
