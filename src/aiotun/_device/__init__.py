"""The parts of `aiotun.device`: what can be asked for, and how a device is opened."""
