#!/bin/sh
# debian.sh FOLDER SUITE ARCHITECTURE PROGRAM [ARGUMENTS]: runs apt-get or apt-cache for another
# release or architecture of Debian, from the server that this machine uses. Needs no root and
# installs nothing into the system. FOLDER keeps the lists and what is downloaded (cache/archives);
# its list of installed packages is empty, so that `install --download-only` fetches all
# dependencies.
#
# Prints one line on stderr, and exits 1, if there is no such server or it can't be reached.
set -eu
folder=$1 suite=$2 architecture=$3 program=$4
shift 4

fail() {
    echo "aiotun: $1" >&2
    exit 1
}

private() {
    command=$1
    shift
    "$command" -q -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$folder/sources" \
        -o Dir::State="$folder" -o Dir::State::status="$folder/status" -o Dir::Cache="$folder/cache" \
        -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)" -o APT::Install-Recommends=false \
        -o Acquire::Retries=3 -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

if [ ! -e "$folder/updated" ]; then
    command -v apt-get >/dev/null || fail "no apt-get here, so nothing of Debian's can be fetched"
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }')
    [ -n "$mirror" ] || fail "apt-get knows no Debian archive ('apt-get update' first?)"
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" "$folder/sources"
    : >"$folder/status"
    cat >"$folder/sources/$suite.sources" <<END
Types: ${TYPES:-deb}
URIs: $mirror
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
    private apt-get update >"$folder/log" 2>&1 || fail "apt-get update failed; see $folder/log"
    : >"$folder/updated"
fi
private "$program" "$@"
