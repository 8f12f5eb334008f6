"""Holds SYNs: until `admit` has decided about a connection, and a socket waits for it.

A client repeats a SYN that gets no answer, for a few minutes at most. That leaves time to decide.
Then the SYN is written to the kernel, or answered here with a reset or an ICMP error.
"""

from __future__ import annotations

import asyncio
import inspect
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from .._packets.native import checksum
from .._packets.udp import TCP, pseudo_header
from .addresses import Address, address, unicast
from .answers import Refusal, reset, unreachable

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader
    from .core import Core
    from .injector import Injector
    from .seen import Seen

__all__ = ["Admission", "Admit", "Verdict", "checked"]

Verdict = bool | Refusal

Admit = Callable[[Address, Address], Verdict | Awaitable[Verdict]]
"""Decides about a connection or a flow from `peer` to `local`: ``admit(local, peer)``."""

_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_START = struct.Struct("!4sI5xB")  # ports, sequence number, flags
_TCP_HEADER = 20

# How many SYNs are held: in all, and for one destination (address and port).
_HELD_MAX, _HELD_FOR_ONE = 4096, 512

# A client has given up if its SYN was not repeated for so many seconds: at first, and later as a
# multiple of the time between its last two SYNs. A Linux client repeats the first SYN after one
# second, and doubles the time at most with each repetition.
_FIRST_PATIENCE, _PATIENCE = 5.0, 2.5
_SWEEP = 1.0

# A client may repeat its SYN while the decision is made, and the copy arrives after it. So the last
# decisions are remembered: how many, and for how many seconds.
_REMEMBERED_MAX, _REMEMBERED = 4096, 60.0


class _Held:
    """A SYN that waits."""

    def __init__(self, syn: Seen, sequence: int, now: float) -> None:
        self.syn = syn
        self.sequence = sequence
        self.destination = _destination(syn.header)
        self.seen = now
        self.until = now + _FIRST_PATIENCE
        self.task: asyncio.Task[None] | None = None

    def repeat(self, now: float) -> None:
        """Note that the client has sent the SYN again."""
        self.until = now + max(_FIRST_PATIENCE, _PATIENCE * (now - self.seen))
        self.seen = now


