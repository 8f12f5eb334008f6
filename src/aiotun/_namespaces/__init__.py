"""The parts of `aiotun.namespaces`: connections, programs, and the pool of sockets."""
