"""TCP through a forwarder between two TUN devices: throughput, processor time, memory.

iperf3 sends one stream or four from one namespace to another, for a second. What is compared with
each other takes turns: a round of all takes some ten seconds. Each forwarder has its own devices
and runs during the whole benchmark; it sleeps while another is measured. Nothing is pinned to a
core. The benchmark fails if the counters of both interfaces don't account for what iperf3 received.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import BenchError, Row, Table, columns, in_turn
from ._contenders import PEERS
from ._field import Far, Forwarder, forwarder, insist, iperf3, output

PLAIN = ("C", "aiotun", "aiotun, uvloop", "aiotun, NAPI threads", *PEERS, "smoltcp")
OFFLOAD = (
    "C, offload",
    "aiotun split",
    "aiotun split, uvloop",
    "aiotun raw",
    "aiotun raw, uvloop",
    "tun-rs, offload",
    "wireguard-go",
)
GROUPS = {"without offload": PLAIN, "with offload": OFFLOAD}
NAMES = PLAIN + OFFLOAD
STREAMS = {1: 2, 4: 1}  # how many at once: seconds, a run
# For each number of streams, and for ours and theirs: the least that the ratio may be.
TARGETS = {
    1: {
        **{(ours, "water"): 0.9 for ours in PLAIN[1:4]},
        **{(ours, "tun-rs"): 1.0 for ours in PLAIN[1:3]},
        (PLAIN[3], "tun-rs"): 1.4,
        **{(ours, peer): 1.0 for ours in OFFLOAD[1:5] for peer in OFFLOAD[5:]},
        **dict.fromkeys(zip(OFFLOAD[1:3], OFFLOAD[3:5], strict=True), 0.85),
    },
    4: {
        **{(ours, "tun-rs, offload"): 1.1 for ours in OFFLOAD[1:3]},
        **{(ours, "wireguard-go"): 1.3 for ours in OFFLOAD[1:3]},
    },
}
CPU_TARGETS = {(ours, "C, offload"): 1.3 for ours in OFFLOAD[3:5]}

Samples = Mapping[str, list[float]]


def stream(way: Forwarder, streams: int) -> tuple[float, float]:
    """Return Gbit/s received, and the forwarder's processor time for each gigabyte in seconds."""
    cpu, counted = way.program.cpu, way.bytes
    count, gbits = iperf3(output, way.target, streams)
    for end, before, after in zip(("near", "far"), counted, way.bytes, strict=True):
        if not 0 < count <= after - before:
            raise BenchError(
                f"{way.program.contender.name}: iperf3 received {count} bytes, and the {end} "
                f"device carried {after - before}"
            )
    return gbits, (way.program.cpu - cpu) / count * 1e9


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    # No program is charged for the time of a kernel thread.
    uncharged = [each.name for each in contenders if each.napi_threads]
    with contextlib.ExitStack() as stack:
        far = Far(stack, iperf=True)
        ways = {
            each.name: forwarder(stack, each, number, far) for number, each in enumerate(contenders)
        }
        rest = {name: way.program.memory() for name, way in ways.items()}
        for streams, seconds in STREAMS.items():
            what = "one TCP stream" if streams == 1 else f"{streams} TCP streams"
            for kind, group in GROUPS.items():
                cases = {
                    name: partial(insist, partial(stream, ways[name], streams))
                    for name in group
                    if name in ways
                }
                if not cases:
                    continue
                speeds, costs = columns(in_turn(cases, runs * seconds))
                for name in uncharged:
                    costs.pop(name, None)
                rows = _rows(speeds, costs, TARGETS[streams], CPU_TARGETS)
                yield Table("forward", "all", f"{what}, {kind}", rows)
        most = {name: way.program.memory("VmHWM") for name, way in ways.items()}
    yield _memory(rest, most)


def _rows(
    speeds: Samples,
    costs: Samples,
    targets: Mapping[tuple[str, str], float],
    cost_targets: Mapping[tuple[str, str], float],
) -> list[Row]:
    """Return a row for each, compared with the first, and the ratios that have a target."""
    first, *_ = speeds
    rows = [
        Row(
            name,
            "Gbit/s",
            found,
            None if name == first else speeds[first],
            cost=costs.get(name, ()),
        )
        for name, found in speeds.items()
    ]
    for samples, goals, at_least in ((speeds, targets, True), (costs, cost_targets, False)):
        unit, prefix = ("Gbit/s", "") if at_least else ("s/GB", "processor time, ")
        rows += [
            Row(f"{prefix}{a} / {b}", unit, samples[a], samples[b], 50, target, at_least)
            for (a, b), target in goals.items()
            if a in samples and b in samples
        ]
    return rows


def _memory(rest: Mapping[str, float], most: Mapping[str, float]) -> Table:
    rows = []
    for name in rest:
        rows += [Row(f"{name}: at rest", "MiB", [rest[name]])]
        rows += [Row(f"{name}: most", "MiB", [most[name]])]
    return Table("forward", "all", "resident memory, once each", rows)
