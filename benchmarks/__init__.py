"""Compares aiotun with C and with other libraries: `python -m benchmarks` (see README.md)."""
