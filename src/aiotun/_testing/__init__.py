"""The parts of `aiotun.testing`: devices without a kernel, and faults."""
