#!/bin/sh
# docs.sh: the documentation as HTML in build/docs; what Sphinx warns of is an error.
set -eu
.venv/bin/python -m sphinx -b html -d build/doctrees -W --keep-going -q "$@" docs build/docs
echo "build/docs/index.html"
