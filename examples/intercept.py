#!/usr/bin/env python3
"""Runs a command, shows every connection that it makes, and carries it to the host's network.

    python examples/intercept.py curl -s http://192.0.2.1/

Needs no root. The command's packets go to a second namespace, whose kernel makes connections of
them, whatever their address. `aiotun run` does this with names, UDP as it should be, and more.
"""

import asyncio
import contextlib
import sys

import aiotun
from aiotun.netstack import PipeStats, pipe


async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    host, port = writer.get_extra_info("sockname")[:2]  # what the command asked for
    try:
        outside = await asyncio.open_connection(host, port)
    except OSError as error:
        print(f"{host} port {port}: {error.strerror}", file=sys.stderr)
        writer.transport.abort()
        return
    stats = PipeStats()
    await pipe((reader, writer), outside, stats=stats)
    print(f"{host} port {port}: {stats.a_to_b} bytes out, {stats.b_to_a} in", file=sys.stderr)


async def run(command: list[str]) -> int:
    async with (
        aiotun.new_namespace() as ns,
        aiotun.open_tun(
            "tun0", netns=ns, addresses=["198.18.0.1/24"], routes=["default"], offload="raw"
        ) as tun,
        aiotun.open_netstack(intercept=True, offload="raw") as stack,
        await stack.intercept_tcp(connection),
    ):
        relaying = asyncio.create_task(aiotun.relay(tun, stack.tun))
        process = await ns.create_subprocess_exec(*command)
        status = await process.wait()
        relaying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await relaying
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        sys.exit(asyncio.run(run(sys.argv[1:])))
    except OSError as error:  # namespaces are forbidden, for example, or there is no such command
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
