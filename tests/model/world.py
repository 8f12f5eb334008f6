"""One device under test and all that is known of it: whose packets are where, and who waits."""

import asyncio
import contextlib
import dataclasses
import itertools
import math
import random
import select
import time
from collections.abc import Callable
from typing import Any

import aiotun

from . import kernel
from .captures import Recording
from .lines import Line, payloads_for
from .packets import IN, Fault, Flow, Ledger, Packet, numbers_in
from .steps import Config

__all__ = ["Op", "Target", "World"]

# What one batch may hold, whatever its limit: the budget of 256, and some super-packets more.
BATCH = 1024
# From so many unread packets on a ring may be full, and what it drops is looked up.
_RING = 150


@dataclasses.dataclass(eq=False)
class Target:
    """Something with packet methods: the device, one of its queues, or a queue made of an fd."""

    name: str
    io: Any
    rings: set[int]
    """The kernel's queues that it reads; none once it is closed."""
    closed: bool = False
    captured: bool = True
    """Whether a capture of the device has its packets: not those of a queue made of an fd."""


@dataclasses.dataclass(eq=False)
class Op:
    """One call that may wait."""

    what: str
    target: Target
    ticket: float = 0
    disturbed: bool = False
    """Whether it may give up its place: it has a time limit, or its task was cancelled."""
    saw_down: bool = False


@dataclasses.dataclass(eq=False)
class Actor:
    """A task of the model."""

    name: str
    ops: list[Op]
    task: "asyncio.Future[None] | None" = None  # an eager one runs before it is known
    cancelled: bool = False

    @property
    def ending(self) -> bool:
        """Whether it was cancelled and has not ended yet."""
        return self.cancelled and self.task is not None and not self.task.done()


