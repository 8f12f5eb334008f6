"""slirp4netns and passt, which forward a TAP's connections, with the code of migrating.md.

The TAP is in another namespace than its program and slirp4netns or passt, as it is in a container.
"""

import asyncio
import contextlib
import hashlib
import os
import types
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest

import aiotun

from ..documents import blocks_of
from ..helpers import ROOT, ip, need, wait_until
from .programs import running

pytestmark = pytest.mark.peers

HOST, GATEWAY = "10.0.2.100", "10.0.2.2"  # slirp4netns's addresses
SIZE = 10_000_000


@pytest.fixture(scope="module")
def page() -> types.ModuleType:
    """The functions of the page."""
    path = ROOT / "docs" / "how-to" / "migrating.md"
    module = types.ModuleType("user_mode")
    blocks = [block for block in blocks_of(path) if "async def through_" in block.text]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.text, str(path), "exec"), module.__dict__)
    return module


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """A server on this namespace's loopback, which returns the digest of what it reads, and data.

    slirp4netns and passt connect to it when the TAP's host connects to its gateway.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not until the end: Debian 12's passt does not pass on what follows a half-close.
        writer.write(hashlib.sha256(await reader.readexactly(SIZE)).digest())
        writer.write(bytes(range(250)) * (SIZE // 250))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def use(
    through: Callable[[aiotun.TapDevice, str], Coroutine[None, None, None]], path: str
) -> None:
    """Upload and download through the gateway; the frames pass through `through`."""
    sent = os.urandom(SIZE)
    async with (
        serving() as port,
        aiotun.new_namespace() as ns,
        aiotun.open_tap(
            "tap0", netns=ns, addresses=[f"{HOST}/24"], routes=[f"default via {GATEWAY}"]
        ) as tap,
    ):
        moving = asyncio.create_task(through(tap, path))
        try:
            reader, writer = await asyncio.wait_for(ns.open_connection(GATEWAY, port), 10)
            with contextlib.closing(writer):
                writer.write(sent)
                got = await asyncio.wait_for(reader.read(), 30)
            assert got[:32] == hashlib.sha256(sent).digest()
            assert got[32:] == bytes(range(250)) * (SIZE // 250)
        finally:
            moving.cancel()
            await asyncio.wait([moving])
        assert moving.cancelled()
        stats = await tap.link.stats()
        # Both directions went through the device, in frames.
        assert min(stats.rx_bytes, stats.tx_bytes) > SIZE


async def test_slirp4netns_and_a_tap(page: types.ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slirp"
    command = [need("slirp4netns"), "--target-type=bess", str(path)]
    with running(command):
        await wait_until(path.exists)
        await use(page.through_slirp4netns, str(path))


async def test_passt_and_a_tap(page: types.ModuleType, tmp_path: Path) -> None:
    passt = need("passt")
    # passt starts only where an interface has a default route.
    ip("link", "add", "outside", "type", "veth", "peer", "name", "far")
    for name in ("outside", "far"):
        ip("link", "set", name, "up")
    ip("addr", "add", "192.0.2.1/24", "dev", "outside")
    ip("route", "add", "default", "via", "192.0.2.254")
    path = tmp_path / "passt"
    command = [passt, "--foreground", "--stderr", "--ipv4-only", "--socket", str(path)]
    command += ["--address", HOST, "--netmask", "24", "--gateway", GATEWAY]
    command += ["--runas", "0"]  # another user can't make a socket in the folder of the test
    with running(command):
        await wait_until(path.exists)
        await use(page.through_passt, str(path))
