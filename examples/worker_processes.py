#!/usr/bin/env python3
"""Answers pings in several processes, each with a queue of one TUN device.

    sudo python examples/worker_processes.py --name tun0 --address 10.0.0.1/24 --workers 4

The kernel spreads flows over the queues. This process holds all queues open and serves none. When a
worker dies, this process answers the packets that wait in the worker's queue, disables the queue so
that the kernel gives its flows to the others, and starts another worker, which enables the queue
again. (Packets that come between the last answer and disabling are lost, as in a full queue.) A
line on stderr names the process of each worker.

Prints "ready NAME" when all workers serve. On SIGTERM and SIGINT it turns the carrier off, so that
the kernel sends no more packets; the workers answer the packets that wait, and everything is
closed. If this process is killed, its workers do the same.
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

PATIENCE = 10.0  # seconds for a worker to start, and to answer the waiting packets at the end

Addresses = list[IPv4Interface | IPv6Interface]

# A new interpreter for each worker: a fork would inherit this process's event loop.
spawn = multiprocessing.get_context("spawn")


# --- A worker ------------------------------------------------------------------------------------


def work(queue: aiotun.Queue, addresses: Addresses, parent: Connection, uvloop: bool) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process
    with asyncio.Runner(loop_factory=loop_factory(uvloop)) as runner:
        runner.run(serve_queue(queue, Networks(addresses), parent))


async def serve_queue(queue: aiotun.Queue, networks: Networks, parent: Connection) -> None:
    """Answer packets until the parent closes its end or a SIGTERM comes; then answer the rest."""
    serving = asyncio.create_task(answer_all(queue, networks))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, serving.cancel)
    loop.add_reader(parent.fileno(), serving.cancel)
    parent.send_bytes(b"ready")
    # Cancelling the task loses no packet: the rest is still in the queue.
    with contextlib.suppress(asyncio.CancelledError, aiotun.DeviceLostError):
        await serving
    loop.remove_reader(parent.fileno())
    answer_rest(queue, networks)
    await queue.aclose()


async def answer_all(queue: aiotun.Queue, networks: Networks) -> None:
    async for packet in queue:
        answer(queue, packet, networks)


def answer_rest(queue: aiotun.Queue, networks: Networks) -> None:
    """Answer the packets that are in the queue now."""
    with contextlib.suppress(BlockingIOError, aiotun.DeviceLostError):
        while True:
            answer(queue, queue.recv_nowait(), networks)


def answer(queue: aiotun.Queue, packet: bytes, networks: Networks) -> None:
    reply = echo(packet, networks)
    if reply is not None:
        try:
            # Don't wait: a task that is cancelled while it waits to send would lose the answer.
            queue.send_nowait(reply)
        except (aiotun.LinkDownError, aiotun.PacketError, BlockingIOError) as error:
            say(f"an answer could not be sent: {error}")


# --- Their parent --------------------------------------------------------------------------------


class WorkerError(aiotun.AiotunError):
    """A worker can't start, so starting another one is useless."""


class Parent:
    """Keeps a worker running for each queue of a device."""

    def __init__(self, tun: aiotun.TunDevice, addresses: Addresses, uvloop: bool) -> None:
        self.tun = tun
        self.addresses = addresses
        self.networks = Networks(addresses)
        self.uvloop = uvloop
        self.missing = len(tun.queues)  # workers that have not started yet
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
        """Keep a worker running for this queue, until the end."""
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
            # Our end of the connection is closed now, so a live worker answers the rest and ends.
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
        """Wait until the worker serves."""
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
    """Wait until the fd is readable or its other end is closed."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


async def first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for one of the coroutines, and cancel the others."""
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
        raise argparse.ArgumentTypeError("there may be 1 to 256 workers, one for each queue")
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
        "--workers", type=count, default=2, metavar="N", help="workers (default: %(default)s)"
    )
    sys.exit(start(command.parse_args()))
