"""The parts of `aiotun.netstack`."""
