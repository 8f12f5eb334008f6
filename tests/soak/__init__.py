"""A soak: mixed traffic for minutes or hours, with every packet accounted for and no leak.

make soak MINUTES=30

docs/topics/robustness.md describes what it does and what it found.
"""
