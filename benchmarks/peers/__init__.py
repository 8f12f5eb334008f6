"""Compares aiotun with the libraries that a user could use instead: `make bench-peers`."""
