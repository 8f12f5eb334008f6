"""Linux guests under QEMU: a lease from dhcp_server.py, pings, and 20 MB each way.

They run in software emulation, so that any machine can run them: booting takes about ten seconds.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..helpers import ip
from . import dhcp, kernel
from .guest import HOST, Exchange, guest
from .programs import Program, example, running

pytestmark = [pytest.mark.peers, pytest.mark.timeout(240)]

MAC = "02:00:00:00:00:77"
CARD = f"virtio-net-pci,netdev=net,mac={MAC}"


@pytest.fixture
def host() -> Iterator[Exchange]:
    """A bridge with the DHCP server and the host's end of the guest's transfers."""
    dhcp.add_bridge()
    ip("addr", "add", f"{HOST}/24", "dev", "br0")
    with dhcp.serving("--probe", "0.1"), Exchange() as exchange:
        yield exchange


def check(program: Program, exchange: Exchange, queues: int = 1) -> None:
    """Check each step of the guest."""
    program.expect("guest: lease 10.85.0.10", 120)
    program.expect("guest: pinged", 30)
    program.expect(f"guest: queues {queues}")
    program.expect(f"guest: digest {exchange.digest}", 60)
    program.expect("guest: done", 60)
    program.wait(seconds=30)
    assert exchange.taken == [exchange.digest]


def test_a_tap_on_a_bridge(tmp_path: Path, host: Exchange) -> None:
    """qemu_bridge.py makes the TAP and joins it to the bridge; QEMU opens it by name."""
    bridge = running(example("qemu_bridge.py", "--bridge", "br0", "--tap", "q0"), "ready q0")
    devices = ["-netdev", "tap,id=net,ifname=q0,script=no,downscript=no", "-device", CARD]
    with bridge as program, guest(tmp_path, devices) as machine:
        check(machine, host)
        program.end()
    assert "q0" not in kernel.names()


async def open_queues(count: int, address: str | None = None) -> list[int]:
    """Open a TAP with virtio-net headers, on the bridge or not; return the fds of its queues."""
    options: dict[str, Any] = {"addresses": [address]} if address else {"bridge": "br0"}
    async with aiotun.open_tap("q0", queues=count, offload="raw", **options) as tap:
        return [queue.detach() for queue in tap.queues]


@pytest.mark.parametrize("count", [1, 2])
def test_a_guest_uses_queues_passed_as_fds(tmp_path: Path, host: Exchange, count: int) -> None:
    """QEMU opens no device, and the guest leaves segmentation to the kernel."""
    fds = asyncio.run(open_queues(count))
    numbers = ":".join(str(fd) for fd in fds)
    many = f",mq=on,vectors={2 * count + 2}" if count > 1 else ""
    devices = ["-netdev", f"tap,id=net,fds={numbers}", "-device", CARD + many]
    with contextlib.ExitStack() as ours:
        for fd in fds:
            ours.callback(os.close, fd)
        with guest(tmp_path, devices, fds) as machine:
            ours.close()  # QEMU has its own copies
            assert kernel.tun_data("q0")["multi_queue"] == (count > 1)
            check(machine, host, count)
    assert "q0" not in kernel.names()  # it was deleted when QEMU ended


def test_a_port_of_the_switch(tmp_path: Path, host: Exchange) -> None:
    """virtual_switch.py connects QEMU's socket with a TAP on the bridge."""
    path = tmp_path / "switch"
    words = ["--port", "tap:sw0", "--port", f"unix:{path}"]
    netdev = f"stream,id=net,server=off,addr.type=unix,addr.path={path}"
    with running(example("virtual_switch.py", *words), "ready") as switch:
        ip("link", "set", "sw0", "master", "br0")
        with guest(tmp_path, ["-netdev", netdev, "-device", CARD]) as machine:
            check(machine, host)
        (line, _) = switch.end()[-2:]
    assert "malformed 0" in line


# --- How fast ------------------------------------------------------------------------------------

PIECE = 20_000_000
SEND = f"""
for net in 1 2; do
    ip addr add 10.87.$net.2/24 dev eth$((net - 1))
    ip link set eth$((net - 1)) up
done
dd if=/dev/zero of=/data bs=1000000 count={PIECE // 1_000_000} 2>/dev/null
for net in 1 2; do nc 10.87.$net.1 5003 < /data; done
echo "guest: done"
"""


def test_a_guest_leaves_segmentation_to_the_kernel(tmp_path: Path) -> None:
    """On a passed TAP as on one that QEMU opened itself, because segmentation decides the speed.

    One guest with a card on each sends through both. The time and the number of packets depend on
    the machine's load, but some packets must be larger than the MTU.
    """
    kernel.make("q1", "tap")
    fds = asyncio.run(open_queues(1, "10.87.1.1/24"))
    ip("addr", "add", "10.87.2.1/24", "dev", "q1")
    ip("link", "set", "q1", "up")
    devices = ["-netdev", f"tap,id=net,fds={fds[0]}", "-device", CARD]
    devices += ["-netdev", "tap,id=net1,ifname=q1,script=no,downscript=no"]
    devices += ["-device", "virtio-net-pci,netdev=net1"]
    with contextlib.ExitStack() as ours:
        ours.callback(os.close, fds[0])
        server = ours.enter_context(socket.create_server(("", 5003)))
        server.settimeout(120)
        machine = ours.enter_context(guest(tmp_path, devices, fds, SEND))
        for name in ("q0", "q1"):
            with Largest(name) as largest:
                sock, _ = server.accept()
                with sock:
                    assert count_bytes(sock) == PIECE
            assert largest.bytes > 2 * 1500
        machine.expect("guest: done", 60)
        machine.wait(seconds=30)


def count_bytes(sock: socket.socket) -> int:
    """Count the bytes until the end of the stream."""
    return sum(len(data) for data in iter(lambda: sock.recv(1 << 18), b""))


class Largest:
    """Watches an interface during the block; `bytes` is the length of the largest frame."""

    def __init__(self, name: str) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(0x0800))
        self._socket.bind((name, 0x0800))
        self._socket.settimeout(0.1)
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Largest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _watch(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                self.bytes = max(self.bytes, len(self._socket.recv(1 << 17)))
