"""aiotun beside C: `python -m benchmarks` (see README.md)."""
