"""Compares the kernel of a namespace as a TCP/IP stack with others: `make bench-netstack`."""
