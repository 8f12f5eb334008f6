"""Threads that call the C module, and event loops in threads with a queue each of one device.

With a free-threaded Python they run at once (`make test-free-threaded`).
"""

import asyncio
import contextlib
import socket
import struct

import aiotun
from aiotun import Queue

from .. import parallel
from .rig import OURS, PORT, THEIRS, udp

COUNT = 100  # a socket's buffer holds about 250 datagrams


def test_threads_that_call_the_c_module_at_once_get_right_results() -> None:
    assert parallel.run(0.5) > 0


async def _echo(queue: Queue) -> None:
    """Send COUNT packets back to where they came from."""
    done = 0
    async for packet in queue:
        (port,) = struct.unpack_from("!H", packet, 20)
        await queue.send(udp(THEIRS, PORT, OURS, port, packet[28:]))
        done += 1
        if done == COUNT:
            return


async def test_two_loops_in_two_threads_have_a_queue_each_of_one_device() -> None:
    factory = type(asyncio.get_running_loop())

    def serve(queue: Queue) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_echo(queue))

    async with contextlib.AsyncExitStack() as stack:
        tun = await stack.enter_async_context(
            aiotun.open_tun("p0", addresses=[f"{OURS}/24"], queues=2, txqueuelen=COUNT)
        )
        socks = []
        for queue in tun.queues:
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((OURS, 0))
            sock.connect((THEIRS, PORT))
            # The kernel gives a flow's packets to the queue that the flow came from.
            queue.send_nowait(udp(THEIRS, PORT, OURS, sock.getsockname()[1]))
            sock.recv(1)
            socks.append(sock)
        threads = [asyncio.to_thread(serve, queue) for queue in tun.queues]
        served = asyncio.gather(*threads)
        for place in range(COUNT):
            for sock in socks:
                sock.send(struct.pack("!I", place))
                if place % 50 == 49:
                    await asyncio.sleep(0)
        await served
        for sock in socks:
            sock.setblocking(False)
            got = [struct.unpack("!I", sock.recv(9))[0] for _ in range(COUNT)]
            assert got == list(range(COUNT))
    assert tun.closed
