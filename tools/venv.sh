#!/bin/sh
# venv.sh FOLDER PYTHON GROUP: makes a virtual environment with aiotun (editable) and one of
# pyproject.toml's dependency groups, or "none". Does nothing if FOLDER has them already. Makes
# FOLDER again if the files that pip reads, the interpreter or the checkout's place have changed.
# Prints nothing unless it installs something; on failure prints one line on stderr and exits 1.
set -u
folder=$1 python=$2 group=$3

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

state="$(cat pyproject.toml setup.py src/aiotun/_packets/_speedups.c | cksum) $python $("$python" -V) $PWD"
log=$folder/.aiotun-pip.log

if [ "$(cat "$folder/.aiotun-state" 2>/dev/null)" != "$state" ]; then
    echo "making $folder with $("$python" -V)"
    said=$("$python" -m venv --clear "$folder" 2>&1) ||
        fail "$python could not make $folder: $(echo "$said" | tail -n 1)"
    printf '%s' "$state" >"$folder/.aiotun-state"
fi

# "dev" and "fuzz" include "test", which includes "none".
case $group in
    none) enough="none test fuzz dev" ;;
    test) enough="test fuzz dev" ;;
    *) enough=$group ;;
esac
for installed in $enough; do
    [ -e "$folder/.aiotun-$installed" ] && exit 0
done

(: >"$log") 2>/dev/null || fail "$folder belongs to another user; remove it, or work in a checkout of your own"
install() {
    if ! "$folder/bin/python" -m pip --disable-pip-version-check --no-input install "$@" \
        >>"$log" 2>&1; then
        # Show only pip's last line with ERROR; the rest is in its log.
        said=$(grep -i '^ *error' "$log" | tail -n 1)
        fail "pip could not install aiotun's dependencies; is there a network? (${said:-no message}; all of it in $log)"
    fi
}

if [ "$group" = none ]; then what=aiotun; else what="aiotun and what '$group' needs"; fi
echo "installing $what; this takes a minute or two, and $log shows how far it is"
install "pip>=25.1"  # older versions lack dependency groups
if [ "$group" = none ]; then
    install --editable .
else
    install --editable . --group "$group"
fi
: >"$folder/.aiotun-$group"
