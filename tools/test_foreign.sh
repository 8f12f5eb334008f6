#!/bin/sh
# test_foreign.sh [PYTEST'S ARGUMENTS]: runs the tests that need no device, among them those of the
# C module and the fuzz corpus, on emulated processors: arm64, with the C module that is built for
# it here, and s390x, which is big-endian.
#
# ARCHITECTURES, if set, names others of Debian's ("arm64").
set -eu
pure=$(tools/pure_tests.sh)

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

failed=""
for architecture in ${ARCHITECTURES:-arm64 s390x}; do
    case $architecture in
        # What Linux looks for at the beginning of a program: an ELF file for that processor.
        arm64) qemu=qemu-aarch64-static numbers='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
            mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff' ;;
        s390x) qemu=qemu-s390x-static numbers='\x7fELF\x02\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x16'
            mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff' ;;
        *) fail "no emulator is known for $architecture; arm64 and s390x are" ;;
    esac
    qemu=$(command -v $qemu) || fail "$qemu is missing; install qemu-user-static"
    tools/foreign.sh "$architecture"
    # Without this, QEMU computes pointer authentication for minutes before the first test.
    [ "$architecture" = arm64 ] && export QEMU_CPU=max,pauth-impdef=on || unset QEMU_CPU
    echo "--- $architecture: ${*:-all tests that need no device}"
    # Its own list of emulators (Linux 6.7) and its own root, so that the tests can start programs,
    # and nothing changes outside.
    unshare --map-root-user --mount --net --pid --fork sh -eu -c '
        root=$1 qemu=$2 numbers=$3 mask=$4
        shift 4
        mount --bind "$root" "$root"
        cd "$root"
        mount -t proc proc proc
        mount -t binfmt_misc none proc/sys/fs/binfmt_misc || {
            echo "aiotun: emulators need Linux 6.7" >&2
            exit 1
        }
        printf %s ":foreign:M::$numbers:$mask:$qemu:F" >proc/sys/fs/binfmt_misc/register
        mount --rbind /dev dev
        mount --rbind /sys sys
        mount -t tmpfs tmp tmp
        pivot_root . mnt
        umount -l /mnt
        cd /aiotun
        export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8 PYTHONPATH=/aiotun/site
        export PYTHONPYCACHEPREFIX=/tmp/pycache AIOTUN_TESTS_SLOWER=20
        # Debian has no cryptography that is new enough for the WireGuard example.
        exec python3 -m pytest -q -p no:cacheprovider -p no:xdist -o timeout=900 \
            -k "not wireguard" "$@"
    ' sh "$PWD/.foreign/$architecture/root" "$qemu" "$numbers" "$mask" ${*:-$pure} ||
        failed="$failed $architecture"
done
[ -z "$failed" ] || fail "failed on$failed"
