"""asyncssh's TUN transport: reads until no packet waits, and calls a protocol for each packet."""

import asyncio
import time
from collections.abc import Callable

from asyncssh.tuntap import SSH_TUN_MODE_POINTTOPOINT, SSHTunTapTransport, create_tuntap

from ._contract import answer, arguments, orders, ready, tell


class Receiver(asyncio.Protocol):
    """Calls a function for each packet."""

    def __init__(self) -> None:
        self.take: Callable[[bytes], object] = len

    def data_received(self, data: bytes) -> None:
        self.take(data)


def open_tun(name: str) -> tuple[SSHTunTapTransport, Receiver]:
    receiver = Receiver()
    unit = int(name.removeprefix("tun"))
    transport, _ = create_tuntap(lambda: receiver, SSH_TUN_MODE_POINTTOPOINT, unit)
    return transport, receiver


async def main() -> None:
    mode, names = arguments()
    opened = [open_tun(name) for name in names]
    transport, receiver = opened[0]
    if mode == "echo":

        def reply(packet: bytes) -> None:
            if (answered := answer(packet)) is not None:
                transport.write(answered)

        receiver.take = reply
    elif mode == "forward":
        (_, near), (other, far) = opened
        near.take, far.take = other.write, transport.write
        other.resume_reading()
    elif mode in ("read", "write"):
        ready(names[0])
        for count, *packet in orders():
            if packet:
                tell(write_all(transport, bytes.fromhex(packet[0]), int(count)))
            else:
                tell(await read_all(transport, receiver, int(count)))
        return
    transport.resume_reading()
    ready(names[0])
    await asyncio.get_running_loop().create_future()


def write_all(transport: SSHTunTapTransport, packet: bytes, count: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(count):
        transport.write(packet)
    return time.perf_counter_ns() - start


async def read_all(transport: SSHTunTapTransport, receiver: Receiver, count: int) -> int:
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    left = count

    def take(packet: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done.set_result(time.perf_counter_ns())

    receiver.take = take
    start = time.perf_counter_ns()
    transport.resume_reading()
    end = await done
    transport.pause_reading()
    return end - start


if __name__ == "__main__":
    asyncio.run(main())
