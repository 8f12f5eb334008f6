"""The parts of `aiotun.link`: rtnetlink, by pyroute2."""