class Admission:
    """Decides about TCP packets that open connections; see `intake`.

    Args:
        core: the stack.
        injector: sends the resets and ICMP errors.
        admit: the program's function. None admits everything: then a SYN is held only until its
            socket is made.
        full: says whether the limit of open connections is reached.
    """

    def __init__(
        self, core: Core, injector: Injector, admit: Admit | None, full: Callable[[], bool]
    ) -> None:
        assert core.mechanism is not None
        self._core = core
        self._mechanism = core.mechanism
        self._admit = admit
        self._full = full
        self._loop = asyncio.get_running_loop()
        self._held: dict[bytes, _Held] = {}
        self._for_one: Counter[tuple[bytes, int | None]] = Counter()
        self._decided: dict[bytes, tuple[int, Verdict, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._injector = injector
        core.intake.tcp = self

    def close(self) -> None:
        """Stop holding SYNs, and refuse those that are held with a reset."""
        for key in list(self._held):
            held = self._release(key)
            self._carry_out(held.syn, False)
        self._core.intake.tcp = None
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Wait until no call of `admit` is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Packets

    def take(self, seen: Seen) -> bool:
        """Hold, answer or drop a packet; return False if it is for the kernel instead."""
        packet, header = seen.packet, seen.header
        if header.fragment and _hides_flags(packet, header):
            self._core.counts.packets_refused += 1
            return True
        if header.sport is None or not _is_valid(packet, header):
            return False  # a later fragment, or what the kernel drops
        ports, sequence, flags = _START.unpack_from(packet, header.payload_offset)
        key = header.src_bytes + header.dst_bytes + ports
        if flags & _RST:
            if key in self._held and _sums(seen):
                self._expire(key)
            return False
        if flags & (_SYN | _ACK) != _SYN:
            return False
        if not _sums(seen):
            self._core.counts.packets_refused += 1
            return True
        if not self._concerns(header):
            return self._refuses_own(seen)
        if not self._has_sender(header):
            self._core.counts.packets_refused += 1
            return True
        return self._opens(key, seen, sequence)

    def _concerns(self, header: IPHeader) -> bool:
        """Whether a packet is for one host, and not for one of the stack's own addresses."""
        return header.dst_bytes not in self._core.own and _one_host(header.dst_bytes)

    def _has_sender(self, header: IPHeader) -> bool:
        """Whether it is from a host that can be answered; the kernel drops it otherwise, too."""
        source = header.src_bytes
        return source not in self._core.own and (unicast(source) or _is_link_local(source))

    def _refuses_own(self, syn: Seen) -> bool:
        """Refuse a SYN to one of the stack's own addresses that a mechanism's socket would get."""
        mechanism, header = self._mechanism, syn.header
        if header.dst_bytes in self._core.own and mechanism.shadows(header):
            self._answer(reset(syn.packet, header))
            return True
        return False

    def _opens(self, key: bytes, syn: Seen, sequence: int) -> bool:
        now = self._loop.time()
        held = self._held.get(key)
        if held is not None and held.sequence == sequence:
            held.repeat(now)
            return True
        if held is not None:  # the client gave up, and tries again from the same port
            self._expire(key)
        verdict: Verdict | Awaitable[Verdict] | None = self._remembered(key, sequence, now)
        if verdict is None:
            if self._full():
                verdict = False
            elif not self._has_room(syn.header):
                self._core.counts.packets_refused += 1
                return True  # no answer: the client sends its SYN again, and may find room then
            else:
                verdict = self._ask(syn.header)
        if isinstance(verdict, Awaitable) or (verdict is True and not self._ready(syn.header)):
            self._hold(key, _Held(syn, sequence, now), verdict)
            return True
        self._remember(key, sequence, verdict)
        if verdict is True:
            return False
        self._carry_out(syn, verdict)
        return True

    # Deciding

    def _ask(self, header: IPHeader) -> Verdict | Awaitable[Verdict]:
        if self._admit is None:
            return True
        source, target = header.src_bytes, header.dst_bytes
        try:
            verdict = self._admit(_address(target, header.dport), _address(source, header.sport))
            return verdict if inspect.isawaitable(verdict) else checked(verdict)
        except Exception as error:  # noqa: BLE001 - it is the program's, and reported
            self._report(error)
            return False

    def _hold(self, key: bytes, held: _Held, verdict: Verdict | Awaitable[Verdict]) -> None:
        self._held[key] = held
        self._for_one[held.destination] += 1
        held.task = self._loop.create_task(self._decide(key, held, verdict))
        self._tasks.add(held.task)
        held.task.add_done_callback(self._tasks.discard)
        if inspect.iscoroutine(verdict):
            # If the task is cancelled before its first step, nothing awaits this coroutine, and
            # Python would warn about it.
            held.task.add_done_callback(lambda _: verdict.close())
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP, self._sweep)

    async def _decide(self, key: bytes, held: _Held, verdict: Verdict | Awaitable[Verdict]) -> None:
        decided: Verdict = False
        try:
            decided = checked(await verdict) if isinstance(verdict, Awaitable) else verdict
            if decided is True and not self._ready(held.syn.header):
                decided = await self._mechanism.prepare(held.syn.header)
        except Exception as error:  # noqa: BLE001 - as above
            decided = False
            self._report(error)
        except asyncio.CancelledError:
            decided = False
            raise
        finally:
            # Skip this if `_release` cancelled this task: it has removed the SYN already.
            if self._held.get(key) is held:
                held.task = None
                self._release(key)
                self._remember(key, held.sequence, decided)
                self._carry_out(held.syn, decided)

    def _carry_out(self, syn: Seen, verdict: Verdict) -> None:
        if verdict is True:
            self._let_in(syn)
            return
        self._core.counts.connections_refused += 1
        if verdict is False:
            self._answer(reset(syn.packet, syn.header))
        else:
            self._answer(unreachable(syn.packet, syn.header, verdict))

    def _let_in(self, syn: Seen) -> None:
        try:
            self._core.write(syn.sent)
        except OSError:  # the link is down, for example; the client repeats the SYN
            self._core.counts.packets_refused += 1

    def _answer(self, packet: bytes) -> None:
        if not self._injector.try_send(packet):
            self._core.counts.packets_refused += 1

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": "aiotun refused a connection", "exception": error}
        )

    def _ready(self, header: IPHeader) -> bool:
        return self._mechanism.ready(header)

    # What is held

    def _has_room(self, header: IPHeader) -> bool:
        if len(self._held) >= _HELD_MAX:
            return False
        return self._for_one[_destination(header)] < _HELD_FOR_ONE

    def _release(self, key: bytes) -> _Held:
        held = self._held.pop(key)
        self._for_one[held.destination] -= 1
        if not self._for_one[held.destination]:
            del self._for_one[held.destination]
        # A closed loop can't cancel a task. The collector ends it.
        if held.task is not None and not self._loop.is_closed():
            held.task.cancel()
        return held

    def _expire(self, key: bytes) -> None:
        """Drop the SYN of a client that has given up."""
        self._release(key)
        self._core.counts.connections_expired += 1

    def _sweep(self) -> None:
        now = self._loop.time()
        for key in [key for key, held in self._held.items() if held.until < now]:
            self._expire(key)
        self._timer = self._loop.call_later(_SWEEP, self._sweep) if self._held else None

    # What was decided

    def _remembered(self, key: bytes, sequence: int, now: float) -> Verdict | None:
        earlier, verdict, since = self._decided.get(key, (0, False, 0.0))
        return verdict if since and earlier == sequence and now - since < _REMEMBERED else None

    def _remember(self, key: bytes, sequence: int, verdict: Verdict) -> None:
        self._decided.pop(key, None)  # so that the oldest stay in front
        self._decided[key] = sequence, verdict, self._loop.time()
        if len(self._decided) > _REMEMBERED_MAX:
            del self._decided[next(iter(self._decided))]


