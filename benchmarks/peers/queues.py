"""Several queues of one device, drained by one process and by several.

Each ring is first filled, with a flow that the kernel assigns to it. Then all processes start at
the same time. The time until the last process has drained its rings is measured, once without work
in Python and once with some work for each packet. Without work, the processes only make system
calls; several processes are meant for the case with work.
"""

import asyncio
import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import aiotun

from .._contenders import Contender
from .._harness import BenchError, Row, Table, columns, expect, in_turn, run_on

NAMES = ("aiotun",)
PACKETS = 16_000  # of all queues together
WORK = 10  # microseconds a packet
# queues, processes
SHAPES = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4))


def work(turns: int) -> None:
    """Do a fixed amount of work. With a fixed time, a process without a core would do nothing."""
    for _ in range(turns):
        pass


def turns_of(microseconds: float) -> int:
    """Return how many loops take this long on an idle machine: the fastest of many tries."""
    if not microseconds:
        return 0
    probe = 20_000
    best = 1e9
    for _ in range(200):
        start = time.perf_counter_ns()
        work(probe)
        best = min(best, time.perf_counter_ns() - start)
    return round(probe * microseconds * 1000 / best)


async def drain(queue: aiotun.Queue, count: int, turns: int) -> None:
    left = count
    while left:
        for _ in await queue.recv_many(min(left, 64)):
            work(turns)
            left -= 1


async def drain_all(pipe: Connection, queues: Sequence[aiotun.Queue]) -> None:
    """Run in a process: for each order, drain the queues; answer with start, end and cost."""
    pipe.send("ready")
    while True:
        # Blocking is allowed here, because nothing else runs in this process.
        order: tuple[int, int] | None = await asyncio.to_thread(pipe.recv)
        if order is None:
            break
        count, turns = order
        start, cpu = time.monotonic_ns(), time.process_time_ns()
        await asyncio.gather(*(drain(queue, count, turns) for queue in queues))
        pipe.send((start, time.monotonic_ns(), time.process_time_ns() - cpu))
    for queue in queues:
        await queue.aclose()


def process(pipe: Connection, queues: Sequence[aiotun.Queue], number: int) -> None:
    # Two processes that wake up together may share one core for longer than they need to drain.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    run_on("asyncio", drain_all(pipe, queues))


@dataclass
class Shape:
    """A device whose queues are in other processes."""

    queues: int
    pipes: list[Connection]
    socks: list[socket.socket]  # a flow for each queue

    def drained(self, turns: int) -> tuple[float, float]:
        """Return packets a second, and the microseconds of processor time for each packet."""
        each = PACKETS // self.queues
        for sock in self.socks:
            for _ in range(each):
                sock.send(bytes(56))
        for pipe in self.pipes:
            pipe.send((each, turns))
        starts, ends, costs = zip(*map(_answer, self.pipes), strict=True)
        count = each * self.queues
        return count / (max(ends) - min(starts)) * 1e9, sum(costs) / count / 1000


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(30):
        raise BenchError("a process did not drain its queues")
    return pipe.recv()


async def flows(
    tun: aiotun.TunDevice, target: str, stack: contextlib.ExitStack
) -> list[socket.socket]:
    """Find, by trying, a socket for each queue whose packets the kernel puts into that queue."""
    found: dict[int, socket.socket] = {}
    for _ in range(200):
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.connect((target, 9))
        sock.send(bytes(56))
        for number, queue in enumerate(tun.queues):
            with contextlib.suppress(BlockingIOError):
                queue.recv_nowait()
                found.setdefault(number, sock)
        if len(found) == len(tun.queues):
            return [found[number] for number in range(len(tun.queues))]
    raise BenchError("found no flow for one of the queues")


async def shape(queues: int, processes: int, number: int, stack: contextlib.ExitStack) -> Shape:
    net = f"10.84.{number}"
    ring = PACKETS + 100  # more than needed, because the kernel frees slots several at a time
    tun = await aiotun.open_tun(
        f"tun{number}", addresses=[f"{net}.1/24"], queues=queues, txqueuelen=ring
    )
    try:
        socks = await flows(tun, f"{net}.2", stack)
        spawn = multiprocessing.get_context("spawn")
        pipes: list[Connection] = []
        share = queues // processes
        for first in range(0, queues, share):
            here, there = spawn.Pipe()
            part = list(tun.queues[first : first + share])
            child = spawn.Process(target=process, args=(there, part, len(pipes)), daemon=True)
            child.start()
            stack.callback(_end, child, here)
            there.close()
            pipes.append(here)
        for pipe in pipes:
            expect("a process", _answer(pipe), "ready")
    finally:
        await tun.aclose()  # the processes keep theirs open
    return Shape(queues, pipes, socks)


def _end(child: Any, pipe: Connection) -> None:
    with contextlib.suppress(OSError):
        pipe.send(None)
    child.join(5)
    child.kill()
    pipe.close()


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        shapes = {
            (queues, processes): run_on("asyncio", shape(queues, processes, number, stack))
            for number, (queues, processes) in enumerate(SHAPES)
        }
        for microseconds in (0, WORK):
            turns = turns_of(microseconds)
            cases = {key: partial(each.drained, turns) for key, each in shapes.items()}
            speeds, costs = columns(in_turn(cases, runs))
            yield Table(
                "queues",
                "asyncio",
                f"filled rings drained, with {microseconds} us of Python work a packet",
                _rows(speeds, costs, microseconds > 0),
            )


Samples = Mapping[tuple[int, int], list[float]]


def _rows(samples: Samples, costs: Samples, targets: bool) -> list[Row]:
    one = samples[1, 1]
    rows = []
    for (queues, processes), values in samples.items():
        name = f"{queues} queue{'s' * (queues > 1)}, {processes} process{'es' * (processes > 1)}"
        base, cost = None if values is one else one, costs[queues, processes]
        rows.append(Row(name, "packets/s", values, base, cost=cost, cost_unit="us/packet"))
    if targets:
        name = "2 processes / 1, 2 queues"
        rows.append(Row(name, "packets/s", samples[2, 2], samples[2, 1], target=1.8, at_least=True))
    return rows
