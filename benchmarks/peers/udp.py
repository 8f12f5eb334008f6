"""UDP packets of 64 bytes through a forwarder: how many arrive in a second, and how many are lost.

A sender sends packets at a steady rate to one end. A socket behind the other end counts and drops
them. Lost packets were dropped by a full ring; no forwarder drops any itself. The sender shares the
cores with the forwarder. If the sender can't keep up its rate, the loss is a percentage of what it
really sent.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import BenchError, Row, Table, child, columns, in_turn, output_of
from ._contenders import PEERS
from ._field import Far, Forwarder, forwarder, traffic
from ._install import FOLDER

NAMES = (
    "C",
    "aiotun",
    "aiotun, uvloop",
    "aiotun split",
    *PEERS,
    "tun-rs, offload",
    "wireguard-go",
    "smoltcp",
)
RATES = (20_000, 80_000, 320_000)
SECONDS = 0.3
PATIENCE = 10.0  # seconds


def offer(way: Forwarder, far: Far, rate: int) -> tuple[float, float, float]:
    """Return the packets that arrived in a second, the percentage that was lost, and the cost.

    The cost is the forwarder's processor time for each packet that arrived, in microseconds.
    """
    before, counted, cpu = far.sunk, traffic(way.near), way.program.cpu
    with child(str(FOLDER / "sender"), way.target, str(rate), str(SECONDS)) as sender:
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
    cost = (way.program.cpu - cpu) / came * 1e6
    return came / elapsed * 1e9, 100 * (1 - came / sent), cost


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        far = Far(stack, iperf=False)
        ways = [forwarder(stack, each, number, far) for number, each in enumerate(contenders)]
        for rate in RATES:
            cases = {way.program.contender.name: partial(offer, way, far, rate) for way in ways}
            through, lost, costs = columns(in_turn(cases, runs))
            offered = f"64-byte UDP packets, {rate:,} a second offered"
            base = through.get("C")
            rows = [
                Row(
                    name,
                    "packets/s",
                    found,
                    None if found is base else base,
                    cost=costs[name],
                    cost_unit="us/packet",
                )
                for name, found in through.items()
            ]
            yield Table("udp", "all", offered, rows)
            losses = [Row(name, "% lost", found) for name, found in lost.items()]
            yield Table("udp", "all", f"{offered}: lost", losses)
