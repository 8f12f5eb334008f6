#!/bin/sh
# test_dist.sh [PYTEST'S ARGUMENTS]: installs each file of dist/ in an empty environment, on every
# Python that tools/python.sh finds, and checks that it works. Then runs the tests with the wheel
# that has the C module, in a copy of the source distribution without its Python sources.
#
# WHOLE, if set, names the versions ("3.12 3.15") that get all tests; the others get a few files.
set -u
if ! ls dist/*.whl >/dev/null 2>&1; then
    echo "aiotun: dist/ has no wheel; run 'make dist' first" >&2
    exit 1
fi
unset AIOTUN_SPEEDUPS  # an sdist builds the C module if possible
work=$(mktemp -d)
environment=$work/environment
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
failed=""

quick="tests/test_exports.py tests/test_native.py tests/integration/test_sending.py
    tests/integration/test_queues.py"

install() {
    "$environment/bin/python" -m pip --disable-pip-version-check --no-input install -q "$@"
}

# look ENVIRONMENT YES|NO: checks it as a user with nothing else would; YES: with the C module.
look() {
    cd "$work" && env -i PATH=/usr/bin:/bin HOME=/nonexistent "$1/bin/python" -W error -c '
import sys, sysconfig
import aiotun
from aiotun._packets import native
place = sysconfig.get_path("platlib")
assert aiotun.__file__.startswith(place + "/"), (aiotun.__file__, place)
assert sys.argv[1] in ("any", "yes" if native.SPEEDUPS else "no"), native.SPEEDUPS
' "$2" && env -i PATH=/usr/bin:/bin HOME=/nonexistent "$1/bin/aiotun" demo --count 1 >/dev/null
}

for archive in dist/*.tar.gz; do tar -xzf "$archive" -C "$work"; done
tree=$(echo "$work"/aiotun-*)
# The C module's source stays, because the fuzzers compile it again.
find "$tree/src" -type f ! -name _speedups.c -delete
abi3=$(ls "$PWD"/dist/*abi3*manylinux*_"$(uname -m)".whl)

for python in $(tools/python.sh --all); do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "--- Python $version: $(ls dist | tr '\n' ' ')"
    for archive in dist/*; do
        case $archive in
            *musllinux*) continue ;;  # for other machines: make test-foreign
            *abi3*_"$(uname -m)".whl) native=yes ;;
            *abi3*) continue ;;
            *none-any*) native=no ;;
            *) native=any ;;  # depends on whether there is a compiler
        esac
        if ! { "$python" -m venv --clear "$environment" && install "$archive" &&
            (look "$environment" $native); }; then
            echo "aiotun: $archive does not work on Python $version" >&2
            failed="$failed $version"
        fi
    done
    case " ${WHOLE:-$version} " in
        *" $version "*) files=tests ;;
        *) files=$quick ;;
    esac
    # Leave out the tests of a checkout: how it is built, and its tools.
    # pip before 25.1 does not support dependency groups.
    if ! { "$python" -m venv --clear "$environment" && install "pip>=25.1" &&
        install "${abi3}[dpkt,examples,uvloop]" --group pyproject.toml:test &&
        (look "$environment" yes) &&
        (cd "$tree" && AIOTUN_SPEEDUPS=require "$environment/bin/python" -m pytest \
            -m "not peers and not slow" --ignore tests/test_install.py --ignore tests/test_tools.py \
            $files "$@"); }; then
        echo "aiotun: the tests failed on Python $version" >&2
        failed="$failed $version"
    fi
done
# In one file, as people ship programs: a zip archive, and a frozen program.
python=$(tools/python.sh)
echo "--- in a zip archive, and frozen"
cat >"$work/program.py" <<'PROGRAM'
import sys
import aiotun
from aiotun.__main__ import main
sys.exit(main() if sys.argv[1:] else print(aiotun.__version__))
PROGRAM
try() {
    cd / && version=$("$@") && [ -n "$version" ] && "$@" --version | grep -qF "$version" &&
        "$@" demo --count 1 >/dev/null
}
if ! { "$python" -m venv --clear "$environment" && install --target "$work/app" "$abi3" &&
    cp "$work/program.py" "$work/app/__main__.py" &&
    "$python" -m zipapp "$work/app" -o "$work/program.pyz" && (try "$python" "$work/program.pyz") &&
    install pyinstaller "$abi3" &&
    (cd "$work" && "$environment/bin/pyinstaller" --log-level ERROR --onefile program.py) &&
    (try "$work/dist/program"); }; then
    echo "aiotun: does not work in one file" >&2
    failed="$failed (in one file)"
fi
if [ -n "$failed" ]; then
    echo "aiotun: failed on Python$failed" >&2
    exit 1
fi
