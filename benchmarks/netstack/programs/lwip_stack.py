"""lwIP, as `examples/lwip_host` runs it, on a TAP device; see _contract.py.

Usage: lwip_stack FOLDER NAME ADDRESS/LENGTH GATEWAY, FOLDER has the module that the example builds.
"""

import asyncio
import sys
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import aiotun

from ..._harness import HERE
from ._contract import SHORT, SINK, SOURCE

MAC = bytes.fromhex("020000000017")
DATA = bytes(1 << 16)


async def sink(stream: Any) -> None:
    count = 0
    while data := await stream.read():
        count += len(data)
    await stream.write(count.to_bytes(8, "big"))


async def source(stream: Any) -> None:
    while True:
        await stream.write(DATA)


async def short(stream: Any) -> None:
    await stream.write(await stream.read())
    await stream.read()


async def main(name: str, address: IPv4Interface, gateway: IPv4Address) -> None:
    from stack import Stack  # of the example

    async with aiotun.open_tap(name) as tap:
        stack = Stack(tap, MAC, address, gateway)
        for port, handler in ((SINK, sink), (SOURCE, source), (SHORT, short)):
            stack.listen(port, handler)
        print(f"ready {tap.name}", flush=True)
        running = asyncio.create_task(stack.run())
        await asyncio.to_thread(sys.stdin.read)
        await stack.stop()
        await running


if __name__ == "__main__":
    folder, name, address, gateway = sys.argv[1:]
    sys.path[:0] = [folder, str(HERE.parent / "examples" / "lwip_host")]
    asyncio.run(main(name, IPv4Interface(address), IPv4Address(gateway)))
