"""TCP through a forwarder between two TUN devices: throughput, processor time, memory.

iperf3 sends one stream or four from one namespace to another. Each forwarder has its own devices
and runs during the whole benchmark; it sleeps while another is measured. Nothing is pinned to a
core. The benchmark fails if the counters of both interfaces don't account for what iperf3 received.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from .._harness import BenchError, Row, Table, child, output_of
from ._contenders import PEERS, Contender
from ._field import Far, Forwarder, forwarder

PLAIN = ("C", "aiotun", "aiotun, uvloop", "aiotun, NAPI threads", *PEERS)
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
STREAMS = {1: 2, 4: 1}  # how many at once: for how many seconds
TARGETS = {  # ours, theirs: the least that the ratio may be
    **{(ours, peer): 0.9 for ours in PLAIN[1:4] for peer in ("water", "tun-rs")},
    **{(ours, peer): 1.0 for ours in OFFLOAD[1:5] for peer in OFFLOAD[5:]},
}
CPU_TARGETS = {(ours, "C, offload"): 1.3 for ours in OFFLOAD[3:5]}

Samples = Mapping[str, list[float]]


def stream(way: Forwarder, streams: int) -> tuple[float, float]:
    """Return Gbit/s received, and the forwarder's processor time for each gigabyte in seconds."""
    name = way.program.contender.name
    cpu, counted = way.program.cpu, way.bytes
    command = ["iperf3", "-c", way.target, "-P", str(streams), "-t", str(STREAMS[streams]), "-J"]
    with child(*command) as client:
        said = json.loads(output_of(client))
    if "error" in said:
        raise BenchError(f"{name}: iperf3: {said['error']}")
    received = said["end"]["sum_received"]
    for end, before, after in zip(("near", "far"), counted, way.bytes, strict=True):
        if not 0 < received["bytes"] <= after - before:
            raise BenchError(
                f"{name}: iperf3 received {received['bytes']} bytes, and the {end} device "
                f"carried {after - before}"
            )
    spent = way.program.cpu - cpu
    return received["bits_per_second"] / 1e9, spent / received["bytes"] * 1e9


def insistent_stream(way: Forwarder, streams: int) -> tuple[float, float]:
    """Try again once: on a busy machine, iperf3's control connection gets stuck now and then."""
    try:
        return stream(way, streams)
    except BenchError as error:
        if "busy" not in str(error):  # "busy": the server is still ending the stream before
            print(f"trying again: {error}", file=sys.stderr)
        time.sleep(1)
        return stream(way, streams)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    names = [each.name for each in contenders]
    speed: dict[int, dict[str, list[float]]] = {n: {name: [] for name in names} for n in STREAMS}
    # No program is charged for the time of a kernel thread.
    cpu: dict[str, list[float]] = {each.name: [] for each in contenders if not each.napi_threads}
    with contextlib.ExitStack() as stack:
        far = Far(stack, iperf=True)
        ways = {
            each.name: forwarder(stack, each, number, far) for number, each in enumerate(contenders)
        }
        rest = {name: way.program.memory() for name, way in ways.items()}
        for number in range(runs + 1):  # the first one warms up
            for name, way in ways.items():
                for streams in STREAMS:
                    gbits, seconds = insistent_stream(way, streams)
                    if number:
                        speed[streams][name].append(gbits)
                        if streams == 1 and name in cpu:
                            cpu[name].append(seconds)
        most = {name: way.program.memory("VmHWM") for name, way in ways.items()}
    for streams, samples in speed.items():
        yield from _speeds(samples, streams)
    yield from _cpu(cpu)
    yield _memory(rest, most)


def _rows(
    samples: Samples,
    group: Sequence[str],
    unit: str,
    targets: Mapping[tuple[str, str], float],
    *,
    at_least: bool,
) -> list[Row]:
    """Return the rows of a group, compared with its first, and the ratios that have a target."""
    base = samples.get(group[0])
    rows = [
        Row(name, unit, samples[name], None if name == group[0] else base)
        for name in group
        if name in samples
    ]
    rows += [
        Row(f"{a} / {b}", unit, samples[a], samples[b], target=target, at_least=at_least)
        for (a, b), target in targets.items()
        if a in group and a in samples and b in samples
    ]
    return rows


def _speeds(samples: Samples, streams: int) -> Iterator[Table]:
    what = "one TCP stream" if streams == 1 else f"{streams} TCP streams"
    targets = TARGETS if streams == 1 else {}
    for kind, group in GROUPS.items():
        if rows := _rows(samples, group, "Gbit/s", targets, at_least=True):
            yield Table("forward", "all", f"{what}, {kind}", rows)


def _cpu(samples: Samples) -> Iterator[Table]:
    for kind, group in GROUPS.items():
        if rows := _rows(samples, group, "s/GB", CPU_TARGETS, at_least=False):
            what = f"the forwarder's processor time, one TCP stream, {kind}"
            yield Table("forward", "all", what, rows)


def _memory(rest: Mapping[str, float], most: Mapping[str, float]) -> Table:
    rows = []
    for name in rest:
        rows += [Row(f"{name}: at rest", "MiB", [rest[name]])]
        rows += [Row(f"{name}: most", "MiB", [most[name]])]
    return Table("forward", "all", "resident memory, once each", rows)
