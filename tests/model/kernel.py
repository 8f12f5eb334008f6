"""What the model does to the kernel by itself, in the thread's namespace; none of it aiotun's."""

import contextlib
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Counters",
    "counters",
    "delete",
    "flags_up",
    "move",
    "poll",
    "reads",
    "rename",
    "slow_bridge",
]

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFNAME, _IFF_UP = 0x8913, 0x8914, 0x8923, 1  # sockios.h, if.h
_RTM_DELLINK, _RTM_SETLINK, _REQUEST_AND_ACK, _NET_NS_FD = 17, 19, 5, 28  # rtnetlink.h, if_link.h


class Counters(NamedTuple):
    """Of an interface, from its own point of view: rx is what the program sent."""

    rx_bytes: int
    rx_packets: int
    tx_packets: int
    tx_dropped: int


def counters(name: str) -> Counters | None:
    """What the kernel counts, or None where there is no such interface here."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        label, _, numbers = line.partition(":")
        if label.strip() == name:
            values = [int(each) for each in numbers.split()]
            return Counters(values[0], values[1], values[9], values[11])
    return None


def reads() -> int:
    """How many system calls that read this thread has made."""
    text = Path("/proc/thread-self/io").read_text()
    return int(text.partition("syscr: ")[2].split()[0])


def poll(fd: int, events: int = select.POLLIN) -> bool:
    """Whether the kernel says that an fd can be read (or what `events` says) right now."""
    poller = select.poll()
    poller.register(fd, events)
    return any(found & events for _, found in poller.poll(0))


def _ioctl(request: int, data: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, request, data)


def flags_up(name: str, up: bool) -> None:
    """Bring an interface up or down, as anybody with the privilege might."""
    (flags,) = struct.unpack_from(
        "H", _ioctl(_SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0)), 16
    )
    flags = flags | _IFF_UP if up else flags & ~_IFF_UP
    _ioctl(_SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags))


def rename(old: str, new: str) -> None:
    _ioctl(_SIOCSIFNAME, struct.pack("16s16s8x", old.encode(), new.encode()))


def delete(index: int) -> None:
    _request(_RTM_DELLINK, index)


def move(index: int, netns: int) -> None:
    _request(_RTM_SETLINK, index, struct.pack("=HHi", 8, _NET_NS_FD, netns))


def _request(kind: int, index: int, attributes: bytes = b"") -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attributes
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST_AND_ACK, 1, 0) + body)
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
        if code != 0:
            raise OSError(-code, os.strerror(-code))


def quiet() -> None:
    """Keep the namespace's IPv6 quiet, and its addresses when a link goes down."""
    for where in ("all", "default"):
        for key, value in (("accept_dad", "0"), ("router_solicitations", "0"),
                           ("addr_gen_mode", "1"), ("keep_addr_on_down", "1"),
                           ("forwarding", "0")):  # fmt: skip
            with contextlib.suppress(OSError):
                Path(f"/proc/sys/net/ipv6/conf/{where}/{key}").write_text(value)


@contextlib.contextmanager
def slow_bridge() -> Iterator[bool]:
    """Make br0 with a slow port, the only way to have a send wait; False where tools are missing.

    The other end of that port is v1, where the kernel has its addresses.
    """
    ip, tc = shutil.which("ip"), shutil.which("tc")
    if ip is None or tc is None:
        yield False
        return
    lines = [
        "link add br0 type bridge mcast_snooping 0",
        "link set br0 up",
        "link add v0 type veth peer name v1",
        "link set v1 address 02:00:00:00:00:0a",
        "link set v0 master br0 up",
        "link set v1 up",
        "addr add 10.8.0.1/24 dev v1",
        "addr add fd08::1/64 dev v1 nodad",
        "neigh add 10.8.0.2 lladdr 02:00:00:00:00:09 dev v1 nud permanent",
        "neigh add fd08::2 lladdr 02:00:00:00:00:09 dev v1 nud permanent",
    ]
    for line in lines:
        subprocess.run([ip, *line.split()], check=True, capture_output=True)
    shape = "qdisc add dev v0 root tbf rate 100mbit burst 20000 limit 10000000"
    subprocess.run([tc, *shape.split()], check=True, capture_output=True)
    try:
        yield True
    finally:
        for name in ("v0", "br0"):
            subprocess.run([ip, "link", "del", name], check=False, capture_output=True)


def ipv6_usable(name: str) -> bool:
    """Whether the interface's IPv6 addresses have come through duplicate address detection."""
    rows = [
        line.split() for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
    ]
    return all(not int(flags, 16) & 0x40 for *_, flags, where in rows if where == name)