class World:
    """The state of a run; the rules are in `unfinished`, `received` and `finished`."""

    def __init__(self, config: Config, patience: float) -> None:
        self.config = config
        self.patience = patience
        self.flows: list[Flow] = []
        self.line: Line
        self.device: Any = None  # what target 0 is
        self.base: Any = None  # the Device under it, where there is one
        self.targets: list[Target] = []
        self.fds: dict[int, int] = {}  # ring: fd
        self.disabled: set[int] = set()
        self.into = Ledger("received")
        self.out = Ledger("sent")
        self.capturable = 0
        """How many packets have arrived from those who send through the device itself."""
        self.receiving: list[Op] = []
        self.sending: list[Op] = []
        self.actors: list[Actor] = []
        self.recordings: list[Recording] = []
        self.faults: list[Fault] = []
        self.tickets = itertools.count()
        self.epoch = 0
        self.calls_to_send = 0
        self.groups = itertools.count()
        self.chance = random.Random(1)  # for sizes alone
        self.lost = self.down = self.moved = False
        self.truncated = self.segments_dropped = 0
        self.name, self.index = "", 0
        self.keep = contextlib.ExitStack()  # what is released once everything is closed
        self.uncertain = False  # a queue is closing, which takes a thread some time
        self.closed_late = False  # another loop sees to it
        self.more_unfinished: Callable[[], list[str]] = list

    # What is known

    @property
    def closed(self) -> bool:
        return self.targets[0].closed

    def target(self, number: int) -> Target:
        return self.targets[number % len(self.targets)]

    def could_take(self, target: Target, packet: Packet) -> bool:
        if packet.ring is not None:
            return packet.ring in target.rings
        return bool(target.rings) and target.rings >= self.fds.keys()

    def waiting_for(self, target: Target) -> list[Packet]:
        """Some packets that are there for a target, if any."""
        found = (p for p in self.into.there.values() if self.could_take(target, p))
        return list(itertools.islice(found, 6))

    def fault(self, kind: str, text: str) -> None:
        self.faults.append(Fault(kind, text))

    def check(self) -> None:
        if self.faults:
            raise self.faults[0]

    # Packets for the program

    @property
    def _several(self) -> bool:
        return self.config.linked and self.config.queues > 1

    def feed(self, flow: Flow, count: int, together: int) -> None:
        size = self.chance.choice((16, 64, 300) if together < 64 else (16, 64))
        if not (self.config.split or self.config.raw):
            together = 1
        for _ in range(count):
            self._feed_one(flow, together, size)

    def _feed_one(self, flow: Flow, together: int, size: int) -> None:
        before = self._readable()
        watch = len(self.into.there) > _RING or bool(self.disabled) or len(self.targets) > 2
        dropped = self._dropped() if watch else 0
        group = next(self.groups)
        if (self.sending or self.uncertain) and len(self.fds) > 1:
            # A call that goes on sending may move the flow to another queue, and so may the kernel
            # at the moment when it closes one.
            self.epoch += 1
        packets = [self.into.add(flow.number, self.epoch, "doubtful") for _ in range(together)]
        fed = self.line.feed(flow, payloads_for(flow, [p.number for p in packets], size))
        state = "there" if fed else "never"
        if fed and watch and self._dropped() > dropped:
            state = "never"
        if state == "there" and (self.lost or self.down or self.moved or not self.fds):
            state = "doubtful"
        ring = self._ring(before)
        if ring is None and self.uncertain and state == "there":
            state = "doubtful"  # it may be in the ring of a queue that is being closed
        for packet in packets:
            packet.ring, packet.group = ring, group
            self.into.mark(packet, state)

    def _readable(self) -> set[int]:
        if not self._several:
            return set()
        return {ring for ring, fd in self.fds.items() if kernel.poll(fd)}

    def _ring(self, before: set[int]) -> int | None:
        """Where the packet that was just fed is, by which queue became readable."""
        if not self._several:
            return next(iter(self.fds), None)
        after = self._readable()
        # Where none became readable it went to one that was, or to one that is being closed.
        new = after - before or (set() if self.uncertain else after)
        return next(iter(new)) if len(new) == 1 else None

    def _dropped(self) -> int:
        found = kernel.counters(self.name) if self.config.linked else None
        return found.tx_dropped if found else 0

    # Received

    def received(
        self, op: Op, datas: list[bytes], *, cut: bool = False, bare: bool = False
    ) -> None:
        """Account for what one call gave. The rules: whole, once, in order, and in turn."""
        if len(datas) > BATCH:
            raise Fault("batch", f"{op.what} gave {len(datas)} packets at once")
        raw = self.config.raw and not bare
        for data in datas:
            if not data:
                raise Fault("empty", f"{op.what} gave an empty packet")
            for seen in numbers_in(data, self.config.frame, raw, cut=cut):
                if seen.direction != IN:
                    raise Fault("invented", f"{op.what} gave a packet of the other direction")
                packet = self.into.came(seen)
                self._in_turn(op, packet)
                if op.target.captured:
                    for recording in self.recordings:
                        recording.expect(seen)

    def _in_turn(self, op: Op, packet: Packet) -> None:
        for other in self.receiving:
            if (
                other is not op
                and other.ticket < op.ticket
                and not other.disturbed
                and self.could_take(other.target, packet)
            ):
                raise Fault(
                    "overtaken",
                    f"{op.what} of {op.target.name} got packet {packet.number} before "
                    f"{other.what} of {other.target.name}, which has waited for longer",
                )

    def nowait(self, target: Target, who: str = "recv_nowait") -> bool:
        """recv_nowait, and whether it gave a packet."""
        try:
            data = target.io.recv_nowait()
        except BlockingIOError:
            if self.receiving or self._ending() or self.lost:
                return False
            if there := self.waiting_for(target):
                raise Fault(
                    "nowait", f"{target.name} has {_some(there)}, nobody waits, and it says none"
                ) from None
            return False
        except aiotun.AiotunError as error:
            self.legitimate(error, target, f"{who} of {target.name}")
            return False
        self.received(Op(who, target, math.inf), [data])
        return True

    def _ending(self) -> bool:
        return any(actor.ending for actor in self.actors)

    # Errors

    def legitimate(self, error: BaseException, target: Target, who: str, **also: bool) -> None:
        """Raise a fault unless this error is what it should be, now."""
        lost = isinstance(error, aiotun.DeviceLostError) and self.lost
        closed = isinstance(error, aiotun.DeviceClosedError) and target.closed
        down = isinstance(error, aiotun.LinkDownError) and (
            self.down
            or self.moved
            or also.get("saw_down", False)
            or not (target.rings - self.disabled)
        )
        bad = isinstance(error, aiotun.PacketError) and also.get("bad", False)
        if not (lost or closed or down or bad):
            raise Fault("error", f"{who} raised {error!r}; {self.told()}") from error

    def told(self) -> str:
        flags = [f for f in ("closed", "lost", "down", "moved") if getattr(self, f)]
        closed = [t.name for t in self.targets if t.closed]
        return f"state: {' '.join(flags) or 'up'}; closed: {', '.join(closed) or 'none'}"

    def taken_unseen(self, target: Target) -> None:
        """One packet was taken without telling which: the first of a ring, or a foreign one."""
        firsts: dict[tuple[int, ...], Packet] = {}
        for packet in self.into.there.values():
            if packet.ring is None:  # any ring; those of one flow and epoch are in the same one
                firsts.setdefault((packet.flow, packet.epoch), packet)
            elif packet.ring in target.rings:
                firsts.setdefault((packet.ring,), packet)
        groups = {packet.group for packet in firsts.values()}
        for packet in list(self.into.there.values()):
            if packet in firsts.values() or (self.config.raw and packet.group in groups):
                self.into.mark(packet, "doubtful")

    # Rules for those who wait

    def unfinished(self) -> list[str]:
        """Who waits though there is no reason to any more."""
        found = self.more_unfinished()
        for op in self.receiving:
            packets = self.waiting_for(op.target)
            if self.lost or op.target.closed:
                found.append(f"{op.what} waits on {op.target.name}, which is gone or closed")
            elif packets:
                found.append(f"{op.what} waits on {op.target.name}, which has {_some(packets)}")
            elif any(kernel.poll(self.fds[r]) for r in op.target.rings if r in self.fds):
                found.append(f"{op.what} waits on {op.target.name}, whose fd is readable")
        for op in self.sending:
            rings = [r for r in op.target.rings if r in self.fds]
            if self.lost or op.target.closed:
                found.append(f"{op.what} waits to send on {op.target.name}, gone or closed")
            elif self.down or self.moved:
                found.append(f"{op.what} waits to send on {op.target.name}, whose link is down")
            elif rings and all(kernel.poll(self.fds[r], select.POLLOUT) for r in rings):
                found.append(f"{op.what} waits to send on {op.target.name}, which has room")
        for actor in self.actors:
            if actor.ending:
                found.append(f"{actor.name} was cancelled and goes on")
        return found

    async def settle(self, *, turns: int = 6) -> None:
        """Let everybody go on who can, and raise where somebody doesn't."""
        for _ in range(turns):
            await asyncio.sleep(0)
        self.collect()
        deadline = time.monotonic() + self.patience
        looks = 0
        while True:
            self.check()
            found = self.unfinished()
            if not found:
                return
            if time.monotonic() > deadline:
                raise Fault("hang", "; ".join(found[:4]))
            looks += 1
            await asyncio.sleep(0 if looks < 100 else 0.001)
            self.collect()

    # Packets from the program

    def collect(self) -> None:
        """Account for what has arrived at the far end."""
        for seen in self.line.collect():
            self.capturable += self.out.came(seen).captured

    def went_out(self) -> int | None:
        """How many packets the kernel has taken so far that a capture of the device sees."""
        if self.config.frame:
            found = kernel.counters(self.name)
            if found is None:
                return None
            header = 14 + (28 if self.config.version == 4 else 48)
            return (found.rx_bytes - found.rx_packets * header) // self.config.size
        self.collect()
        return self.capturable

    # The ends of things

    def forget(self, ring: int) -> None:
        """A ring's packets may be gone: its queue was closed or disabled."""
        self.into.doubt(ring)
        self.epoch += 1

    def close_ring(self, ring: int) -> None:
        self.uncertain = len(self.fds) > 1 or self.uncertain
        self.fds.pop(ring, None)
        for target in self.targets:
            target.rings.discard(ring)
            if not target.rings:
                target.closed = True
        self.forget(ring)


def _some(packets: list[Packet]) -> str:
    shown = ", ".join(str(packet.number) for packet in packets[:5])
    more = " and more" if len(packets) > 5 else ""
    return f"packets {shown}{more}"
