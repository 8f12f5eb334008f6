"""What is known of an interface; shared by its device, its queues and its link."""

import dataclasses

__all__ = ["Interface"]


@dataclasses.dataclass(slots=True)
class Interface:
    """The one place where a change of name or MTU is written down, for everybody to read."""

    name: str
    index: int | None = None
    """The kernel's number, which a rename does not change; None while nobody asked for it."""
    mtu: int | None = None
    """The IP MTU in bytes; None while nobody asked for it."""
