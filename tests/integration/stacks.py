"""Two stacks and what joins them; none of it uses aiotun's own relay."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiotun
from aiotun._netstack import diag, nftables

CLIENT = ["10.77.0.2/24", "fd77::2/64"]


def force_mechanism(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have stacks intercept in this way; skip the test if the kernel can't."""
    if name == "tproxy":
        try:
            nftables.intercept("ask0", [])
        except nftables.NoTproxyError as error:
            pytest.skip(f"this kernel can't: {error}")
        nftables.remove("ask0")
    monkeypatch.setenv("AIOTUN_NETSTACK", name)


def need_resets() -> None:
    """Skip the test if the kernel can't reset connections (no INET_DIAG_DESTROY)."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    with (
        socket.socket(socket.AF_NETLINK, kind, diag.FAMILY) as sock,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
    ):
        try:
            diag.destroy(sock, diag.connections(sock))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            pytest.skip("this kernel has no SOCK_DESTROY")


async def carry(source: aiotun.PacketIO, target: aiotun.PacketIO) -> None:
    """Move packets one way until either is closed."""
    with contextlib.suppress(aiotun.DeviceClosedError):
        async for batch in source.batches():
            await target.send_many(batch)


@contextlib.asynccontextmanager
async def joined(one: aiotun.PacketIO, other: aiotun.PacketIO) -> AsyncIterator[None]:
    """Move packets both ways for as long as the block runs."""
    tasks = [asyncio.create_task(carry(one, other)), asyncio.create_task(carry(other, one))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def client_of(stack: aiotun.Netstack, **options: Any) -> AsyncIterator[aiotun.Netstack]:
    """Give a stack whose whole Internet is the other stack."""
    options = {"addresses": CLIENT, "offload": stack.tun.offload, **options}
    async with aiotun.open_netstack(**options) as client, joined(stack.tun, client.tun):
        yield client
