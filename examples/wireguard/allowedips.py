"""Section 2, cryptokey routing: finds the owner of an inner address by the longest prefix."""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Generic, TypeVar

__all__ = ["AllowedIPs", "Network"]

Network = IPv4Network | IPv6Network
T = TypeVar("T")

_REMEMBERED = 4096


class AllowedIPs(Generic[T]):
    """A table of networks. A network that is added twice belongs to the last owner."""

    def __init__(self, entries: Iterable[tuple[Network, T]]) -> None:
        # By the length of the address in bytes, then by prefix length, the longest first.
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
        """The owner of an address of 4 or 16 bytes, or None."""
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
        if len(self._seen) >= _REMEMBERED:  # a scan of many addresses; start again
            self._seen.clear()
        self._seen[address] = owner
        return owner
