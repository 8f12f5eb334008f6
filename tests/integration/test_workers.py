"""Queues in other processes: by multiprocessing, and as plain fds."""

import asyncio
import contextlib
import copy
import fcntl
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_sharer
import os
import pickle
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

import aiotun
from aiotun import Queue
from aiotun._kernel.abi import Iff, Ioctl
from aiotun.testing import memory_pair

from ..helpers import ROOT
from .kernel import link, names, tun_data
from .rig import OURS, PORT, THEIRS, udp
from .test_examples import (
    EXAMPLES,
    LOOPS,
    Pinger,
    Service,
    check_failure,
    run,
    start,
    wait_for_state,
)
from .test_from_fd import raw_open

# An address that no socket here has, so packets to it reach the device.
GREETING = udp(THEIRS, PORT, OURS, 4242, b"from there")


def answer_one(queue: Queue, connection: Connection) -> None:
    """In the other process: receive a packet, send one, and report the queue's attributes."""

    async def main() -> None:
        async with queue:
            packet = await asyncio.wait_for(queue.recv(), 10)
            header = bytes(2) + b"\x08\x00"
            await queue.send(header[: queue._header_bytes] + GREETING)
            fd = queue.fileno()
            seen = (os.get_blocking(fd), os.get_inheritable(fd), queue.name, queue.offload)
            connection.send((packet, seen, queue.disabled, queue._header_bytes))

    asyncio.run(main())


def answer_one_sent(connection: Connection) -> None:
    answer_one(connection.recv(), connection)


def send(data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, (THEIRS, PORT))


@pytest.fixture
def greeted() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 4242))
        sock.settimeout(10)
        yield sock


@pytest.mark.parametrize("way", ["spawn", "forkserver", "connection"])
@pytest.mark.parametrize("packet_info", [False, True])
async def test_a_queue_sent_by_multiprocessing_works_in_the_child(
    way: str, packet_info: bool, greeted: socket.socket
) -> None:
    context: Any = multiprocessing.get_context("spawn" if way == "connection" else way)
    async with aiotun.open_tun(
        "sent0", queues=2, addresses=[f"{OURS}/24"], packet_info=packet_info
    ) as tun:
        first, queue = tun.queues
        queue.disable()
        queue.enable()
        first.disable()  # so that all packets come to the other
        ours, theirs = context.Pipe()
        with ours, theirs:
            if way == "connection":
                process = context.Process(target=answer_one_sent, args=(theirs,))
                process.start()
                ours.send(queue)
            else:
                process = context.Process(target=answer_one, args=(queue, theirs))
                process.start()
            send(b"hello")
            packet, seen, disabled, header = await asyncio.to_thread(ours.recv)
            await asyncio.to_thread(process.join)
        assert packet.endswith(b"hello")
        assert seen == (False, False, "sent0", "off")
        assert (disabled, header) == (False, 4 * packet_info)
        assert process.exitcode == 0
        process.close()
        assert greeted.recv(100) == b"from there"
        # Our queue is still open.
        send(b"again")
        assert (await asyncio.wait_for(queue.recv(), 5)).endswith(b"again")
    if way == "connection":
        multiprocessing.resource_sharer.stop(timeout=5)
    elif way == "forkserver":
        forkserver: Any = multiprocessing.forkserver
        forkserver._forkserver._stop()
    assert names() == []


async def test_a_disabled_raw_queue_is_sent_with_its_state(greeted: socket.socket) -> None:
    context = multiprocessing.get_context("spawn")
    async with aiotun.open_tun("sent0", queues=2, addresses=[f"{OURS}/24"], offload="split") as tun:
        tun.queues[1].disable()
        ours, theirs = context.Pipe()
        with ours, theirs:
            for queue in tun.queues[1], tun.queues[0]:
                process = context.Process(target=tell, args=(queue, theirs))
                process.start()
                offload, disabled = await asyncio.to_thread(ours.recv)
                await asyncio.to_thread(process.join)
                process.close()
                assert (offload, disabled) == ("split", queue.disabled)
        assert await asyncio.to_thread(greeted.recv, 100) == b"from there"


async def test_with_a_virtio_header_of_12_bytes() -> None:
    fd = raw_open("sent0", Iff.TUN | Iff.NO_PI | Iff.VNET_HDR)
    fcntl.ioctl(fd, Ioctl.TUNSETVNETHDRSZ, struct.pack("i", 12))
    context = multiprocessing.get_context("spawn")
    async with Queue.from_fd(fd, offload="raw") as queue:
        ours, theirs = context.Pipe()
        with ours, theirs:
            process = context.Process(target=tell_sizes, args=(queue, theirs))
            process.start()
            assert await asyncio.to_thread(ours.recv) == (12, 12)
            await asyncio.to_thread(process.join)
            process.close()


def tell_sizes(queue: Queue, connection: Connection) -> None:
    connection.send((queue.vnet_header_size, queue._header_bytes))
    queue.close()


def tell(queue: Queue, connection: Connection) -> None:
    queue.send_nowait(GREETING)
    connection.send((queue.offload, queue.disabled))
    queue.close()


async def test_queues_are_pickled_by_multiprocessing_only() -> None:
    """Bytes of other picklers may be stored or sent to another machine."""
    slow_dumps: Any = getattr(pickle, "_dumps")  # noqa: B009 - the one in Python; it has no type
    one, other = memory_pair()
    async with one, other:
        (queue,) = one.queues
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy, slow_dumps):
            with pytest.raises(TypeError, match=r"multiprocessing.*socket\.send_fds"):
                attempt(queue)
        with pytest.raises(TypeError):
            pickle.dumps(one)
    with pytest.raises(aiotun.DeviceClosedError):
        pickle.dumps(queue)


