#!/bin/sh
# Builds a free-threaded CPython 3.13, from the source package of Debian 13, in .pythons, and prints
# the interpreter. Takes about ten minutes the first time, and needs a C compiler and the headers of
# zlib, libffi and OpenSSL. Debian has no package of it. FREE_THREADED, if set, is another
# free-threaded interpreter to use instead.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/.pythons/free-threaded
python=${FREE_THREADED:-$folder/bin/python3.13t}

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

if [ -z "${FREE_THREADED:-}" ] && [ ! -x "$python" ]; then
    work=$PWD/.pythons/build
    mkdir -p "$work"
    (cd "$work" && TYPES=deb-src ../../tools/debian.sh "$work/apt" trixie "$(dpkg --print-architecture)" \
        apt-get source --download-only python3.13 >"$work/log" 2>&1) ||
        fail "the source of Python 3.13 could not be fetched; see $work/log"
    tar -xJf "$work"/python3.13_*.orig.tar.xz -C "$work"
    (cd "$work"/Python-3.13* &&
        nice -n 10 ./configure -q --disable-gil --prefix="$folder" &&
        nice -n 10 make -s -j "$(nproc)" && nice -n 10 make -s install) >>"$work/log" 2>&1 ||
        fail "Python 3.13 could not be built; see $work/log"
    rm -rf "$work"
fi
"$python" -c '
import ssl, sys, sysconfig, zlib
sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED"))
' || fail "$python is not a free-threaded Python with ssl and zlib"
echo "$python"
