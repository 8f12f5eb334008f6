#!/bin/sh
# native_wheel.sh PLATFORM SOURCE FOLDER: builds a wheel with the C module from the tree SOURCE, for
# a platform as wheels name it (manylinux_2_17_aarch64, musllinux_1_2_x86_64), and puts it into
# FOLDER. Needs .venvs/release. Prints nothing unless it fails.
set -eu
platform=$1 source=$2 folder=$3
bin=$PWD/.venvs/release/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    cat "$work/log" >&2
    echo "aiotun: no wheel for $platform" >&2
    exit 1
}

case $platform in
    # On x86-64, gcc makes two versions of the loops for checksums, one of them for AVX2. zig's clang
    # doesn't, but on arm64 there is one version anyway, and musl can't choose between two.
    manylinux_*_"$(uname -m)") target="" ;;
    manylinux_2_17_*) target=${platform#manylinux_2_17_}-linux-gnu.2.17 ;;
    musllinux_1_2_*) target=${platform#musllinux_1_2_}-linux-musl ;;
    *) echo "aiotun: unknown platform $platform" >&2; exit 1 ;;
esac
if [ -n "$target" ]; then
    # sysconfig, and so setuptools, takes the platform from here. The headers are this machine's: the
    # limited API is the same on all 64-bit machines.
    export _PYTHON_HOST_PLATFORM="$platform" CC="$bin/python -m ziglang cc -target $target"
fi
# Python's own LDSHARED may name the folder that this Python was installed in, as a RUNPATH.
export LDSHARED="${CC:-cc} -shared"
rm -rf "$source/build"  # of another platform
AIOTUN_SPEEDUPS=require CFLAGS="${CFLAGS:-} -g0" "$bin/python" -m build --no-isolation --wheel \
    --outdir "$work" "$source" >"$work/log" 2>&1 || fail
# auditwheel finds the oldest C library that has every symbol of the module. As PLATFORM it takes
# only this machine's. musl is libc.so for zig and libc.musl-MACHINE.so.1 for Alpine and auditwheel;
# musl's loader knows that both are itself.
PATH=$bin:$PATH "$bin/auditwheel" repair --plat auto --only-plat --ldpaths "$work" \
    --exclude libc.so --wheel-dir "$work/repaired" "$work"/*.whl >"$work/log" 2>&1 || fail
case $(echo "$work"/repaired/*.whl) in
    *"$platform"*) mkdir -p "$folder" && mv "$work"/repaired/*.whl "$folder" ;;
    *) ls "$work/repaired" >"$work/log" && fail ;;
esac