def child_of_a_socket(number: int) -> None:
    """In the other process: receive a queue from a socket, and answer a packet."""
    with socket.socket(fileno=number) as sock:
        _, fds, _, _ = socket.recv_fds(sock, 10, 1)

        async def main() -> None:
            async with aiotun.TunDevice.from_fd(*fds) as tun:
                await asyncio.wait_for(tun.recv(), 10)
                await tun.send(GREETING)

        asyncio.run(main())


async def test_a_queue_sent_by_send_fds_works_in_the_child(greeted: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    async with aiotun.open_tun("sent0", addresses=[f"{OURS}/24"]) as tun:
        code = "from tests.integration.test_workers import child_of_a_socket as f; f(%d)"
        with ours, theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "error", "-c", code % theirs.fileno()),
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
            socket.send_fds(ours, [b"q"], [tun.fileno()])
        await tun.aclose()
        assert names() == ["sent0"]  # the other process holds it
        send(b"hello")
        assert await asyncio.to_thread(greeted.recv, 100) == b"from there"
        assert await process.wait() == 0
    assert names() == []


# --- The example ---------------------------------------------------------------------------------

WORKERS = "worker_processes.py"
ADDRESSES = [f"10.81.0.{place}" for place in range(2, 34)]


def line(service: Service) -> str:
    assert service.process.stderr is not None
    return service.process.stderr.readline()


def pids(service: Service, count: int) -> dict[int, int]:
    """Read stderr until this many workers have started; return their pids."""
    found: dict[int, int] = {}
    while len(found) < count:
        said = line(service)
        match = re.fullmatch(r"worker (\d+) is process (\d+)\n", said)
        assert match, said
        found[int(match[1])] = int(match[2])
    return found


@contextlib.contextmanager
def served(workers: int, *options: str) -> Iterator[tuple[Service, dict[int, int], Pinger]]:
    address = ("--name", "ex0", "--address", "10.81.0.1/24")
    with (
        start(WORKERS, *address, "--workers", str(workers), *options) as service,
        Pinger(4) as pinger,
    ):
        yield service, pids(service, workers), pinger


def answers(pinger: Pinger, asked: list[int]) -> bool:
    """Whether exactly these are answered, in any order."""
    return sorted(pinger.answer() for _ in asked) == sorted(asked)


@LOOPS
def test_workers_share_the_flows(loop: list[str]) -> None:
    with served(3, *loop) as (service, found, pinger):
        assert len(set(found.values())) == 3
        assert answers(pinger, [pinger.ask(address) for address in ADDRESSES * 4])
        # Each worker serves some flows, so it answers some pings while it runs alone.
        for pid in found.values():
            os.kill(pid, signal.SIGSTOP)
        asked = [pinger.ask(address) for address in ADDRESSES]
        for pid in found.values():
            os.kill(pid, signal.SIGCONT)
            wait_for_state(pid, "S")
            asked.remove(pinger.answer())
            while pinger.is_answered():
                asked.remove(pinger.answer())
        assert asked == []
        assert service.end() == ""


@LOOPS
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_is_killed(workers: int, loop: list[str]) -> None:
    """The rest of its packets is answered, others serve its flows, and a new worker starts."""
    with served(workers, *loop) as (service, found, pinger):
        for place, pid in found.items():
            os.kill(pid, signal.SIGSTOP)
            asked = [pinger.ask(address) for address in ADDRESSES]
            os.kill(pid, signal.SIGKILL)
            assert answers(pinger, asked)
            assert line(service) == f"worker {place} ended with status -9\n"
            assert tun_data("ex0")["numdisabled"] == 1
            if workers > 1:
                assert answers(pinger, [pinger.ask(address) for address in ADDRESSES])
            (another,) = pids(service, 1).items()
            assert another[0] == place
            assert another[1] != pid
            # The queue is enabled just after that; then there are as many queues as before.
            deadline = time.monotonic() + 5
            while tun_data("ex0")["numqueues"] < workers:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert answers(pinger, [pinger.ask(address) for address in ADDRESSES])
        assert service.end() == ""


@LOOPS
def test_packets_already_queued_are_answered_before_the_end(loop: list[str]) -> None:
    """These packets wait in the workers' queues when the signal comes."""
    with served(2, *loop) as (service, found, pinger):
        for pid in found.values():
            os.kill(pid, signal.SIGSTOP)
        asked = [pinger.ask(address) for address in ADDRESSES * 5]
        service.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while "NO-CARRIER" not in link("ex0")["flags"]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for pid in found.values():
            os.kill(pid, signal.SIGCONT)
        assert answers(pinger, asked)
        assert service.end() == ""


def test_workers_end_with_their_parent() -> None:
    with served(2) as (service, found, _):
        service.process.kill()
        service.process.wait()
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{pid}") for pid in found.values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_worker_that_cannot_begin() -> None:
    """The service does not retry for ever: it prints one line and ends."""
    code = (
        "import multiprocessing, multiprocessing.resource_tracker, runpy, sys\n"
        "multiprocessing.resource_tracker.ensure_running()\n"
        "multiprocessing.set_executable('/bin/false')\n"
        "sys.path.insert(0, sys.argv[1].rpartition('/')[0])\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / WORKERS), "--name", "ex0"]
    done = run(WORKERS, args=command)
    check_failure(done, 1, "could not begin")
    assert names() == []


@pytest.mark.parametrize("number", ["0", "257", "-1", "two"])
def test_the_number_of_workers_is_1_to_256(number: str) -> None:
    check_failure(run(WORKERS, "--workers", number), 2, "1 to 256")
