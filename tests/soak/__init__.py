"""A soak: mixed traffic for minutes or hours, every packet accounted for, nothing left behind.

make soak MINUTES=30

See docs/topics/robustness.md for what it does and what it found.
"""
