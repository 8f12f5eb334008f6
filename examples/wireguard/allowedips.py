"""Section 2, cryptokey routing: whose an inner address is, by longest prefix."""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Generic, TypeVar

__all__ = ["AllowedIPs", "Network"]

Network = IPv4Network | IPv6Network
T = TypeVar("T")

_REMEMBERED = 4096


class AllowedIPs(Generic[T]):
    """A table of networks. An exact network belongs to whoever was given it last."""

    def __init__(self, entries: Iterable[tuple[Network, T]]) -> None:
        # By the length of an address in bytes; then by prefix, the longest first.
        found: dict[int, dict[int, dict[int, T]]] = {4: {}, 16: {}}
        for network, owner in entries:
            address = network.network_address.packed
            rows = found[len(address)].setdefault(network.prefixlen, {})
            rows[int.from_bytes(address, "big")] = owner
        self._tables = {
            size: [
                (((1 << prefix) - 1) << (size * 8 - prefix), rows)
                for prefix, rows in sorted(by_prefix.items(), reverse=True)
            ]
            for size, by_prefix in found.items()
        }
        self._seen: dict[bytes, T | None] = {}

    def owner(self, address: bytes) -> T | None:
        """Whose this address is, 4 or 16 bytes of it; None if nobody's."""
        try:
            return self._seen[address]
        except KeyError:
            pass
        number = int.from_bytes(address, "big")
        owner = None
        for mask, rows in self._tables.get(len(address), ()):
            owner = rows.get(number & mask)
            if owner is not None:
                break
        if len(self._seen) >= _REMEMBERED:  # somebody scans; start anew
            self._seen.clear()
        self._seen[address] = owner
        return owner
