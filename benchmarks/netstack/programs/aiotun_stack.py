"""aiotun's netstack: `intercept_tcp` and `intercept_udp` behind a TUN device; see _contract.py."""

import argparse
import asyncio
import contextlib
import sys
from typing import Any

import aiotun

from ..._harness import run_on
from ._contract import BLOCK, ECHO, SHORT, SINK

DATA = bytes(BLOCK)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    port = writer.get_extra_info("sockname")[1]
    with contextlib.suppress(ConnectionError):
        if port == SINK:
            count = 0
            while data := await reader.read(BLOCK):
                count += len(data)
            writer.write(count.to_bytes(8, "big"))
        elif port == SHORT:
            writer.write(await reader.read(1))
            await reader.read()
        else:
            while True:
                writer.write(DATA)
                await writer.drain()
    writer.close()


async def echo(flow: Any) -> None:
    async for data in flow:
        if flow.local[1] == ECHO:
            await flow.send(data)


async def main(name: str, offload: Any) -> None:
    async with (
        aiotun.open_tun(name, offload=offload) as tun,
        aiotun.open_netstack(intercept=True, offload=offload) as stack,
    ):
        pump = asyncio.create_task(aiotun.relay(tun, stack.tun))
        await stack.intercept_tcp(serve)
        if hasattr(stack, "intercept_udp"):
            await stack.intercept_udp(echo)
        print(f"ready {tun.name}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        pump.cancel()
        await asyncio.wait([pump])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offload", choices=("off", "split", "raw"), default="raw")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("name")
    args = parser.parse_args()
    run_on("uvloop" if args.uvloop else "asyncio", main(args.name, args.offload))
