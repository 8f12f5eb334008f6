"""A bridge with examples/dhcp_server.py on it, and simulated clients that send raw frames."""

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from ..helpers import ip
from . import kernel
from .programs import Program, example, example_module, running

messages = example_module("_dhcp_message")
frames = example_module("_dhcp_frames")
Message, Opt, Type = messages.Message, messages.Opt, messages.Type

SERVER = IPv4Address("10.85.0.1")
SERVER_MAC = b"\x02\x00" + SERVER.packed
NOBODY, EVERYBODY = IPv4Address(0), IPv4Address("255.255.255.255")
ALL = b"\xff" * 6
NETWORK = ["--address", f"{SERVER}/24", "--range", "10.85.0.10-10.85.0.249"]
_ETH_P_IP = 0x0800
_PACKET_OUTGOING = 4  # if_packet.h


def add_bridge(name: str = "br0") -> None:
    # Without multicast snooping, whose queries would disturb the tests.
    ip("link", "add", name, "up", "type", "bridge", "mcast_snooping", "0")


@contextlib.contextmanager
def serving(*more: str, network: list[str] = NETWORK) -> Iterator[Program]:
    """Run the server on br0, which must exist."""
    words = ["--bridge", "br0", "--name", "dhcp0", *network, *more]
    with running(example("dhcp_server.py", *words), "ready dhcp0") as program:
        yield program


def counters(program: Program) -> dict[str, int]:
    """End the server and return its counters."""
    (*_, line) = [line for line in program.end() if line.startswith("counters")]
    words = line.split()[1:]
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


@contextlib.contextmanager
def host(name: str = "eth0", bridge: str = "br0") -> Iterator[str]:
    """Make a namespace with a wire into the bridge, and yield its path."""
    with kernel.another_namespace() as place:
        ip("link", "add", f"{name}p", "up", "master", bridge, "type", "veth", "peer", "name", name)
        ip("link", "set", name, "netns", place.split("/")[2])
        kernel.inside(place, "ip", "link", "set", name, "up")
        yield place


class Wire:
    """Any number of clients behind one wire into the bridge."""

    def __init__(self) -> None:
        ip("link", "add", "c0p", "up", "master", "br0", "type", "veth", "peer", "name", "c0")
        ip("link", "set", "c0", "up")
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_IP))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.sock.bind(("c0", 0))
        self.sock.settimeout(10)

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, message: Any, to: IPv4Address = EVERYBODY, sender: bytes | None = None) -> None:
        target = ALL if to == EVERYBODY else SERVER_MAC
        macs = (sender or message.chaddr, target)
        port = 67 if message.giaddr != NOBODY else 68
        self.sock.send(frames.udp(macs, (message.ciaddr, to), (port, 67), message.pack(1)))

    def frame(self) -> bytes:
        """The server's next frame that has an answer in it."""
        while True:
            frame, (_, _, kind, _, _) = self.sock.recvfrom(2048)
            if kind != _PACKET_OUTGOING and frame[34:36] == b"\0\x43":
                return frame

    def answer(self) -> Any:
        return Message.parse(self.frame()[42:], 2)

    def ask(self, message: Any, to: IPv4Address = EVERYBODY) -> Any:
        self.send(message, to)
        answer = self.answer()
        assert answer.xid == message.xid
        return answer

    def lease(self, mac: bytes) -> IPv4Address:
        """Get an address for a client, from discover to acknowledgement."""
        offer = self.ask(Message(Type.DISCOVER, 1, mac))
        assert offer.type is Type.OFFER
        answer = self.ask(request(mac, offer.yiaddr))
        assert (answer.type, answer.yiaddr) == (Type.ACK, offer.yiaddr)
        return IPv4Address(answer.yiaddr)


def request(mac: bytes, address: IPv4Address, xid: int = 2) -> Any:
    """The message of a client that accepts an offer."""
    options = {Opt.SERVER: SERVER.packed, Opt.REQUESTED_ADDRESS: address.packed}
    return Message(Type.REQUEST, xid, mac, options=options)


def mac_of(number: int) -> bytes:
    return b"\x02\x01\x00\x00" + number.to_bytes(2, "big")


def lease_many(wire: Wire, count: int) -> dict[bytes, IPv4Address]:
    """Get addresses for many clients at once; clients that get no answer ask again."""
    macs = [mac_of(number) for number in range(count)]
    found: dict[bytes, IPv4Address] = {}
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        for mac in macs:
            if mac not in found:
                wire.send(Message(Type.DISCOVER, 1, mac))
        quiet = time.monotonic() + 2
        while len(found) < count and time.monotonic() < quiet:
            if not select.select([wire.sock], [], [], 0.1)[0]:
                continue
            answer = wire.answer()
            if answer.type is Type.OFFER:
                wire.send(request(answer.chaddr, answer.yiaddr))
            else:
                assert answer.type is Type.ACK
                found[answer.chaddr] = answer.yiaddr
    return found


def renewals(
    wire: Wire, leases: dict[bytes, IPv4Address], rate: int, count: int
) -> tuple[float, list[float]]:
    """Renew leases in turn, at this rate a second, with at most 200 requests unanswered.

    Returns:
        The answers per second, and how long each took in seconds, sorted.
    """
    asked = [
        frames.udp(
            (mac, SERVER_MAC),
            (address, SERVER),
            (68, 67),
            Message(Type.REQUEST, 0, mac, ciaddr=address).pack(1),
        )
        for mac, address in leases.items()
    ]
    # Without a checksum, so that the number can be changed in place.
    asked = [frame[:40] + b"\0\0" + frame[42:] for frame in asked]
    sent: dict[int, float] = {}
    took: list[float] = []
    start = last = time.monotonic()
    number = 0
    wire.sock.setblocking(False)
    while len(took) < count and time.monotonic() < start + count / rate + 20:
        due = min(count, int((time.monotonic() - start) * rate) + 1, len(took) + 200)
        while number < due:
            frame = asked[number % len(asked)]
            sent[number] = time.monotonic()
            wire.sock.send(frame[:46] + number.to_bytes(4, "big") + frame[50:])
            number += 1
        select.select([wire.sock], [], [], 0.0005)
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = wire.frame()
                last = time.monotonic()
                # 53, 1, 5: an acknowledgement.
                assert frame[282:285] == b"\x35\1\5"
                took.append(last - sent.pop(int.from_bytes(frame[46:50], "big")))
    wire.sock.settimeout(10)
    return len(took) / (last - start), sorted(took)


def hook(folder: Path) -> Path:
    """Write a script that sets the address for udhcpc and dhclient, and does nothing else.

    The scripts that come with them write /etc/resolv.conf, which belongs to the machine.
    """
    script = folder / "hook"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1$reason" in\n'
        "bound|BOUND|REBOOT)\n"
        '    ip addr add "${ip:-$new_ip_address}/24" dev eth0 ;;\n'
        "deconfig|RELEASE|EXPIRE) ip addr flush dev eth0 ;;\n"
        "esac\n"
        'echo "hook $1$reason ${ip:-$new_ip_address} ${router:-$new_routers}"\n'
    )
    script.chmod(0o755)
    return script
