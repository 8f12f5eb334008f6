"""The parts of the `aiotun` command."""
