"""Boots other kernels, and runs aiotun's tests there: python -m tests.kernels."""
