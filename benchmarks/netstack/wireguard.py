"""A download through a proxy into a WireGuard tunnel, without root.

The other end of every tunnel is wireguard-go with a TUN device, in a namespace outside, and with it
the server. Nothing is pinned to a core, and all share the cores: so compare the figures with each
other, not with the speed of a line.
"""

import base64
import contextlib
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from .._contenders import Contender
from .._harness import BenchError, Row, Table, child, columns, in_turn, wait_ready
from ..peers._field import Program, ip
from ._contenders import WIREGUARD
from ._install import GO
from ._outside import FAR, Outside
from .programs._contract import BLOCK, SOURCE

NAMES = (WIREGUARD, f"{WIREGUARD}, uvloop", "wireguard-go's netstack")
MTU = 1420  # of the tunnels; the default of both
SECONDS = 1.0
TARGET = 1.5
DEVICE, PORT = "wg0", 51820  # outside
WITHIN = "10.92.0.1"  # the server's address in the tunnels


class Keys:
    def __init__(self) -> None:
        key = X25519PrivateKey.generate()
        self.private = key.private_bytes_raw()
        self.public = key.public_key().public_bytes_raw()


def configure(outside: Outside, server: Keys, clients: Sequence[Keys]) -> None:
    """Configure wireguard-go's device by its socket, and set it up."""
    lines = ["set=1", f"private_key={server.private.hex()}", f"listen_port={PORT}"]
    for number, client in enumerate(clients):
        lines += [f"public_key={client.public.hex()}", f"allowed_ip={address(number)}/32"]
    path = Path("/var/run/wireguard", f"{DEVICE}.sock")
    until = time.monotonic() + 10
    while not path.is_socket():
        if time.monotonic() > until:
            raise BenchError("wireguard-go did not start")
        time.sleep(0.02)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall("\n".join([*lines, "", ""]).encode())
        if b"errno=0" not in (answer := sock.recv(4096)):
            raise BenchError(f"wireguard-go refused its configuration: {answer!r}")
    ip(
        f"address add {WITHIN}/16 dev {DEVICE}",
        f"link set {DEVICE} mtu {MTU} up",
        netns=outside.netns,
    )


def address(number: int) -> str:
    return f"10.92.0.{2 + number}"


@dataclass(frozen=True)
class Proxy:
    program: Program
    port: int


def proxy(
    stack: contextlib.ExitStack, contender: Contender, number: int, server: Keys, own: Keys
) -> Proxy:
    """Start a contender's proxy. aiotun reads a file of wg-quick(8), the other its own text."""
    port = 1081 + number
    listen = f"127.0.0.1:{port}"
    if contender.peer == "aiotun":
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder, "wg.conf")
        private, public = (base64.b64encode(k).decode() for k in (own.private, server.public))
        path.write_text(
            f"[Interface]\nPrivateKey = {private}\nAddress = {address(number)}/32\n"
            f"MTU = {MTU}\n[Peer]\nPublicKey = {public}\nEndpoint = {FAR}:{PORT}\n"
            f"AllowedIPs = {WITHIN}/32\n"
        )
        command = [*contender.command, str(path), "--proxy", listen]
        text = ""
    else:
        command = [*contender.command, listen, address(number), str(MTU)]
        text = (
            f"private_key={own.private.hex()}\npublic_key={server.public.hex()}\n"
            f"endpoint={FAR}:{PORT}\nallowed_ip={WITHIN}/32\n"
        )
    process = stack.enter_context(child(*command, stdin=subprocess.PIPE))
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    wait_ready(process)
    return Proxy(Program(process, contender), port)


def download(at: Proxy) -> tuple[float, float]:
    """Return Gbit/s, and the program's processor time for each gigabyte in seconds."""
    name = at.program.contender.name
    buffer = bytearray(BLOCK)
    with socket.create_connection(("127.0.0.1", at.port), timeout=20) as sock:
        sock.sendall(b"\5\1\0\5\1\0\1" + socket.inet_aton(WITHIN) + struct.pack("!H", SOURCE))
        answer = b""
        while len(answer) < 12:
            if not (part := sock.recv(12 - len(answer))):
                raise BenchError(f"{name}: the proxy ended the connection")
            answer += part
        if answer[3]:
            raise BenchError(f"{name}: the proxy can't connect: {answer[3]}")
        count, cpu, start = 0, at.program.cpu, time.perf_counter()
        while (took := time.perf_counter() - start) < SECONDS:
            # With MSG_TRUNC, TCP drops the bytes instead of copying them.
            if not (got := sock.recv_into(buffer, BLOCK, socket.MSG_TRUNC)):
                raise BenchError(f"{name}: the download ended")
            count += got
        cost = at.program.cpu - cpu
    time.sleep(0.2)  # what is still on its way must not disturb the next
    return count * 8 / took / 1e9, cost / count * 1e9


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        # wireguard-go's socket is in /run. There must be only ours.
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", "/run"], check=True)
        outside = Outside(stack)
        server, clients = Keys(), [Keys() for _ in contenders]
        outside.enter("sh", "-c", f"exec {GO / 'wireguard'} -f {DEVICE} 2>/dev/null")
        configure(outside, server, clients)
        proxies = {
            each.name: proxy(stack, each, number, server, own)
            for number, (each, own) in enumerate(zip(contenders, clients, strict=True))
        }
        cases = {name: partial(download, each) for name, each in proxies.items()}
        speeds, costs = columns(in_turn(cases, runs))
    rows = [
        Row(f"{name}, MTU {MTU}", "Gbit/s", found, cost=costs[name])
        for name, found in speeds.items()
    ]
    theirs = NAMES[-1]
    rows += [
        Row(f"{ours} / {theirs}", "Gbit/s", speeds[ours], speeds[theirs], 50, TARGET, True)
        for ours in NAMES[:-1]
        if ours in speeds and theirs in speeds
    ]
    yield Table("netstack", "all", "one download through a proxy into a WireGuard tunnel", rows)
