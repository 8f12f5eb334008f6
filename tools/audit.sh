#!/bin/sh
# Asks PyPI's list of known vulnerabilities about what aiotun and its extras install.
set -eu
list=$(mktemp)
trap 'rm -f "$list"' EXIT
.venvs/release/bin/uv pip compile -q --no-header --no-annotate --all-extras pyproject.toml >"$list"
# Strict: what could not be asked about has not been found innocent.
exec .venvs/release/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip --requirement "$list"
