"""Section 5.4.6: data messages, and which of them are replays."""

import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .handshake import Keys
from .messages import DATA, OVERHEAD_BYTES

if TYPE_CHECKING:
    from .peer import Peer, Timers

__all__ = ["REKEY_AFTER_MESSAGES", "WINDOW", "ReplayWindow", "Session"]

# Section 6.1.
REKEY_AFTER_MESSAGES = 2**60
REJECT_AFTER_MESSAGES = 2**64 - 2**13 - 1

WINDOW = 8192
_ZEROS = bytes(4)
_COUNTER = struct.Struct("<Q")


class ReplayWindow:
    """Remembers which of the last 8,192 counters were seen; older counters count as seen."""

    __slots__ = ("next", "seen")

    def __init__(self) -> None:
        self.seen = bytearray(WINDOW)  # indexed by the counter modulo its length
        self.next = 0  # one above the highest counter seen

    def take(self, count: int) -> None:
        """Record so many genuine messages that come next in sequence."""
        start = self.next % WINDOW
        self.next += count
        if start + count <= WINDOW:
            self.seen[start : start + count] = b"\1" * count
        else:
            for counter in range(start, start + count):
                self.seen[counter % WINDOW] = 1

    def accept(self, counter: int) -> bool:
        """Record the counter of a genuine message; returns False if it was seen before."""
        ahead = counter - self.next
        if ahead >= 0:
            if ahead >= WINDOW:
                self.seen = bytearray(WINDOW)
            elif ahead:
                for skipped in range(self.next, counter):
                    self.seen[skipped % WINDOW] = 0
            self.next = counter + 1
        elif ahead < -WINDOW or self.seen[counter % WINDOW]:
            return False
        self.seen[counter % WINDOW] = 1
        return True


class Session:
    """The result of a handshake: a key for each direction.

    Args:
        local, remote: our index of the session, and the peer's.
        initiator: whether we started that handshake.

    Attributes:
        head, local_head: how each of our data messages begins, and each of the peer's.
        remote_words, local_words: the peer's index many times, as numbers, and ours: for the
            headers of a run.
        reject_at: from this time on it is neither used nor accepted (section 6.2).
        rekey_at, receiver_rekey_at: from these times on a sender, and a peer that only receives,
            start a new handshake. Only the initiator does so; otherwise both peers would.
    """

    __slots__ = (
        "_decrypt", "_encrypt", "decrypt_into", "encrypt_into", "head", "local", "local_head",
        "local_words", "peer", "receiver_rekey_at", "reject_at", "rekey_at", "remote",
        "remote_words", "sent", "window",
    )  # fmt: skip

    def __init__(
        self,
        peer: "Peer",
        keys: Keys,
        local: bytes,
        remote: bytes,
        *,
        initiator: bool,
        timers: "Timers",
        now: float,
    ) -> None:
        self.peer = peer
        self.local, self.remote = local, remote
        self.local_words = memoryview(local * 256).cast("I")
        self.remote_words = memoryview(remote * 256).cast("I")
        self.reject_at = now + timers.reject_after
        spare = timers.keepalive_timeout + timers.rekey_timeout
        self.rekey_at = now + timers.rekey_after if initiator else math.inf
        self.receiver_rekey_at = self.reject_at - spare if initiator else math.inf
        self.sent = 0  # messages
        self.window = ReplayWindow()
        self.head, self.local_head = DATA + remote, DATA + local
        send, receive = ChaCha20Poly1305(keys.send), ChaCha20Poly1305(keys.receive)
        self._encrypt, self.encrypt_into = send.encrypt, send.encrypt_into
        self._decrypt, self.decrypt_into = receive.decrypt, receive.decrypt_into

    def seal(self, packets: list[bytes], mtu: int) -> list[bytes]:
        """Make a message of each packet, padded to a multiple of 16 bytes but at most the MTU."""
        head, encrypt, pack, zeros = self.head, self._encrypt, _COUNTER.pack, _ZEROS
        messages: list[bytes] = []
        append = messages.append
        for counter, packet in enumerate(packets, self.sent):
            number = pack(counter)
            length = len(packet)
            # Section 5.4.6. A packet of the MTU's size or larger is not padded.
            if length % 16 and length < mtu:
                packet += bytes(min(-length % 16, mtu - length))
            append(head + number + encrypt(zeros + number, packet, None))
        self.sent += len(packets)
        return messages

    def open(self, messages: Sequence[bytes], dropped: Counter[str]) -> list[bytes]:
        """Return the packets of the genuine and new messages; count the others as dropped."""
        decrypt, window, unpack, zeros = self._decrypt, self.window, _COUNTER.unpack, _ZEROS
        packets: list[bytes] = []
        append = packets.append
        for message in messages:
            if len(message) < OVERHEAD_BYTES:
                dropped["truncated"] += 1
                continue
            number = message[8:16]
            (counter,) = unpack(number)
            if counter >= REJECT_AFTER_MESSAGES:
                dropped["beyond the last counter"] += 1
                continue
            try:
                packet = decrypt(zeros + number, message[16:], None)
            except InvalidTag:
                dropped["forged"] += 1
                continue
            if counter == window.next:  # the usual case of `accept`, inlined
                window.next = counter + 1
                window.seen[counter % WINDOW] = 1
                append(packet)
            elif window.accept(counter):
                append(packet)
            else:
                dropped["replayed"] += 1
        return packets

    def may_send(self, now: float) -> bool:
        """Section 6.2: whether it is neither too old nor out of messages."""
        return now < self.reject_at and self.sent < REJECT_AFTER_MESSAGES
