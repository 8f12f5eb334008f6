#!/bin/sh
# venv.sh FOLDER PYTHON GROUP: a virtual environment with aiotun (editable) and one of pyproject's
# dependency groups: "none", "test", "fuzz", "dev" or "docs". Does nothing where FOLDER has that
# already; starts anew where what pip reads, the interpreter or the checkout's place has changed.
# Quiet unless it has to install something; one line on stderr, and exit 1, where that fails.
set -u
folder=$1 python=$2 group=$3

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

state="$(cat pyproject.toml setup.py src/aiotun/_speedups.c | cksum) $python $("$python" -V) $PWD"
stamp=$folder/.aiotun-$group
log=$folder/.aiotun-pip.log

# "dev" and "fuzz" hold all of "test", and that all of "none".
case $group in
    none) enough="none test fuzz dev" ;;
    test) enough="test fuzz dev" ;;
    *) enough=$group ;;
esac
for installed in $enough; do
    if [ "$(cat "$folder/.aiotun-$installed" 2>/dev/null)" = "$state" ]; then
        exit 0
    fi
done

install() {
    if ! "$folder/bin/python" -m pip --disable-pip-version-check --no-input install --quiet "$@" \
        >>"$log" 2>&1; then
        # Only the last line that pip calls an error: the rest is in its log.
        said=$(grep -i '^ *error' "$log" | tail -n 1)
        fail "pip could not install aiotun's dependencies; is there a network? (${said:-no message}; all of it in $log)"
    fi
}

usable=no
for installed in none test fuzz dev docs; do
    [ "$(cat "$folder/.aiotun-$installed" 2>/dev/null)" = "$state" ] && usable=yes
done
if [ $usable = no ]; then
    echo "making $folder with $("$python" -V)"
    said=$("$python" -m venv --clear "$folder" 2>&1) ||
        fail "$python could not make $folder: $(echo "$said" | tail -n 1)"
fi
(: >"$log") 2>/dev/null || fail "$folder belongs to another user; remove it, or work in a checkout of your own"
# Before 25.1 pip knows no dependency groups.
if ! "$folder/bin/python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))'; then
    install "pip>=25.1"
fi
if [ "$group" = none ]; then
    install --editable .
else
    install --editable . --group "$group"
fi
printf '%s' "$state" >"$stamp"
