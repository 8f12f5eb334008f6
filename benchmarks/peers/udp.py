"""UDP packets of 64 bytes through a forwarder: how many arrive in a second, and how many are lost.

A sender sends packets at a steady rate to one end. A socket behind the other end counts and drops
them. Lost packets were dropped by a full ring; no forwarder drops any itself. The sender shares the
cores with the forwarder. If the sender can't keep up its rate, the loss is a percentage of what it
really sent.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

from .._harness import BenchError, Row, Table, child, output_of
from ._contenders import PEERS, Contender
from ._field import Far, Forwarder, forwarder, traffic
from ._install import BUILD

NAMES = ("C", "aiotun", "aiotun, uvloop", "aiotun split", *PEERS, "tun-rs, offload", "wireguard-go")
RATES = (20_000, 80_000, 320_000)
SECONDS = 0.3
PATIENCE = 10.0  # seconds


def offer(way: Forwarder, far: Far, rate: int) -> tuple[float, float]:
    """Return the packets that arrived in a second, and the percentage that was lost."""
    before, counted = far.sunk, traffic(way.near)
    with child(str(BUILD / "sender"), way.target, str(rate), str(SECONDS)) as sender:
        sent, elapsed = (int(word) for word in output_of(sender).split())
    until = time.monotonic() + PATIENCE
    while True:  # until each packet is read or counted as dropped
        now = traffic(way.near)
        missing = sent - (now.tx_packets - counted.tx_packets)
        missing -= now.tx_dropped - counted.tx_dropped
        if missing <= 0:
            break
        if time.monotonic() > until:
            raise BenchError(f"{way.program.contender.name}: {missing} packets are unaccounted for")
        time.sleep(0.02)
    time.sleep(0.02)  # let the forwarder write what it has read
    came = far.sunk - before
    if not 0 < came <= sent:
        raise BenchError(f"{way.program.contender.name}: {came} of {sent} packets arrived")
    return came / elapsed * 1e9, 100 * (1 - came / sent)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    names = [each.name for each in contenders]
    through: dict[int, dict[str, list[float]]] = {r: {n: [] for n in names} for r in RATES}
    lost: dict[int, dict[str, list[float]]] = {r: {n: [] for n in names} for r in RATES}
    with contextlib.ExitStack() as stack:
        far = Far(stack, iperf=False)
        ways = [forwarder(stack, each, number, far) for number, each in enumerate(contenders)]
        for number in range(runs + 1):  # the first one warms up
            for rate in RATES:
                for way in ways:
                    packets, percent = offer(way, far, rate)
                    if number:
                        through[rate][way.program.contender.name].append(packets)
                        lost[rate][way.program.contender.name].append(percent)
    for rate in RATES:
        offered = f"64-byte UDP packets, {rate:,} a second offered"
        base = through[rate].get("C")
        rows = [
            Row(name, "packets/s", values, None if values is base else base)
            for name, values in through[rate].items()
        ]
        yield Table("udp", "all", offered, rows)
        losses = [Row(name, "% lost", values) for name, values in lost[rate].items()]
        yield Table("udp", "all", f"{offered}: lost", losses)