def checked(verdict: object) -> Verdict:
    """Check what `admit` returned.

    Raises:
        TypeError: it is neither True, False nor a `Refusal`.
    """
    if isinstance(verdict, bool | Refusal):
        return verdict
    raise TypeError(f"admit must return True, False or a Refusal, got {verdict!r}")


def _destination(header: IPHeader) -> tuple[bytes, int | None]:
    return header.dst_bytes, header.dport


def _address(packed: bytes, port: int | None) -> Address:
    return address(packed + (port or 0).to_bytes(2, "big"))


def _one_host(packed: bytes) -> bool:
    """Whether a destination is one host. A packet to many hosts must not be answered."""
    if len(packed) == 4:
        return not 224 <= packed[0] < 240 and packed not in _NOT_ONE
    return packed[0] != 0xFF


_NOT_ONE = (bytes(4), b"\xff" * 4)


def _is_link_local(packed: bytes) -> bool:
    return len(packed) == 16 and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def _is_valid(packet: bytes, header: IPHeader) -> bool:
    """Whether the lengths in a segment's headers fit the packet. The kernel drops it otherwise."""
    at, end = header.payload_offset, header.total_length
    if end > len(packet) or end < at + _TCP_HEADER:
        return False
    size = (packet[at + 12] >> 4) * 4
    return size >= _TCP_HEADER and (header.fragment or at + size <= end)


def _sums(seen: Seen) -> bool:
    """Whether the checksums are right, as far as this packet tells. The kernel drops it otherwise.

    TCP's checksum covers a segment's other fragments, too, which only the kernel sees.
    """
    packet, header = seen.packet, seen.header
    at, end = header.payload_offset, header.total_length
    if header.version == 4 and checksum(packet[:at], 0):
        return False
    if seen.checked or header.fragment:
        return True
    return not checksum(packet[at:end], pseudo_header(packet, end - at, TCP))


def _hides_flags(packet: bytes, header: IPHeader) -> bool:
    """Whether a fragment has only a part of the TCP header, so that the flags may be in another.

    RFC 3128 describes this way around filters.
    """
    if header.sport is not None:
        return min(header.total_length, len(packet)) < header.payload_offset + _TCP_HEADER
    at = 6 if header.version == 4 else header.payload_offset - 6
    field = int.from_bytes(packet[at : at + 2], "big")
    # The offset in units of 8 bytes; in IPv6 it stands before three bits of flags.
    offset = field & 0x1FFF if header.version == 4 else field >> 3
    return offset * 8 < _TCP_HEADER
