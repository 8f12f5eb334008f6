"""What can happen: configurations and steps as plain data, made from a seed.

A step is a tuple of a kind and its numbers, so that it can be printed, stored as JSON, and left
out while shrinking without a change to the meaning of the others.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

__all__ = ["KINDS", "MODES", "Case", "Config", "Step", "make_case"]

Step = tuple[Any, ...]

MODES = (
    "off", "split", "raw",  # a TUN device
    "tap", "tap-split",  # a TAP device on a bridge whose other port is slow: sending waits
    "pair", "pair-split", "pair-raw",  # Queue.from_fd of a socket pair, whose other end we are
    "memory",  # one of a memory_pair
    "faults",  # a FaultInjector without faults in front of a TUN device
    "transport", "transport-tap",  # create_tun_endpoint, create_tap_endpoint
)  # fmt: skip

HOW_RECEIVE = ("recv", "into", "short", "many", "anext", "batches", "decoded")
WRAPS = ("plain", "timeout", "wait_for", "shield", "group", "self")
HOW_SEND = ("send", "list", "generator", "nowait")


@dataclasses.dataclass(frozen=True)
class Config:
    """What one run has from its beginning to its end."""

    mode: str
    loop: str = "asyncio"
    queues: int = 1
    eager: bool = False
    debug: bool = False
    size: int = 40
    """Bytes of payload in every packet that the program sends."""
    version: int = 4
    """Of IP."""
    most: int = 30
    """Tasks at once; what would start one more does nothing."""
    end: int = 1
    """How it is closed: 0 close and aclose, 1 aclose, 2 async with, 3 aclose in another loop."""

    @property
    def split(self) -> bool:
        return self.mode.endswith("split")

    @property
    def raw(self) -> bool:
        return self.mode.endswith("raw")

    @property
    def frame(self) -> bool:
        return "tap" in self.mode

    @property
    def transport(self) -> bool:
        return self.mode.startswith("transport")

    @property
    def linked(self) -> bool:
        """Whether there is an interface in the kernel."""
        return not self.mode.startswith(("pair", "memory"))

    @property
    def waits(self) -> bool:
        """Whether sending can find no room."""
        return self.frame or not self.linked


@dataclasses.dataclass(frozen=True)
class Case:
    """All that it takes to repeat a run."""

    config: Config
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [f"    {step!r}," for step in self.steps]
        return "\n".join([f"{self.config}", "[", *lines, "]"])


# --- What each kind of step draws ----------------------------------------------------------------


class Taste:
    """What one run is fond of: few values that come again and again meet each other."""

    def __init__(self, chance: random.Random, config: Config) -> None:
        self.chance, self.config = chance, config
        self._targets = self._some((0, 0, 0, 1, 2, 3, 4))
        self._receive = self._some(HOW_RECEIVE)
        self._wraps = self._some(("plain", "plain", *WRAPS))
        self._send = self._some(HOW_SEND)
        self._flows = self._some((0, 1, 2, 3))
        several = config.split or config.raw
        self._together = self._some((1, 2, 2, 10, 10, 20, 64)) if several else [1]
        self._rounds = self._some((1, 1, 1, 1, 2, 5, 50))
        self._extra = self._some((0, 0, 0, 1, 3))
        self._counts = self._some((1, 1, 1, 2, 3, 10, 40))

    def _some(self, values: Sequence[Any]) -> list[Any]:
        most = self.chance.choice((1, 1, 2, 3, len(values)))
        return self.chance.sample(values, min(most, len(values)))

    def of(self, *values: Any) -> Any:
        return self.chance.choice(values)

    def target(self) -> int:
        return int(self.of(*self._targets))

    def flow(self) -> int:
        return int(self.of(*self._flows))

    def feed(self) -> Step:
        together = self.of(*self._together)
        return "feed", self.flow(), min(self.of(*self._counts), 1 + 200 // together), together

    def receive(self) -> Step:
        return (
            "receive",
            self.target(),
            self.of(*self._receive),
            self.of(1, 2, 3, 8, 64, 1000),  # limit
            self.of(*self._rounds),
            self.of(*self._wraps),
            self.of(0, 1, 3),  # milliseconds, for those with a time
            self.of(*self._extra),  # recv_nowait after each
        )

    def send(self) -> Step:
        wide = self.config.waits or self.config.split
        return (
            "send",
            self.target(),
            self.of(*self._send),
            self.flow(),
            self.of(*((1, 1, 2, 16, 64, 100, 300) if wide else (1, 1, 2, 5, 64))),
            self.of("plain", "plain", "timeout", "wait_for", "group", "self"),
            self.of(0, 1, 3),
            self.of(None, None, None, None, 0, 3),  # the place of a packet that is none
        )

    def motif(self) -> list[Step]:
        """A state that is worth being in, and seldom reached by chance alone."""
        one = ("receive", self.target(), self.of(*self._receive[:2]), 1, 1, "plain", 0, 0)
        many = ("receive", 0, "many", 300, 1, "plain", 0, 0)
        burst = ("feed", self.flow(), 1, self.of(2, 10, 64))
        return list(
            self.of(
                # part of a super-packet is left, and nobody waits
                [burst, self.of(one, ("nowait", one[1])), ("settle",)],
                # the budget of this turn is spent
                [("drain",), *[("feed", self.flow(), 2, 64)] * 3, many, ("turn", 2),
                 ("wrong_loop", 0, self.of(0, 1))],
                # the fd was seen empty by somebody who has gone
                [one, ("turn", 2), ("cancel", -2, 1), ("turn", self.of(1, 2))],
                # the kernel has no room
                [("send", 0, self.of("list", "generator"), self.flow(), 300, "plain", 0, None),
                 ("turn", 1)],
            )
        )  # fmt: skip


Draw = Callable[[Taste], Step]

# Each kind, how often it comes beside the others, and what it draws.
KINDS: dict[str, tuple[float, Draw]] = {
    "feed": (10, Taste.feed),
    "receive": (10, Taste.receive),
    "nowait": (5, lambda t: ("nowait", t.target())),
    "bad_buffer": (1, lambda t: ("bad_buffer", t.target(), t.of(0, 1, 2, 3))),
    "send": (5, Taste.send),
    "cancel": (7, lambda t: ("cancel", t.of(-1, -1, -2, -2, 0, 1, 2, 3), t.of(1, 1, 2))),
    "turn": (8, lambda t: ("turn", t.of(1, 1, 1, 2, 3))),
    "pass": (1, lambda t: ("pass", t.of(1, 2, 4))),
    "settle": (3, lambda t: ("settle",)),
    "capture": (2, lambda t: ("capture",)),
    "uncapture": (1, lambda t: ("uncapture", t.of(0, 1, 2))),
    "drain": (1, lambda t: ("drain",)),
    "close": (0.5, lambda t: ("close", t.target())),
    "detach": (0.6, lambda t: ("detach", t.of(0, 1, 2), t.of(0, 1))),
    "disable": (0.6, lambda t: ("disable", t.of(0, 1, 2))),
    "enable": (0.8, lambda t: ("enable", t.of(0, 1, 2))),
    "down": (0.7, lambda t: ("down", t.of(0, 1))),
    "up": (1.4, lambda t: ("up", t.of(0, 1))),
    "delete": (0.3, lambda t: ("delete",)),
    "rename": (0.4, lambda t: ("rename", t.of(0, 1))),
    "move": (0.2, lambda t: ("move", t.of(0, 1))),
    "fork": (0.3, lambda t: ("fork", t.of(0, 1))),
    "wrong_loop": (0.7, lambda t: ("wrong_loop", t.target(), t.of(0, 1, 2))),
    "crowd": (0.3, lambda t: ("crowd", t.target(), t.of(20, 300))),
    "flood": (0.3, lambda t: ("flood", t.flow())),
    "opening": (0.2, lambda t: ("opening", t.of(0, 1, 2, 3, 4, 5, 6, 7), t.of(0, 1, 2))),
    "sendto": (8, lambda t: ("sendto", t.flow(), t.of(1, 3, 60), t.of(0, 1, 2))),
    "pause": (3, lambda t: ("pause",)),
    "resume": (3, lambda t: ("resume",)),
    "transport_close": (0.5, lambda t: ("transport_close", t.of(0, 1))),
}

_ALWAYS = ("feed", "receive", "turn")
_LINKED = {"rename", "move", "down", "up", "opening"}
_TRANSPORT = {"feed", "turn", "pass", "settle", "drain", "sendto", "pause", "resume",
              "transport_close", "close", "delete", "down", "up", "capture",
              "uncapture"}  # fmt: skip
_TRANSPORT_ONLY = {"sendto", "pause", "resume", "transport_close"}


def possible(config: Config) -> list[str]:
    """The kinds of steps that mean something there."""
    found = []
    for kind in KINDS:
        if config.transport:
            fits = kind in _TRANSPORT
        elif kind in _TRANSPORT_ONLY:
            fits = False
        elif kind in ("capture", "uncapture"):
            # A FaultInjector takes packets before its user has them, and that is when they count.
            fits = not config.mode.startswith(("pair", "faults"))
        elif kind in ("disable", "enable"):
            fits = config.queues > 1
        elif kind in ("wrong_loop", "detach", "crowd", "fork"):
            fits = config.mode != "faults"
        else:
            fits = config.linked or kind not in _LINKED
        if fits:
            found.append(kind)
    return found


def make_case(
    seed: int,
    *,
    modes: Collection[str] = MODES,
    loops: Collection[str] = ("asyncio", "uvloop"),
    queues: int | None = None,
    only: Collection[str] = (),
    without: Collection[str] = (),
) -> Case:
    """Make the case of a seed; the same arguments give the same case."""
    chance = random.Random(seed)
    mode = chance.choice(sorted(modes))
    several = mode in ("off", "split", "raw", "transport")
    config = Config(
        mode=mode,
        loop=chance.choice(sorted(loops)),
        queues=(queues or chance.choice((1, 1, 2, 3))) if several else 1,
        eager=chance.random() < 0.25 and sys.version_info >= (3, 12),
        debug=chance.random() < 0.15,
        size=chance.choice((16, 40, 400, 1000)),
        version=chance.choice((4, 6)),
        most=chance.choice((1, 2, 4, 30)),
        end=chance.randrange(4),
    )
    kinds = [each for each in possible(config) if each not in without]
    if only:
        kinds = [each for each in kinds if each in only]
    # Not all kinds in every run: what is left out leaves room for more of the others, and some
    # faults show only where a kind never happens.
    allowed = set(kinds)
    share = chance.choice((0.3, 0.5, 0.8, 1.0))
    kinds = [each for each in kinds if each in _ALWAYS or chance.random() < share] or kinds
    weights = [KINDS[each][0] for each in kinds]
    # Opening a device takes longer than most steps, so that short runs pay only without one.
    count = chance.choice((6, 12, 25, 50) if config.linked else (4, 6, 10, 16, 25))
    taste = Taste(chance, config)
    steps: list[Step] = []
    for each in chance.choices(kinds, weights, k=count):
        if chance.random() < 0.2:
            steps += [step for step in taste.motif() if step[0] in allowed]
        steps.append(KINDS[each][1](taste))
    return Case(config, tuple(steps))
