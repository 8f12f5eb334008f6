"""ping(8) with IPv4 options, answered by `reply.icmp_echo`."""

import asyncio
import re
import subprocess

import pytest

import aiotun
from aiotun import reply

from ..helpers import need


async def respond(tun: aiotun.TunDevice) -> None:
    async for packet in tun:
        answer = reply.icmp_echo(packet)
        if answer is not None:
            await tun.send(answer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-R"], r"RR:\s+10\.9\.0\.1\s+10\.9\.0\.2\s"),
        (["-T", "tsonly"], r"TS:\s+\d+ absolute\s+-?\d+\s"),
        (["-T", "tsandaddr"], r"TS:\s+10\.9\.0\.1\s+\d+ absolute\s+10\.9\.0\.2\s+-?\d+\s"),
    ],
)
async def test_ping_options_are_answered_with_this_hosts_entries(
    options: list[str], said: str
) -> None:
    ping = need("ping")
    async with aiotun.open_tun("echo0", addresses=["10.9.0.1/24"]) as tun:
        task = asyncio.create_task(respond(tun))
        command = [ping, "-n", "-c", "1", "-W", "5", *options, "10.9.0.2"]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await process.communicate()
        text = output.decode()
        task.cancel()
        await asyncio.wait([task])
        assert process.returncode == 0, text
        assert re.search(said, text), text
