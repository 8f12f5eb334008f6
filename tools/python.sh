#!/bin/sh
# Prints the interpreter to use, or with --all one for each Python version (3.11 and newer) on this
# machine. It runs each candidate, because pyenv puts a python3.12 on PATH that only prints an error
# if that version is not enabled.
#
# PYTHON, if set, is the only candidate. If none is usable, it prints one line on stderr and exits
# 1.
set -u

# Prints "3.12 /real/path" if $1 is a usable Python, and otherwise the reason, such as "too old".
probe() {
    "$1" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d, and aiotun needs 3.11 or newer" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("has no venv module (Debian and Ubuntu: apt-get install python3-venv)")
print("%d.%d" % sys.version_info[:2], sys.executable)
' 2>&1
}

candidates() {
    echo python3
    for minor in 11 12 13 14 15 16; do echo "python3.$minor"; done
    for folder in "${PYENV_ROOT:-${HOME:-/root}/.pyenv}"/versions/3.*/bin; do
        [ -x "$folder/python3" ] && echo "$folder/python3"
    done
    for python in "${0%/*}"/../.pythons/usr/bin/python3.*; do  # tools/newer_pythons.sh
        [ -x "$python" ] && echo "$python"
    done
}

if [ -n "${PYTHON:-}" ]; then
    if ! command -v "$PYTHON" >/dev/null; then
        echo "aiotun: there is no '$PYTHON'; set PYTHON to a Python 3.11 or newer" >&2
        exit 1
    fi
    if ! found=$(probe "$PYTHON"); then
        echo "aiotun: $PYTHON $(echo "$found" | tail -n 1)" >&2
        exit 1
    fi
    echo "${found#* }"
    exit 0
fi

seen=" " why=""
for candidate in $(candidates); do
    command -v "$candidate" >/dev/null || continue
    if ! found=$(probe "$candidate"); then
        # If several candidates fail, report a missing module first: it is easier to fix than an old
        # version.
        case $found in *"venv module"*) why="$candidate $found" ;; esac
        continue
    fi
    version=${found%% *}
    case $seen in *" $version "*) continue ;; esac
    seen="$seen$version "
    echo "${found#* }"
    [ "${1:-}" = --all ] || exit 0
done
if [ "$seen" = " " ]; then
    [ -n "$why" ] || why="no Python 3.11 or newer here; install one (Debian and Ubuntu: apt-get install python3 python3-venv) or set PYTHON"
    echo "aiotun: $why" >&2
    exit 1
fi
