"""aiotun: [--uvloop] [--one] [--napi] [--offload split|raw] MODE NAME...

`--one` handles one packet in each call.
"""

import asyncio
import sys
import time
from typing import Literal, cast

import aiotun
from aiotun import reply

from ._contract import ADDRESS, MTU, arguments, orders, ready, tell

BATCH = 64


async def echo(tun: aiotun.TunDevice) -> None:
    async for packet in tun:
        answered = reply.icmp_echo(packet)
        if answered is not None:
            await tun.send(answered)


async def pump(source: aiotun.TunDevice, target: aiotun.TunDevice, one: bool) -> None:
    while not source.closed:
        try:
            await passed_on(source, target, one)
        except aiotun.LinkDownError as error:  # the device is down until it is set up
            print(f"aiotun_peer: {error}", file=sys.stderr)


async def passed_on(source: aiotun.TunDevice, target: aiotun.TunDevice, one: bool) -> None:
    if one:
        async for packet in source:
            await target.send(packet)
    else:
        async for batch in source.batches(1024):
            await target.send_many(batch)


async def read_all(tun: aiotun.TunDevice, count: int, one: bool) -> int:
    start = time.perf_counter_ns()
    if one:
        for _ in range(count):
            await tun.recv()
    else:
        left = count
        while left:
            left -= len(await tun.recv_many(min(left, BATCH)))
    return time.perf_counter_ns() - start


async def write_all(tun: aiotun.TunDevice, packet: bytes, count: int, one: bool) -> int:
    start = time.perf_counter_ns()
    if one:
        for _ in range(count):
            await tun.send(packet)
    else:
        for sent in range(0, count, BATCH):
            await tun.send_many([packet] * min(BATCH, count - sent))
    return time.perf_counter_ns() - start


async def opened_often(name: str, count: int) -> tuple[int, int]:
    opening = closing = 0
    for _ in range(count):
        start = time.perf_counter_ns()
        tun = await aiotun.open_tun(name, addresses=[f"{ADDRESS}/24"], mtu=MTU)
        between = time.perf_counter_ns()
        await tun.aclose()
        opening += between - start
        closing += time.perf_counter_ns() - between
    return opening // count, closing // count


async def main(one: bool, napi: bool, offload: Literal["off", "split", "raw"]) -> None:
    mode, names = arguments()
    if mode == "open":
        ready(names[0])
        for (count,) in orders():
            tell(*await opened_often(names[0], int(count)))
        return
    devices = [
        await aiotun.open_tun(name, up=False, offload=offload, napi="threaded" if napi else False)
        for name in names
    ]
    tun = devices[0]
    ready(names[0])
    if mode == "echo":
        await echo(tun)
    elif mode == "forward":
        near, far = devices
        await asyncio.gather(pump(near, far, one), pump(far, near, one))
    for count, *packet in orders():
        if packet:
            tell(await write_all(tun, bytes.fromhex(packet[0]), int(count), one))
        else:
            tell(await read_all(tun, int(count), one))
    for device in devices:
        await device.aclose()


def option(name: str) -> bool:
    given = name in sys.argv
    if given:
        sys.argv.remove(name)
    return given


if __name__ == "__main__":
    uv, one, napi, offload = option("--uvloop"), option("--one"), option("--napi"), "off"
    if option("--offload"):
        offload = sys.argv.pop(1)
    program = main(one, napi, cast(Literal["off", "split", "raw"], offload))
    if uv:
        import uvloop

        uvloop.run(program)
    else:
        asyncio.run(program)
