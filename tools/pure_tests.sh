#!/bin/sh
# Prints the files of the tests that need no device, among them those of the C module and the fuzz
# corpus, without those of this repository itself.
set -eu
ls tests/test_*.py | grep -v -e /test_architecture -e /test_bench -e /test_cli \
    -e /test_documents -e /test_examples -e /test_harness -e /test_install -e /test_neighbours \
    -e /test_pytest_plugin -e /test_service_units -e /test_soak -e /test_testing -e /test_threads \
    -e /test_tools -e /test_docstrings -e /test_exports
