#!/bin/sh
# peers.sh mitmproxy|boringtun: puts a program that the tests exchange packets with into
# benchmarks/build/peers, unless it is there. Needs a network and, for boringtun, Rust's cargo. If
# it can't, it says so in one line; then the tests of that program are skipped, or fail in CI.
set -u
cd "$(dirname "$0")/.."
folder=benchmarks/build/peers
name=$1
log=$folder/$name.log

case $name in
    mitmproxy) program=$folder/mitmproxy/bin/mitmdump ;;
    boringtun) program=$folder/boringtun/bin/boringtun-cli ;;
    *)
        echo "peers.sh: '$name' is neither mitmproxy nor boringtun" >&2
        exit 2
        ;;
esac
[ -x "$program" ] && exit 0
mkdir -p "$folder"

mitmproxy() {
    python=$(tools/python.sh) &&
        "$python" -m venv --clear "$folder/mitmproxy" &&
        "$folder/mitmproxy/bin/python" -m pip --disable-pip-version-check --no-input install mitmproxy
}

boringtun() {
    PATH=$PATH:$HOME/.cargo/bin
    nice -n 10 cargo install --root "$folder/boringtun" boringtun-cli
}

echo "installing $name; this takes a minute or more, and $log shows how far it is"
"$name" >"$log" 2>&1 || echo "$name could not be installed: $(tail -n 1 "$log") (all of it is in $log)" >&2
