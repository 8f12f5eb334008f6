"""Two event loops in two threads, each with a queue of one device, compared with one thread.

Every packet takes 10 microseconds of Python besides, as in a program that does something with it.
A thread that has to wait for the interpreter's lock gains nothing; a free-threaded Python should
take nearly twice as many packets.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import aiotun

from ._harness import BenchError, Row, Table, expect, interleave, run_on
from ._native import native

COUNT = 9984  # packets a queue
RING = 10240
WORK = 10e-6  # seconds a packet
OURS, THEIRS, PORT = "10.77.0.1", "10.77.0.2", 9


def _rounds() -> int:
    """How often the loop of `_receive` turns in WORK seconds."""
    rounds = 100_000
    best = min(_timed(rounds) for _ in range(20))
    return max(1, round(WORK / best * rounds))


def _timed(rounds: int) -> float:
    start = time.perf_counter()
    _work(rounds)
    return time.perf_counter() - start


def _work(rounds: int) -> int:
    total = 0
    for number in range(rounds):
        total += number
    return total


async def _receive(queue: aiotun.Queue, rounds: int) -> None:
    count = 0
    async for packet in queue:
        _work(rounds)
        count += 1
        if count == COUNT:
            expect(
                "number of the last packet", int.from_bytes(packet[28:32], sys.byteorder), COUNT - 1
            )
            return


def _request(sock: socket.socket) -> bytes:
    """A datagram to `sock`: the queue that sends it gets what the socket sends from then on."""
    source, target = (socket.inet_aton(each) for each in (THEIRS, OURS))
    head = bytes.fromhex("450000200000000040110000") + source + target
    total = sum(int.from_bytes(head[at : at + 2], "big") for at in range(0, 20, 2))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + (0xFFFF - total).to_bytes(2, "big") + head[12:]
    ports = PORT.to_bytes(2, "big") + int(sock.getsockname()[1]).to_bytes(2, "big")
    return head + ports + bytes.fromhex("000c0000") + b"here"


def _in_threads(run: Callable[[int], None], count: int) -> float:
    """Run a function in threads that begin at the same time; return the seconds until all ended."""
    failed: list[BaseException] = []
    barrier = threading.Barrier(count + 1)

    def main(number: int) -> None:
        barrier.wait()
        try:
            run(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    threads = [threading.Thread(target=main, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - start


def _in_processes(run: Callable[[int], None], count: int) -> float:
    """The same in processes: what two threads could reach at most, however busy the machine is."""
    wait, go = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(wait, 1)  # the end of the pipe
            try:
                run(number)
            except BaseException:  # noqa: BLE001 - its status says it
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(go)
    os.close(wait)
    start = time.perf_counter()
    statuses = [os.waitpid(child, 0)[1] for child in children]
    elapsed = time.perf_counter() - start
    expect("exit statuses of the processes", statuses, [0] * count)
    return elapsed


async def measure(loop: str, runs: int) -> Table:
    rounds = _rounds()
    async with contextlib.AsyncExitStack() as stack:
        tun = await stack.enter_async_context(
            aiotun.open_tun("bench0", addresses=[f"{OURS}/24"], queues=2, txqueuelen=RING)
        )
        socks = []
        for _ in tun.queues:
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((OURS, 0))
            sock.connect((THEIRS, PORT))
            socks.append(sock)
        fds = [os.dup(queue.fileno()) for queue in tun.queues]

        async def case(start: Callable[[Callable[[int], None], int], float], count: int) -> float:
            for sock, queue in zip(socks[:count], tun.queues, strict=False):
                await queue.send(_request(sock))
                sock.recv(100)
                native().fill(sock.fileno(), COUNT)

            def run(number: int) -> None:
                async def receive() -> None:
                    # A queue belongs to one loop, and each run has a new one.
                    async with aiotun.Queue.from_fd(os.dup(fds[number])) as queue:
                        await _receive(queue, rounds)

                run_on(loop, receive())

            return COUNT * count / start(run, count)

        try:
            cases = {
                "one thread": lambda: case(_in_threads, 1),
                "two threads": lambda: case(_in_threads, 2),
                "two processes": lambda: case(_in_processes, 2),
            }
            samples = await interleave(cases, runs)
        finally:
            for fd in fds:
                os.close(fd)
    free = not getattr(sys, "_is_gil_enabled", lambda: True)()
    if free and len(os.sched_getaffinity(0)) < 2:
        raise BenchError("two threads need two cores")
    one, two = samples["one thread"], samples["two threads"]
    target = 1.8 if free else None
    rows = [
        Row("one thread", "packets/s", one),
        Row("two threads", "packets/s", two, one, target=target, at_least=True),
        Row("two processes", "packets/s", samples["two processes"], one),
    ]
    lock = "no interpreter lock" if free else "the interpreter's lock"
    return Table("threads", loop, f"10 us of Python a packet, {lock}", rows)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    native()
    for loop in loops:
        yield run_on(loop, measure(loop, runs))
