"""aiotun beside the libraries that a user would pick instead; `make bench-peers`."""
