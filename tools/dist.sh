#!/bin/sh
# Builds dist/: the source distribution, and from its contents a wheel in pure Python, and wheels with
# the C module for every CPython from 3.11: for x86-64 and arm64, each with glibc from 2.17 and with
# musl from 1.2. Checks all of them.
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

for platform in manylinux_2_17_x86_64 manylinux_2_17_aarch64 musllinux_1_2_x86_64 musllinux_1_2_aarch64; do
    tools/native_wheel.sh $platform "$source" dist
done
"$bin/abi3audit" --strict dist/*abi3*.whl >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
"$bin/python" tools/check_dist.py dist/*
"$bin/twine" --no-color check --strict dist/*
