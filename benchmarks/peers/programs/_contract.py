"""What each program of this folder does, in each language: PROGRAM [OPTIONS] MODE NAME...

It opens TUN devices with the given names, and prints `ready NAME`. The program that started it sets
addresses, MTU, queue length and state. The modes:

    echo NAME         answers each ping, forever
    forward NEAR FAR  forwards packets between two devices, both ways, forever
    read NAME         for each line `COUNT` on stdin: reads that many packets, which wait in the
                      ring, and prints the nanoseconds that this took
    write NAME        for each line `COUNT HEX`: writes that packet COUNT times, and prints the
                      nanoseconds
    open NAME         for each line `COUNT`: COUNT times, opens the device with ADDRESS/24 and MTU,
                      brings it up and closes it, by the library's own means only; prints the
                      nanoseconds of an opening and of a closing
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

ADDRESS = "10.79.0.1"
NETMASK = "255.255.255.0"
MTU = 1400
READ_SIZE = 65535


class Device(Protocol):
    """The device of a blocking library. A packet has the type that the library uses."""

    def read(self) -> Any: ...
    def write(self, packet: Any, /) -> object: ...


def arguments() -> tuple[str, list[str]]:
    """Return the mode and the names."""
    return sys.argv[1], sys.argv[2:]


def ready(name: str) -> None:
    print(f"ready {name}", flush=True)


def orders() -> Iterator[list[str]]:
    """Yield the words of each line on stdin."""
    for line in sys.stdin:
        yield line.split()


def tell(*numbers: int) -> None:
    print(*numbers, flush=True)


def answer(packet: bytes) -> bytes | None:
    """Return the reply to a ping, handwritten."""
    if len(packet) < 28 or packet[0] != 0x45 or packet[9] != 1 or packet[20] != 8:
        return None
    checksum = (packet[22] << 8 | packet[23]) + 0x0800  # the type falls from 8 to 0
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    start = packet[:12] + packet[16:20] + packet[12:16]
    return start + b"\0\0" + checksum.to_bytes(2, "big") + packet[24:]


def same(packet: bytes) -> Any:
    return packet


def opened_often(count: int, open_: Callable[[], Callable[[], object]]) -> tuple[int, int]:
    """Return the nanoseconds of opening and closing; `open_` returns the function that closes."""
    opening = closing = 0
    for _ in range(count):
        start = time.perf_counter_ns()
        close = open_()
        between = time.perf_counter_ns()
        close()
        opening += between - start
        closing += time.perf_counter_ns() - between
    return opening // count, closing // count


def serve(
    open_: Callable[[str], Device],
    *,
    reply: Callable[[Any], Any] = answer,
    make: Callable[[bytes], Any] = same,
    configured: Callable[[str], Callable[[], object]] | None = None,
) -> None:
    """Run any mode with a blocking library."""
    mode, names = arguments()
    if mode == "open":
        if configured is None:
            raise SystemExit("this library sets no address")
        ready(names[0])
        for (count,) in orders():
            tell(*opened_often(int(count), lambda: configured(names[0])))
        return
    devices = [open_(name) for name in names]
    ready(names[0])
    device = devices[0]
    if mode == "echo":
        echo(device, reply)
    elif mode == "forward":
        threads = [threading.Thread(target=pump, args=pair) for pair in (devices, devices[::-1])]
        for thread in threads:
            thread.start()
    elif mode == "read":
        for (count,) in orders():
            tell(read_all(device, int(count)))
    elif mode == "write":
        for count, text in orders():
            tell(write_all(device, make(bytes.fromhex(text)), int(count)))


def echo(device: Device, reply: Callable[[Any], Any]) -> None:
    while True:
        answered = reply(device.read())
        if answered is not None:
            device.write(answered)


def pump(source: Device, target: Device) -> None:
    while True:
        packet = source.read()
        try:
            target.write(packet)
        except OSError as error:  # the device is down until it is set up
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)


def read_all(device: Device, count: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(count):
        device.read()
    return time.perf_counter_ns() - start


def write_all(device: Device, packet: Any, count: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(count):
        device.write(packet)
    return time.perf_counter_ns() - start
