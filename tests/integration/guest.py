"""A Linux guest for QEMU: Debian's kernel, and an initramfs with busybox and our script."""

import contextlib
import gzip
import hashlib
import lzma
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from .. import cpio
from ..helpers import need
from . import dhcp
from .programs import Program, running

HOST = "10.85.0.2"  # on the bridge
SIZE = 20_000_000  # bytes each way
_SEND, _TAKE = 5001, 5002  # TCP's ports on the host

# The modules of the network card, each after the modules that it needs.
_MODULES = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
]

_PREPARE = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for name in @MODULES@; do insmod /$name; done
"""

_HOOK = """#!/bin/sh
if [ "$1" = bound ]; then
    ip addr add "$ip/24" dev "$interface"
    echo "guest: lease $ip"
fi
"""

# The guest sends back what it received, so all digests must be equal.
EXCHANGE = f"""
ip link set eth0 up
udhcpc -i eth0 -n -q -t 20 -T 1 -s /hook || echo "guest: no lease"
ping -c 3 -W 5 {dhcp.SERVER} | grep -q "3 packets received" && echo "guest: pinged"
echo "guest: queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
nc {HOST} {_SEND} > /data
echo "guest: digest $(sha256sum < /data)"
nc {HOST} {_TAKE} < /data
echo "guest: done"
"""


def _paths() -> tuple[str, Path, Path]:
    """Find QEMU, a kernel and its modules; skip the test if one of them is missing."""
    qemu = need("qemu-system-x86_64")
    for kernel in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        modules = Path("/lib/modules", kernel.name.removeprefix("vmlinuz-"), "kernel")
        if any(modules.glob(f"{_MODULES[-1]}*")):
            return qemu, kernel, modules
    pytest.skip("missing: a kernel for guests; install linux-image-cloud-amd64")


def _module(modules: Path, name: str) -> bytes:
    """Read a module, which Debian may compress."""
    (path,) = modules.glob(f"{name}*")
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def initramfs(script: str) -> bytes:
    """Make an archive of busybox, the modules, and a script that is the only process."""
    busybox = Path(need("busybox"))
    if b"/lib64/ld-linux" in busybox.read_bytes()[:4096]:
        pytest.skip("missing: a busybox without libraries; install busybox-static")
    _, _, modules = _paths()
    names = [Path(each).name for each in _MODULES]
    init = _PREPARE.replace("@MODULES@", " ".join(names)) + script + "poweroff -f\n"
    directories = [cpio.entry(name, b"", 0o040755) for name in ("bin", "dev", "proc", "sys")]
    files = [
        cpio.entry("bin/busybox", busybox.read_bytes(), 0o100755),
        cpio.entry("init", init.encode(), 0o100755),
        cpio.entry("hook", _HOOK.encode(), 0o100755),
        *(cpio.entry(Path(each).name, _module(modules, each), 0o100644) for each in _MODULES),
    ]
    archive = b"".join([*directories, *files, cpio.END])
    return gzip.compress(archive, 1)


@contextlib.contextmanager
def guest(
    folder: Path,
    devices: Sequence[str],
    fds: Sequence[int] = (),
    script: str = EXCHANGE,
    cpus: int = 2,
) -> Iterator[Program]:
    """Boot a guest; its console is the output."""
    qemu, kernel, _ = _paths()
    image = folder / "initramfs"
    image.write_bytes(initramfs(script))
    command = [qemu, "-accel", "tcg", "-smp", str(cpus), "-m", "256", "-nodefaults"]
    command += [
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
        "-kernel",
        str(kernel),
        "-initrd",
        str(image),
    ]
    command += ["-append", "console=ttyS0 quiet panic=-1", *devices]
    with running(command, pass_fds=fds) as program:
        yield program


class Exchange:
    """The host's side of a guest's transfers, on the bridge: sends to it and receives from it."""

    def __init__(self) -> None:
        self.data = random.Random(20).randbytes(SIZE)
        self.digest = hashlib.sha256(self.data).hexdigest()
        self.taken: list[str] = []
        self._servers = [socket.create_server((HOST, port)) for port in (_SEND, _TAKE)]
        # The sockets are made in this thread's namespace. A thread for each accepts connections
        # until the socket is shut down.
        self._threads = [
            threading.Thread(target=self._serve, args=[server, serve])
            for server, serve in zip(self._servers, (self._send, self._take), strict=True)
        ]

    def __enter__(self) -> "Exchange":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown(socket.SHUT_RDWR)
            server.close()
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _serve(server: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with contextlib.suppress(OSError):  # the guest has gone, or the socket was shut down
            while True:
                sock, _ = server.accept()
                with sock:
                    serve(sock)

    def _send(self, sock: socket.socket) -> None:
        sock.sendall(self.data)

    def _take(self, sock: socket.socket) -> None:
        digest = hashlib.sha256()
        while data := sock.recv(1 << 16):
            digest.update(data)
        self.taken.append(digest.hexdigest())
