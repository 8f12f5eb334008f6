#!/bin/sh
# Builds CPython 3.13 with musl as its C library, from Debian's sources, in .foreign/musl, installs
# there what the tests need, and prints the interpreter. Takes about ten minutes the first time, and
# needs gcc, make and perl. Needs no root and installs nothing into the system. x86-64 only.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/.foreign/musl
work=$folder/build
root=$folder/root
log=$folder/log
python=$folder/python/bin/python3.13

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

# sources SUITE NAME...: unpacks Debian's source packages in $work.
sources() {
    suite=$1
    shift
    for name in "$@"; do
        # What Debian changed may have been replaced since; the source itself stays.
        (cd "$work" && TYPES=deb-src ../../../tools/debian.sh "$work/apt-$suite" "$suite" amd64 \
            apt-get source --download-only "$name" >>"$log" 2>&1) || :
        tar -xf "$work/$name"_*.orig.tar.*z -C "$work" 2>>"$log" ||
            fail "the source of $name could not be fetched; see $log"
    done
}

# build FOLDER [CONFIGURE'S ARGUMENTS]: builds it, and installs it in the place of the interpreter.
build() {
    (cd "$work"/$1 && shift &&
        nice -n 10 ./configure --prefix="$folder/python" "$@" &&
        nice -n 10 make -s -j "$(nproc)" && nice -n 10 make -s install) >>"$log" 2>&1 ||
        fail "$1 could not be built with musl; see $log"
}

[ "$(uname -m)" = x86_64 ] || fail "Python with musl is built on x86-64 only"
if [ ! -x "$python" ]; then
    rm -rf "$folder"
    mkdir -p "$work" "$root"
    (cd "$work" && ../../../tools/debian.sh "$work/apt" trixie amd64 apt-get download \
        musl musl-dev musl-tools linux-libc-dev >>"$log" 2>&1) ||
        fail "Debian's musl could not be fetched; see $log"
    for package in "$work"/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    # Debian's way to use gcc with musl, moved here, with the kernel's headers.
    libraries=$root/usr/lib/x86_64-linux-musl
    sed -e "s|/usr/lib/x86_64-linux-musl|$libraries|g" \
        -e "s|/usr/include/x86_64-linux-musl|$root/usr/include/x86_64-linux-musl|g" \
        -e "s|/lib/ld-musl-x86_64.so.1|$libraries/libc.so|g" \
        "$libraries/musl-gcc.specs" >"$folder/specs"
    for headers in linux asm-generic; do
        ln -s "../$headers" "$root/usr/include/x86_64-linux-musl/$headers"
    done
    ln -s ../x86_64-linux-gnu/asm "$root/usr/include/x86_64-linux-musl/asm"
    cat >"$folder/musl-gcc" <<END
#!/bin/sh
[ "\$*" != --print-multiarch ] || { echo x86_64-linux-musl; exit; }
exec gcc -specs=$folder/specs "\$@"
END
    chmod +x "$folder/musl-gcc"
    export CC="$folder/musl-gcc" CFLAGS="-O1 -fPIC"
    sources trixie zlib python3.13
    sources bookworm libffi openssl  # the newer libffi has no configure
    sources unstable sqlite3         # older ones need tclsh
    build 'zlib-*' --static
    build 'libffi-*' --disable-shared --with-pic --disable-docs --disable-multi-os-directory
    build 'sqlite3-*' --disable-shared --disable-tcl --disable-readline
    # Its libraries only.
    (cd "$work"/openssl-* &&
        nice -n 10 ./Configure linux-x86_64 --prefix="$folder/python" --libdir=lib no-shared \
            no-tests no-asm no-engine &&
        nice -n 10 make -s -j "$(nproc)" build_libs && make -s install_dev) >>"$log" 2>&1 ||
        fail "openssl could not be built with musl; see $log"
    export PKG_CONFIG=false ZLIB_CFLAGS="-I$folder/python/include" \
        ZLIB_LIBS="-L$folder/python/lib -lz" LIBFFI_CFLAGS="-I$folder/python/include" \
        LIBFFI_LIBS="-L$folder/python/lib -lffi" LIBSQLITE3_CFLAGS="-I$folder/python/include" \
        LIBSQLITE3_LIBS="-L$folder/python/lib -lsqlite3"
    build 'Python-3.13*' -q --without-ensurepip --disable-test-modules \
        --with-openssl="$folder/python"
    rm -rf "$work"
fi
"$python" -c '
import ctypes, platform, sqlite3, ssl, sys, zlib
sys.exit(platform.libc_ver()[0] == "glibc")
' || fail "$python is not a Python with musl, ctypes, sqlite3, ssl and zlib"
if [ ! -e "$folder/packages" ]; then
    rm -rf "$folder/site"
    .venvs/release/bin/python -m pip --disable-pip-version-check install --quiet \
        --target "$folder/site" --only-binary :all: --platform musllinux_1_2_x86_64 \
        --python-version 3.13 cryptography dpkt hypothesis pyroute2 pytest pytest-asyncio \
        pytest-timeout pytest-xdist setuptools typing-extensions uvloop >"$log" 2>&1 ||
        fail "pip could not install what the tests need; see $log"
    : >"$folder/packages"
fi
echo "$python"
