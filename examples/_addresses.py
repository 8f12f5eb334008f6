"""Interface addresses on the command line, which must have their prefix length."""

import argparse
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

__all__ = ["ipv4_with_prefix", "with_prefix"]


def with_prefix(text: str) -> IPv4Interface | IPv6Interface:
    """Read ``A/LEN``. Without the length `ipaddress` would read a network of one address."""
    if "/" not in text:
        network, alone = (64, 128) if ":" in text else (24, 32)
        raise argparse.ArgumentTypeError(
            f"{text} has no prefix length; write {text}/{network}, or {text}/{alone} for the "
            "address alone"
        )
    try:
        return ip_interface(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def ipv4_with_prefix(text: str) -> IPv4Interface:
    """Read ``A/LEN`` where only IPv4 will do."""
    address = with_prefix(text)
    if not isinstance(address, IPv4Interface):
        raise argparse.ArgumentTypeError(f"{text} is not an IPv4 address")
    return address
