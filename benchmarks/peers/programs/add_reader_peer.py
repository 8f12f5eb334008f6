"""No library: `loop.add_reader` and one `os.read` in each callback, as people write it by hand."""

import asyncio
import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable

from ._contract import READ_SIZE, answer, arguments, orders, ready, tell

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


def open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def passes_on(source: int, target: int) -> Callable[[], None]:
    def on_readable() -> None:
        os.write(target, os.read(source, READ_SIZE))

    return on_readable


async def main() -> None:
    mode, names = arguments()
    fds = [open_tun(name) for name in names]
    loop = asyncio.get_running_loop()
    if mode == "echo":

        def on_readable() -> None:
            answered = answer(os.read(fds[0], READ_SIZE))
            if answered is not None:
                os.write(fds[0], answered)

        loop.add_reader(fds[0], on_readable)
    elif mode == "forward":
        for source, target in (fds, fds[::-1]):
            loop.add_reader(source, passes_on(source, target))
    elif mode in ("read", "write"):
        ready(names[0])
        for count, *packet in orders():
            if packet:
                tell(write_all(fds[0], bytes.fromhex(packet[0]), int(count)))
            else:
                tell(await read_all(fds[0], int(count)))
        return
    ready(names[0])
    await loop.create_future()


def write_all(fd: int, packet: bytes, count: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(count):
        os.write(fd, packet)
    return time.perf_counter_ns() - start


async def read_all(fd: int, count: int) -> int:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int] = loop.create_future()
    left = count

    def on_readable() -> None:
        nonlocal left
        os.read(fd, READ_SIZE)
        left -= 1
        if left == 0:
            loop.remove_reader(fd)
            done.set_result(time.perf_counter_ns())

    start = time.perf_counter_ns()
    loop.add_reader(fd, on_readable)
    return await done - start


if __name__ == "__main__":
    if sys.argv[1] == "--uvloop":
        del sys.argv[1]
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
