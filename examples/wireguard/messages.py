"""Sections 5.4.2, 5.4.3, 5.4.6 and 5.4.7: the layouts of the four messages.

Indices, counters and types are little-endian. An index is kept as its 4 bytes.
"""

import struct
from typing import NamedTuple, Self

__all__ = [
    "COOKIE",
    "DATA",
    "INITIATION",
    "MACS_BYTES",
    "OVERHEAD_BYTES",
    "RESPONSE",
    "SIZES",
    "CookieReply",
    "Initiation",
    "Response",
]

# The type and three reserved bytes, which are zero.
INITIATION, RESPONSE, COOKIE, DATA = (struct.pack("<I", number) for number in (1, 2, 3, 4))

# The length of a message. A data message has its payload and an overhead.
SIZES = {INITIATION: 148, RESPONSE: 92, COOKIE: 64}
MACS_BYTES = 32  # mac1 and mac2, at the end of the two messages of a handshake
OVERHEAD_BYTES = 32  # of a data message: type, receiver, counter, and the tag at its end


class Initiation(NamedTuple):
    """Section 5.4.2, without its macs."""

    sender: bytes
    ephemeral: bytes
    static: bytes  # sealed
    timestamp: bytes  # sealed

    def pack(self) -> bytes:
        return INITIATION + self.sender + self.ephemeral + self.static + self.timestamp

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*struct.unpack("4x4s32s48s28s32x", data))


class Response(NamedTuple):
    """Section 5.4.3, without its macs."""

    sender: bytes
    receiver: bytes
    ephemeral: bytes
    empty: bytes  # sealed

    def pack(self) -> bytes:
        return RESPONSE + self.sender + self.receiver + self.ephemeral + self.empty

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*struct.unpack("4x4s4s32s16s32x", data))


class CookieReply(NamedTuple):
    """Section 5.4.7."""

    receiver: bytes
    nonce: bytes
    cookie: bytes  # sealed

    def pack(self) -> bytes:
        return COOKIE + self.receiver + self.nonce + self.cookie

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*struct.unpack("4x4s24s32s", data))
