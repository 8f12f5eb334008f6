"""The parts of `aiotun.queue`: packets through file descriptors."""
