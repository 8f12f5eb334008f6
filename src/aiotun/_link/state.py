"""A link's state as a watcher knows it, and the events between two states; no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from ipaddress import IPv4Interface, IPv6Interface
from typing import NamedTuple

from .info import EventKind, LinkEvent, LinkInfo
from .values import LinkAddress

__all__ = ["BACKLOG", "Backlog", "Change", "LinkState", "differences", "state_of"]

BACKLOG = 256
"""How many changes are kept one by one for a reader that falls behind."""

# What identifies an address to the kernel. Its scope, lifetimes and flags may change.
_AddressKey = tuple[IPv4Interface | IPv6Interface, IPv4Interface | IPv6Interface | None]


class Change(NamedTuple):
    """The content of one notification: a link's new properties, or one of its addresses.

    Attributes:
        link: the link's index.
        info: the link's properties, if the notification is about the link itself.
        address: the address, if the notification is about an address.
        removed: whether the link or the address was removed.
    """

    link: int
    info: LinkInfo | None
    address: LinkAddress | None
    removed: bool


class LinkState(NamedTuple):
    """A link and its addresses at one moment; immutable."""

    info: LinkInfo
    addresses: Mapping[_AddressKey, LinkAddress]

    def after(self, change: Change) -> LinkState | None:
        """Return the state after a change; None if the link was deleted.

        Returns the same object if the change makes no difference: the kernel repeats itself. After
        a rename, for example, it announces every address again.
        """
        address = change.address
        if address is None:
            return None if change.removed else self._replace(info=change.info or self.info)
        key = (address.interface, address.peer)
        if change.removed == (key not in self.addresses):
            return self
        others = {other: value for other, value in self.addresses.items() if other != key}
        return self._replace(addresses=others if change.removed else {**others, key: address})


def state_of(info: LinkInfo, addresses: list[LinkAddress]) -> LinkState:
    """Make a state from a lookup's results."""
    return LinkState(info, {(each.interface, each.peer): each for each in addresses})


def differences(before: LinkState, after: LinkState) -> list[LinkEvent]:
    """Return the events that lead from one state to another, in the order of `EventKind`."""
    old, new = before.info, after.info
    kinds: list[EventKind] = []
    if old.name != new.name:
        kinds.append("renamed")
    if old.mtu != new.mtu:
        kinds.append("mtu")
    if old.up != new.up:
        kinds.append("up" if new.up else "down")
    if old.carrier != new.carrier:
        kinds.append("carrier")
    events = [LinkEvent(kind, new) for kind in kinds]
    if before.addresses is not after.addresses:
        events += [
            LinkEvent("address_removed", new, address)
            for key, address in before.addresses.items()
            if key not in after.addresses
        ]
        events += [
            LinkEvent("address_added", new, address)
            for key, address in after.addresses.items()
            if key not in before.addresses
        ]
    return events


class Backlog:
    """The events that one reader has not read yet, in bounded memory.

    Up to `BACKLOG` changes are kept one by one, in their order. A reader that falls further behind
    gets the differences between the last state that it knows and the current state. These leave out
    what changed and changed back in between, but always lead to the current state.
    """

    def __init__(self, state: LinkState) -> None:
        self._known = state  # the state that the reader knows after reading `_current`
        self._current: deque[LinkEvent] = deque()
        self._changes: deque[tuple[list[LinkEvent], LinkState]] = deque()
        self._folded = False
        self._deleted = False
        self.state: LinkState = state

    def add(self, state: LinkState) -> None:
        """Record the link's new state."""
        events = differences(self.state, state)
        self.state = state
        if not events or self._folded:
            return
        if len(self._changes) < BACKLOG:
            self._changes.append((events, state))
        else:
            self._changes.clear()
            self._folded = True

    def add_deleted(self) -> None:
        """Record that the link was deleted: the last event."""
        self._deleted = True

    def take(self) -> LinkEvent | None:
        """Return the next event; None if no event waits."""
        if not self._current:
            if self._changes:
                events, self._known = self._changes.popleft()
                self._current.extend(events)
            elif self._folded:
                self._current.extend(differences(self._known, self.state))
                self._known, self._folded = self.state, False
        if self._current:
            return self._current.popleft()
        if self._deleted:
            self._deleted = False
            return LinkEvent("deleted", self.state.info)
        return None
