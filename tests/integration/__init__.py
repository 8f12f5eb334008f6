"""Tests against the kernel: real devices in private network namespaces."""
