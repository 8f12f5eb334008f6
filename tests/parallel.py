"""Two threads call the functions of the C module at once: python -m tests.parallel [SECONDS]

A program, because a free-threaded CPython may lack what the tests need. Each thread compares the
results with those of the Python twins. Meanwhile a third thread changes the lists and the buffers
that they use. Prints a line and exits with 0, or with a traceback and 1.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
import sysconfig
import threading
import time
from typing import TYPE_CHECKING

from aiotun._packets import gso, native
from aiotun.offload import GsoType, VnetHeader

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["run"]


def _packets(version: int, udp: bool, size: int, count: int = 30) -> list[bytes]:
    """Consecutive packets of one flow, each with a payload of `size` bytes."""
    ip = 20 if version == 4 else 40
    payload = random.Random(size).randbytes(size * count)
    transport = struct.pack("!HH", 1000, 2000)
    if udp:
        transport += struct.pack("!HH", 8 + len(payload), 0)
        kind, place = GsoType.UDP_L4, 6
    else:
        transport += struct.pack("!IIBBHHH", 1, 7, 0x50, 0x10, 500, 0, 0)
        kind, place = GsoType.TCPV4 if version == 4 else GsoType.TCPV6, 16
    length, protocol = len(transport) + len(payload), socket.IPPROTO_UDP if udp else 6
    if version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0x4000, 64, protocol, 0) + bytes(8)
    else:
        head = struct.pack("!IHBB", 6 << 28, length, protocol, 64) + bytes(32)
    pseudo = head[12:20] if version == 4 else head[8:40]
    pseudo += struct.pack("!IHH", length, 0, protocol)
    seed = 0xFFFF - gso.checksum(pseudo)
    transport = transport[:place] + struct.pack("!H", seed) + transport[place + 2 :]
    header = VnetHeader(1, kind, ip + len(transport), size, ip, place)
    return gso.split(header.pack() + head + transport + payload, False)


class _Shared:
    """What the threads use together."""

    def __init__(self) -> None:
        chance = random.Random(23)
        self.packets: list[list[bytes]] = []
        for version in (4, 6):
            for size in (40, 1200):
                self.packets += [_packets(version, udp, size) for udp in (False, True)]
        self.merged = [gso.merge(packets, False) for packets in self.packets]
        self.sums = [gso.checksum(packets[0], 7) for packets in self.packets]
        self.noise = [chance.randbytes(chance.randrange(200)) for _ in range(100)]
        self.list: list[Buffer] = [b"packet"] * 20
        self.buffer = bytearray(self.merged[0][0])
        self.stop = False
        self.calls = 0


def _changing(shared: _Shared) -> None:
    """Change the list and the buffer, until the others are done."""
    chance = random.Random(5)
    whole = bytes(shared.buffer)
    while not shared.stop:
        shared.list.append(chance.randbytes(100))
        if len(shared.list) > 40:
            del shared.list[chance.randrange(20) :]
        with contextlib.suppress(BufferError):  # it is in use
            shared.buffer[chance.randrange(len(whole))] = chance.randrange(256)
        if chance.random() < 0.1:
            shared.buffer[:] = whole


def _calling(shared: _Shared, seconds: float, seed: int) -> None:
    chance = random.Random(seed)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    until = time.monotonic() + seconds
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        fd, other = ours.fileno(), theirs.fileno()
        while time.monotonic() < until:
            which = chance.randrange(len(shared.packets))
            packets, merged = shared.packets[which], shared.merged[which]
            assert native.merge(packets, False) == merged
            assert [each for whole in merged for each in native.split(whole, False)] == packets
            assert native.checksum(packets[0], 7) == shared.sums[which]
            assert not native.write_merged(other, packets, False)
            assert native.read_split(fd, False, len(packets)) == (packets, 0)
            for whole in merged:
                assert native.write_many(other, [whole]) == 1
                assert native.read(fd, 65_581) == whole
            written = native.write_many(other, shared.list)
            got = native.read_many(fd, 65_581, written) if written else []
            assert len(got) == written
            for call in (native.split, lambda data, _: native.merge([data], False)):
                with contextlib.suppress(ValueError):
                    call(shared.buffer, False)
                with contextlib.suppress(ValueError):
                    call(chance.choice(shared.noise), False)
            shared.calls += 1


def run(seconds: float, threads: int = 2) -> int:
    """Run it, and return about how many rounds there were.

    Raises:
        AssertionError: a function gave a wrong result.
    """
    shared = _Shared()
    failed: list[BaseException] = []

    def caught(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    changing = threading.Thread(target=caught, args=[lambda: _changing(shared)])
    calling = [
        threading.Thread(target=caught, args=[lambda seed=seed: _calling(shared, seconds, seed)])
        for seed in range(threads)
    ]
    for thread in [changing, *calling]:
        thread.start()
    for thread in calling:
        thread.join()
    shared.stop = True
    changing.join()
    if failed:
        raise failed[0]
    return shared.calls


if __name__ == "__main__":
    rounds = run(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sysconfig.get_config_var("Py_GIL_DISABLED") and locked:
        sys.exit("something has switched the interpreter's lock on again")
    print(f"{rounds} rounds, C module: {native.SPEEDUPS}, interpreter's lock: {locked}")
