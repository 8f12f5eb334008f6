"""The parts of `aiotun.datagrams`."""
