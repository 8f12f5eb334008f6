"""forward.py OFFLOAD NETNS NEAR FAR SUBNET LOOP: forwarder.c as a user of aiotun would write it."""

import asyncio
import sys
from typing import Literal, cast

import aiotun

Mode = Literal["off", "split", "raw"]


async def pump(source: aiotun.TunDevice, target: aiotun.TunDevice) -> None:
    async for batch in source.batches(512):
        await target.send_many(batch)


async def main(offload: Mode, netns: str, near: str, far: str, subnet: str) -> None:
    async with (
        aiotun.open_tun(
            near, addresses=[f"{subnet}.1/24"], offload=offload, txqueuelen=1000
        ) as one,
        aiotun.open_tun(
            far, addresses=[f"{subnet}.2/24"], offload=offload, txqueuelen=1000, netns=netns
        ) as other,
    ):
        print(f"ready {near}", flush=True)
        await asyncio.gather(pump(one, other), pump(other, one))


if __name__ == "__main__":
    mode, netns, near, far, subnet, loop = sys.argv[1:]
    offload = cast(Mode, mode)
    if loop == "uvloop":
        import uvloop

        uvloop.run(main(offload, netns, near, far, subnet))
    else:
        asyncio.run(main(offload, netns, near, far, subnet))
