"""Compares two checkouts of aiotun: this one, and the one that `--other` names.

Separate programs import each checkout (`beside_worker.py`, `forward.py`, the example that answers
pings). They sleep unless it is their turn. The turns are short, and the sides alternate, also in
who goes first, so that disturbances affect both sides equally. The figure of a run is the median of
its turns. Both sides run on the same core. Only forwarders share all cores with the sender and the
receiver, as they would in real use.

Each run restarts the programs. A process can be a tenth slower than another process with the same
code for its whole life, because of where its memory is. With only one pair of processes, this would
look like a difference between the checkouts, and its spread would be small.

The cost of a packet is measured in processor time. On a busy machine, elapsed time includes what
other programs do meanwhile. If a target is about elapsed time (throughput, pings), the table also
shows the processor time.
"""

import contextlib
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._harness import (
    FIRST_CORE,
    HERE,
    LAST_CORE,
    BenchError,
    Row,
    Table,
    child,
    compiled,
    expect,
    output_of,
    processor_time,
    wait_ready,
)
from ._stream import stream

PINGS = 1000  # in a turn
SECONDS = 0.2  # of each stream

Turn = Callable[[], tuple[float, ...]]


@dataclass(frozen=True)
class Figure:
    """One of the numbers that a turn returns."""

    name: str
    unit: str
    target: float | None = None
    at_least: bool = False


@dataclass(frozen=True)
class Program:
    """A program that runs on each checkout: each side's turns in a run, and the table's title."""

    turns: int
    what: str


WORKER = Program(20, "processor time of 84-byte packets, with the C module")
PYTHON = Program(20, "processor time of 84-byte packets, without the C module")
FORWARDER = Program(10, f"a TCP stream of {SECONDS:g} s through forward.py")
RESPONDER = Program(10, f"{PINGS} flood pings, one at a time, to ping_responder.py")


@dataclass(frozen=True)
class Case:
    """What a turn does, and the numbers it returns. `word` tells the program what to do."""

    program: Program
    word: str
    figures: Sequence[Figure]


def cost(target: float | None) -> Figure:
    return Figure("", "ns/packet", target)


SENT = Figure("packets to the kernel", "packets")
PASSED = (Figure("throughput", "Gbit/s", 1.0, at_least=True), Figure("processor", "ms/GB"))
ANSWERED = (Figure("mean", "us", 1.0), Figure("p99", "us", 1.0), Figure("processor", "us/ping"))

# In these cases a task waits for each packet. In the others, the packets are queued beforehand.
WAKES = ("wake", "wake-many", "split-wake", "split-wake-many")
OFF = {
    "recv": [cost(1.02)],
    "async-for": [cost(1.02)],
    "recv_many": [cost(1.02)],
    "send": [cost(1.02), SENT],
    "send_many": [cost(1.02), SENT],
}
CASES = {
    **{name: Case(WORKER, name, figures) for name, figures in OFF.items()},
    **{name: Case(WORKER, name, [cost(None)]) for name in WAKES},
    "split-recv": Case(WORKER, "split-recv", [cost(0.7)]),
    "split-send_many": Case(WORKER, "split-send_many", [cost(None), SENT]),
    "split-four-flows": Case(WORKER, "split-four-flows", [cost(0.5), SENT]),
    "split-no-merge": Case(WORKER, "split-no-merge", [cost(1.1), SENT]),
    "captured": Case(WORKER, "captured", [cost(0.25), SENT]),
    **{f"python-{name}": Case(PYTHON, name, figures) for name, figures in OFF.items()},
    "forward-split": Case(FORWARDER, "split", PASSED),
    "forward-raw": Case(FORWARDER, "raw", PASSED),
    "ping": Case(RESPONDER, "", ANSWERED),
}
"""The cases by name. Cases of the same program are next to each other."""


