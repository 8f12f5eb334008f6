"""A host and its Internet, for `aiotun run`: the command, servers, name servers.

The network of the tests' namespace is the command's "host". Another namespace, at the other end of
a cable, is the Internet.
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import dpkt
import pytest

import aiotun

from ..commandline import COMMAND
from ..helpers import ip, need

HOST4, NET4 = "203.0.113.1", "203.0.113.2"
HOST6, NET6 = "2001:db8:113::1", "2001:db8:113::2"


@pytest.fixture(name="internet")
async def internet_fixture() -> AsyncIterator[aiotun.Namespace]:
    """A namespace that is the host's default gateway, and everything behind it."""
    async with aiotun.new_namespace(rootless=False) as there:
        ip("link", "add", "wan0", "type", "veth", "peer", "name", "lan0")
        await aiotun.Link("lan0").move_to_netns(there)
        here, far = aiotun.Link("wan0"), aiotun.Link("lan0", netns=there)
        for link, addresses in ((here, (HOST4, HOST6)), (far, (NET4, NET6))):
            await link.add_address(f"{addresses[0]}/24")
            ip_nodad = f"{addresses[1]}/64"
            await link.add_address(ip_nodad)
            await link.up()
        await here.add_route("default", via=NET4)
        await here.add_route("::/0", via=NET6)
        yield there


class Ended:
    """What a command has said, and its status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


async def outcome(*command: str, **options: Any) -> Ended:
    """Run a command, while this loop serves it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    try:
        async with asyncio.timeout(40):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def run(*words: str, command: Sequence[str] = COMMAND, **options: Any) -> Ended:
    """Run `aiotun run WORDS`, while this loop serves it."""
    return await outcome(*command, "run", *words, **options)


async def python(code: str, *words: str, **options: Any) -> Ended:
    """Run Python code inside."""
    return await run(*words, "--", sys.executable, "-c", code, **options)


@contextlib.asynccontextmanager
async def echo_server(there: aiotun.Namespace, host: str, port: int = 80) -> AsyncIterator[None]:
    """Answer each line that a client sends, until it has no more."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

    async with await there.start_server(echo, host, port):
        yield


CONNECT = """
import socket, sys
with socket.create_connection(({host!r}, {port}), 10) as s:
    s.sendall(b'hello')
    s.shutdown(socket.SHUT_WR)
    print(s.makefile().read())
"""


class NameServer(asyncio.DatagramProtocol):
    """Knows one name, and counts the questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = dpkt.dns.DNS(data)
        answer.qr = 1
        name, kind = answer.qd[0].name, answer.qd[0].type
        self.asked.append(name)
        if kind == dpkt.dns.DNS_A:
            record = dpkt.dns.DNS.RR(name=name, type=kind, cls=1, ttl=1)
            record.rdata = record.ip = socket.inet_aton(NET4)
            answer.an = [record]
        answer.ar = []
        self._transport.sendto(bytes(answer), addr)


def with_resolv_conf(path: Path, text: str) -> list[str]:
    """Words before a command that has another /etc/resolv.conf."""
    path.write_text(text)
    script = 'mount --bind "$0" "$(realpath /etc/resolv.conf)" && exec "$@"'
    return [need("unshare"), "-m", "sh", "-c", script, str(path)]
