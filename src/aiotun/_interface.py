"""What is known of an interface; shared by its device, its queues and its link."""

from __future__ import annotations

__all__ = ["Interface"]


class Interface:
    """The one place where a change of name or MTU is written down, for everybody to read.

    Attributes:
        name: the present name.
        index: the kernel's number, which a rename does not change; None while nobody asked for it.
        mtu: the IP MTU in bytes; None while nobody asked for it.
    """

    __slots__ = ("index", "mtu", "name")

    def __init__(self, name: str, index: int | None = None, mtu: int | None = None) -> None:
        self.name: str = name
        self.index: int | None = index
        self.mtu: int | None = mtu
