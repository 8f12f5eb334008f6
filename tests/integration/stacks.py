"""Two stacks and what joins them; none of it uses aiotun's own relay."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiotun

CLIENT = ["10.77.0.2/24", "fd77::2/64"]


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
