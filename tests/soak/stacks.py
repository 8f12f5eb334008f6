"""Opens pairs of netstacks, has one ask the other through a relay, and closes them anyhow."""

import asyncio
import contextlib
from typing import Literal

import aiotun

from .stage import HANG, Stage

__all__ = ["stacks"]


async def stacks(stage: Stage) -> None:
    while not stage.stop.is_set():
        try:
            async with asyncio.timeout(HANG):
                await _pair(stage)
        except TimeoutError:
            stage.ledger.problem("a pair of netstacks hangs")
        await asyncio.sleep(stage.chance.uniform(0.1, 0.5))


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _pair(stage: Stage) -> None:
    chance = stage.chance
    offloads: list[Literal["off", "split", "raw"]] = ["off", "split", "raw"]
    offload = chance.choice(offloads)
    async with (
        aiotun.new_namespace(rootless=chance.random() < 0.5) as ns,
        aiotun.open_netstack(intercept=True, namespace=ns, offload=offload) as server,
        await server.intercept_tcp(_echo),
        aiotun.open_netstack(addresses=["10.77.0.2/24"]) as client,
    ):
        stage.count("netstacks", 2)
        relaying = asyncio.create_task(aiotun.relay(client.tun, server.tun))
        asking = [asyncio.create_task(_ask(stage, client)) for _ in range(chance.randrange(1, 6))]
        if chance.random() < 0.3:  # closed in the middle of it
            await asyncio.sleep(chance.uniform(0, 0.01))
            await server.aclose()
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
        else:
            await asyncio.gather(*asking)
        await server.aclose()
        await relaying


async def _ask(stage: Stage, client: aiotun.Netstack) -> None:
    host, port = f"192.0.2.{stage.chance.randrange(1, 255)}", stage.chance.randrange(1, 65_536)
    data = stage.chance.randbytes(stage.chance.choice([1, 1000, 100_000]))
    reader, writer = await client.open_connection(host, port)
    writer.write(data)
    writer.write_eof()
    if await reader.read() != data:
        stage.ledger.problem(f"{host} port {port} did not echo {len(data)} bytes")
    stage.count("connections through netstacks")
    writer.close()
