#!/bin/sh
# docs.sh: the documentation as HTML in build/docs; what Sphinx warns of is an error.
# All pages are read each time (-E): of a page that has not changed it would not warn again.
set -eu
.venv/bin/python -m sphinx -E -b html -d build/doctrees -W --keep-going -q "$@" docs build/docs
echo "build/docs/index.html"
