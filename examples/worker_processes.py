#!/usr/bin/env python3
"""Answers pings in several processes, each with a queue of one TUN device.

    sudo python examples/worker_processes.py --name tun0 --address 10.0.0.1/24 --workers 4

The kernel spreads flows over the queues. This process holds all of them, and serves none: when a
worker dies it answers what still waits in the worker's queue, disables the queue, so that the
kernel gives its flows to the others, and starts another worker, with which the queue is enabled
again. (What comes in the instant between the last answer and that is lost, as in a full queue.) Of
each worker a line on stderr tells the process.

Prints "ready NAME" when all workers serve. On SIGTERM and SIGINT the kernel is told to send nothing
more (the carrier is off), the workers answer what waits, and all is closed. If this process is
killed, its workers do the same.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Coroutine
from ipaddress import IPv4Interface, IPv6Interface
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from _service import Networks, addresses_of, echo, loop_factory, on_signals, parser, run_main

import aiotun

PATIENCE = 10.0  # seconds for a worker to begin, and to answer what waits at the end

Addresses = list[IPv4Interface | IPv6Interface]

# A new interpreter for each worker: a fork would have this process's event loop in it.
spawn = multiprocessing.get_context("spawn")


# --- A worker ------------------------------------------------------------------------------------


def work(queue: aiotun.Queue, addresses: Addresses, parent: Connection, uvloop: bool) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all: wait for ours
    with asyncio.Runner(loop_factory=loop_factory(uvloop)) as runner:
        runner.run(serve_queue(queue, Networks(addresses), parent))


async def serve_queue(queue: aiotun.Queue, networks: Networks, parent: Connection) -> None:
    """Answer until the parent closes its end, ends, or a SIGTERM comes; then answer the rest."""
    serving = asyncio.create_task(answer_all(queue, networks))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, serving.cancel)
    loop.add_reader(parent.fileno(), serving.cancel)
    parent.send_bytes(b"ready")
    # A cancelled task has taken no packet: all that it leaves is there.
    with contextlib.suppress(asyncio.CancelledError, aiotun.DeviceLostError):
        await serving
    loop.remove_reader(parent.fileno())
    answer_rest(queue, networks)
    await queue.aclose()


async def answer_all(queue: aiotun.Queue, networks: Networks) -> None:
    async for packet in queue:
        answer(queue, packet, networks)


def answer_rest(queue: aiotun.Queue, networks: Networks) -> None:
    """Answer what waits in the queue, and don't wait for more."""
    with contextlib.suppress(BlockingIOError, aiotun.DeviceLostError):
        while True:
            answer(queue, queue.recv_nowait(), networks)


def answer(queue: aiotun.Queue, packet: bytes, networks: Networks) -> None:
    reply = echo(packet, networks)
    if reply is not None:
        try:
            # Without waiting: a task that is cancelled while it sends would lose the answer.
            queue.send_nowait(reply)
        except (aiotun.LinkDownError, aiotun.PacketError, BlockingIOError) as error:
            say(f"an answer could not be sent: {error}")


# --- Their parent --------------------------------------------------------------------------------


class WorkerError(aiotun.AiotunError):
    """A worker can't even begin: then another one can't either."""


class Parent:
    """Keeps a worker at each queue of a device."""

    def __init__(self, tun: aiotun.TunDevice, addresses: Addresses, uvloop: bool) -> None:
        self.tun = tun
        self.addresses = addresses
        self.networks = Networks(addresses)
        self.uvloop = uvloop
        self.missing = len(tun.queues)  # workers that have not begun yet
        self.stopping = asyncio.Event()

    def stop(self) -> None:
        if not self.stopping.is_set():
            self.tun.set_carrier(False)
            self.stopping.set()

    async def serve(self) -> None:
        await asyncio.gather(
            *(self.keep(place, queue) for place, queue in enumerate(self.tun.queues))
        )

    async def keep(self, place: int, queue: aiotun.Queue) -> None:
        """Have a worker at this queue, until the end."""
        while not self.stopping.is_set():
            ours, theirs = spawn.Pipe()
            args = (queue, self.addresses, theirs, self.uvloop)
            worker = spawn.Process(target=work, args=args, daemon=True)
            worker.start()
            theirs.close()
            with ours:
                await self.begin(place, worker, ours)
                if queue.disabled:
                    queue.enable()
                await first(readable(worker.sentinel), self.stopping.wait())
            # Our end of the connection is closed: where the worker lives, it answers the rest.
            try:
                await asyncio.wait_for(readable(worker.sentinel), PATIENCE)
            except TimeoutError:
                worker.kill()
            worker.join()
            answer_rest(queue, self.networks)
            if not self.stopping.is_set():
                queue.disable()
                say(f"worker {place} ended with status {worker.exitcode}")
            worker.close()

    async def begin(self, place: int, worker: SpawnProcess, ours: Connection) -> None:
        """Wait until it serves."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(readable(ours.fileno()), PATIENCE)
        try:
            if not ours.poll():
                raise EOFError
            ours.recv_bytes()
        except (EOFError, OSError):
            raise WorkerError(f"worker {place} could not begin") from None
        say(f"worker {place} is process {worker.pid}")
        self.missing -= 1
        if self.missing == 0:
            print(f"ready {self.tun.name}", flush=True)


async def readable(fd: int) -> None:
    """Wait until there is something to read, or the other end is closed."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


async def first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for one of them, and cancel the others."""
    tasks = [asyncio.create_task(each) for each in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 256):
        raise argparse.ArgumentTypeError("a device has 1 to 256 queues, each for a worker")
    return int(text)


def start(args: argparse.Namespace) -> int:
    addresses = addresses_of(args)
    try:
        opener = aiotun.open_tun(
            args.name, addresses=addresses, queues=args.workers, multi_queue=True
        )
    except ValueError as error:
        say(f"{sys.argv[0]}: {error}")
        return 2

    async def main() -> None:
        async with opener as tun:
            parent = Parent(tun, addresses, args.uvloop)
            on_signals(parent.stop)
            await parent.serve()

    return run_main(main, args.uvloop)


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument(
        "--workers", type=count, default=2, metavar="N", help="how many (default: %(default)s)"
    )
    sys.exit(start(command.parse_args()))
