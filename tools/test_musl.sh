#!/bin/sh
# test_musl.sh [PYTEST'S ARGUMENTS]: runs the tests that need no device, and those of the offload modes,
# with the musllinux wheel, on a Python that is built with musl.
set -eu
cd "$(dirname "$0")/.."
python=$(tools/musl.sh)
folder=$PWD/.foreign/musl
rm -rf "$folder/aiotun" "$folder/wheel" "$folder/source"
mkdir -p "$folder/aiotun" "$folder/source"
cp -a pyproject.toml setup.py README.md LICENSE docs src "$folder/source/"
find "$folder/source" -name '*.so' -delete
tools/native_wheel.sh musllinux_1_2_x86_64 "$folder/source" "$folder/wheel"
cp -a "$folder/site" "$folder/aiotun/site"
.venvs/release/bin/python -m zipfile -e "$folder"/wheel/*.whl "$folder/aiotun/site"
for each in pyproject.toml README.md CHANGELOG.md tests examples benchmarks fuzz docs tools; do
    cp -a "$each" "$folder/aiotun/"
done
cd "$folder/aiotun"
export PYTHONPATH="$folder/aiotun/site" PYTHONDONTWRITEBYTECODE=1
"$python" -c '
from aiotun._packets import native
assert native.SPEEDUPS, "the C module of the musllinux wheel is not in use"
'
# gcc's sanitizers need glibc.
exec "$python" -m pytest -q -p no:cacheprovider -p no:xdist -k "not sanitizers" \
    ${*:-$(tools/pure_tests.sh) tests/integration/test_modes.py}
