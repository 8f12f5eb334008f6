#!/bin/sh
# foreign.sh ARCHITECTURE: makes .foreign/ARCHITECTURE (Debian's name: amd64, arm64, s390x), for tests
# on other processors and kernels: `root`, with Debian 13's Python and the programs that the tests
# run, and in root/aiotun aiotun's wheel, the tests, and what they need. Needs no root and installs
# nothing into the system. The C module is built with zig for amd64 and arm64.
set -eu
cd "$(dirname "$0")/.."
architecture=$1
folder=$PWD/.foreign/$architecture
root=$folder/root
suite=trixie version=3.13
[ "$architecture" = s390x ] && suite=bookworm version=3.11  # complete there

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

if [ ! -e "$folder/unpacked" ]; then
    rm -rf "$root"
    mkdir -p "$folder" "$root"
    tools/debian.sh "$folder/apt" "$suite" "$architecture" apt-get install -y --download-only \
        base-files bash busybox-static coreutils dash grep iproute2 iputils-ping kmod libcap2-bin \
        mount netbase nftables procps python3 python3-cryptography python3-uvloop sed util-linux >"$folder/log" 2>&1 ||
        fail "Debian's packages for $architecture could not be fetched; see $folder/log"
    for link in bin sbin lib lib64; do
        mkdir -p "$root/usr/$link"
        ln -s "usr/$link" "$root/$link"
    done
    for package in "$folder"/apt/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" |
            tar -x -C "$root" --keep-directory-symlink --no-same-owner \
                --exclude='./usr/share/doc/*' --exclude='./usr/share/locale/*' \
                --exclude='./usr/share/man/*' --exclude='./usr/share/zoneinfo/*'
    done
    mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/tmp" "$root/root" "$root/mnt"
    printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
    : >"$root/etc/resolv.conf"
    rm -r "$folder/apt"
    : >"$folder/unpacked"
fi

# The Python packages of the tests, which are pure; uvloop is Debian's.
if [ ! -e "$folder/packages" ]; then
    rm -rf "$folder/site"
    .venvs/release/bin/python -m pip --disable-pip-version-check install --quiet --target "$folder/site" \
        --only-binary :all: --platform any --python-version "$version" \
        dpkt hypothesis pyroute2 pytest pytest-asyncio pytest-timeout pytest-xdist setuptools \
        typing-extensions >"$folder/log" 2>&1 ||
        fail "pip could not install what the tests need; see $folder/log"
    : >"$folder/packages"
fi

# aiotun itself, as users get it, and its tests.
rm -rf "$root/aiotun" "$folder/wheel" "$folder/source"
mkdir -p "$root/aiotun" "$folder/source" "$root/usr/local/lib/python$version/dist-packages"
cp -a pyproject.toml setup.py README.md LICENSE docs src "$folder/source/"
find "$folder/source" -name '*.so' -delete
case $architecture in
    amd64) tools/native_wheel.sh manylinux_2_17_x86_64 "$folder/source" "$folder/wheel" ;;
    arm64) tools/native_wheel.sh manylinux_2_17_aarch64 "$folder/source" "$folder/wheel" ;;
    *)
        AIOTUN_SPEEDUPS=forbid .venvs/release/bin/python -m build --no-isolation --wheel \
            --outdir "$folder/wheel" "$folder/source" >"$folder/log" 2>&1 ||
            fail "the wheel could not be built; see $folder/log"
        ;;
esac
cp -a "$folder/site" "$root/aiotun/site"
.venvs/release/bin/python -m zipfile -e "$folder"/wheel/*.whl "$root/aiotun/site"
for each in pyproject.toml README.md CHANGELOG.md tests examples benchmarks fuzz docs tools; do
    cp -a "$each" "$root/aiotun/"
done
