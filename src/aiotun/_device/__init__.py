"""The parts of `aiotun.device`: the options, opening a device, persistent devices and bridges."""