class Side:
    """One of the two checkouts, with its programs. Each program starts when it is first needed."""

    def __init__(
        self, checkout: Path, number: int, loop: str, stack: contextlib.ExitStack, netns: str
    ) -> None:
        self._checkout = checkout
        self._number = number
        self._loop = loop
        self._stack = stack
        self._netns = netns
        self._workers: dict[Program, subprocess.Popen[str]] = {}

    def turn(self, case: Case) -> Turn:
        """Start the program for a case, and return the function that takes a turn."""
        if case.program is FORWARDER:
            return self._forward(case.word)
        if case.program is RESPONDER:
            return self._ping()
        return self._work(case.program, case.word)

    def _start(
        self, *program: str, core: int | None = None, speedups: str = "require"
    ) -> "subprocess.Popen[str]":
        python = self._checkout / ".venv" / "bin" / "python"
        source = self._checkout / "src"
        process = self._stack.enter_context(
            child(
                "env",
                f"PYTHONPATH={source}",
                f"AIOTUN_SPEEDUPS={speedups}",
                str(python) if python.exists() else sys.executable,
                *program,
                core=core,
                stdin=subprocess.PIPE,
            )
        )
        wait_ready(process)
        return process

    def _work(self, program: Program, word: str) -> Turn:
        python = program is PYTHON
        if program not in self._workers:
            # Each worker of each side has its own device.
            number = self._number + (2 if python else 0)
            worker = self._start(
                str(HERE / "beside_worker.py"),
                str(number),
                self._loop,
                core=LAST_CORE,
                speedups="forbid" if python else "require",
            )
            wanted = self._checkout / "src" / "aiotun" / "__init__.py"
            assert worker.stdout is not None
            expect("aiotun that was imported", worker.stdout.readline().strip(), str(wanted))
            self._workers[program] = worker
        worker = self._workers[program]

        def turn() -> tuple[float, ...]:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{word}\n")
            worker.stdin.flush()
            said = worker.stdout.readline().split()
            if not said:
                raise BenchError(f"the worker of {self._checkout} ended in {word}")
            return tuple(map(float, said))

        return turn

    def _forward(self, offload: str) -> Turn:
        subnet = f"10.{90 if offload == 'split' else 91}.{self._number}"
        devices = f"near{offload}{self._number}", f"far{offload}{self._number}"
        program = str(HERE / "forward.py"), offload, self._netns, *devices, subnet, self._loop
        process = self._start(*program)

        def turn() -> tuple[float, ...]:
            before = processor_time(process.pid)
            received, elapsed = stream(f"{subnet}.2", SECONDS)
            used = processor_time(process.pid) - before
            return received * 8 / elapsed / 1e9, used * 1e3 / (received / 1e9)

        return turn

    def _ping(self) -> Turn:
        net, example = f"10.79.{self._number}", HERE.parent / "examples" / "ping_responder.py"
        program = str(example), "--name", f"ping{self._number}", "--address", f"{net}.1/24"
        uvloop = ["--uvloop"] if self._loop == "uvloop" else []
        process = self._start(*program, *uvloop, core=LAST_CORE)
        pinger = str(compiled("pinger.c"))

        def turn() -> tuple[float, ...]:
            before = processor_time(process.pid)
            with child(pinger, f"{net}.2", str(PINGS), core=FIRST_CORE) as running:
                mean, p99, lost = output_of(running).split()
            used = processor_time(process.pid) - before
            expect("pings lost", int(lost), 0)
            return int(mean) / 1000, int(p99) / 1000, used * 1e6 / PINGS

        return turn


def medians(sides: Sequence[Turn], count: int) -> list[list[float]]:
    """Take turns; return the medians of each side. The first turn of each is not counted."""
    turns: list[list[tuple[float, ...]]] = [[] for _ in sides]
    for number in range(count + 1):
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for side in order:
            turns[side].append(sides[side]())
    return [[statistics.median(each) for each in zip(*t[1:], strict=True)] for t in turns]


def rows_of(name: str, runs: Sequence[Sequence[Sequence[float]]]) -> list[Row]:
    """Return the other checkout's figures of a case, each followed by ours.

    `runs` has the sides of each run, ours first, and the numbers of each side.
    """
    rows = []
    for index, figure in enumerate(CASES[name].figures):
        what = f"{name}: {figure.name}" if figure.name else name
        ours, theirs = ([run[side][index] for run in runs] for side in (0, 1))
        rows.append(Row(f"{what} (other)", figure.unit, theirs))
        rows.append(Row(what, figure.unit, ours, theirs, 50, figure.target, figure.at_least))
    return rows


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """Another network namespace, with the receiver of the streams; gives its path."""
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    with child(*command, sys.executable, str(HERE / "_stream.py")) as process:
        wait_ready(process)
        yield f"/proc/{process.pid}/ns/net"


def run(
    runs: int, loops: Sequence[str], other: Path | None = None, names: Sequence[str] = ()
) -> Iterator[Table]:
    """Run the named cases, or all; yield a table for each program and loop."""
    if other is None or not (other / "src" / "aiotun").is_dir():
        raise BenchError(f"{other} is not a checkout of aiotun; give one with '--other DIR'")
    for name in names:
        if name not in CASES:
            raise BenchError(
                f"unknown case {name!r} for 'beside'; the cases are {', '.join(CASES)}"
            )
    checkouts = HERE.parent, other.resolve()
    for loop in loops:
        for program, group in itertools.groupby(names or CASES, lambda n: CASES[n].program):
            cases = list(group)
            samples: dict[str, list[list[list[float]]]] = {name: [] for name in cases}
            for _ in range(runs):
                with sink() as netns, contextlib.ExitStack() as stack:
                    sides = [
                        Side(checkout, number, loop, stack, netns)
                        for number, checkout in enumerate(checkouts)
                    ]
                    for name in cases:
                        turns = [side.turn(CASES[name]) for side in sides]
                        samples[name].append(medians(turns, program.turns))
            rows = [row for name in cases for row in rows_of(name, samples[name])]
            yield Table("beside", loop, program.what, rows)
