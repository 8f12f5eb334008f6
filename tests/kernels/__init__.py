"""Boots other kernels under QEMU, and runs aiotun's tests there: python -m tests.kernels."""
