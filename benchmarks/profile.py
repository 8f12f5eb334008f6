"""python -m benchmarks.profile: how much time aiotun spends in the kernel, in C and in Python.

perf(1) samples a program while it forwards, answers pings, reads and writes, and the samples are
counted by the binary they fall in. asyncio's loop is Python, so it counts as "interpreter". This
needs root: for an ordinary user perf does not see the kernel, and the shares would mean nothing.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ._harness import FIRST_CORE, LAST_CORE, BenchError, child, compiled, output_of
from ._namespace import isolate
from .peers import cost, forward
from .peers._contenders import CONTENDERS
from .peers._field import Far, configure, forwarder, insist, running

KINDS = {
    "kernel": ("[kernel",),
    "C module": ("_speedups",),
    "uvloop": ("loop.",),
    "C library": ("libc",),
    "interpreter": ("",),  # and its own modules in C
}
ROUNDS = 240
PINGS = 20_000


def shares(pid: int, work: Callable[[], object]) -> Counter[str]:
    """Profile a process during `work`; return hundredths of a percent of the samples, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "4000"]
        perf = subprocess.Popen([*command, "-p", str(pid), "-o", data], stderr=subprocess.DEVNULL)
        time.sleep(1)
        work()
        perf.send_signal(2)
        perf.wait()
        told = subprocess.run(
            ["perf", "report", "-i", data, "--sort", "dso", "--stdio", "-q"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found: Counter[str] = Counter()
    for line in told.split("\n"):
        percent, _, where = line.strip().partition("%")
        if where:
            kind = next(k for k, starts in KINDS.items() if where.strip().startswith(starts))
            found[kind] += round(100 * float(percent))
    if not found["kernel"]:
        raise BenchError("perf saw no samples in the kernel; run as root, and allow perf")
    return found


def profiles() -> Iterator[tuple[str, Counter[str]]]:
    with contextlib.ExitStack() as stack:
        far = Far(stack, iperf=True)
        for number, name in enumerate(("aiotun raw", "aiotun split", "aiotun")):
            way = forwarder(stack, CONTENDERS[name], number, far)
            stream = functools.partial(insist, functools.partial(forward.stream, way, 1))
            found = shares(way.program.pid, stream)
            yield f"forwarding: {name}", found
    for name in ("aiotun", "aiotun, uvloop"):
        with running(CONTENDERS[name], "echo", "tun90", core=LAST_CORE) as program:
            configure("tun90", "10.85.0.1/24")
            yield f"answering pings: {name}", shares(program.pid, _ping)
    for name in ("aiotun", "aiotun, one by one"):
        for mode in ("read", "write"):
            with cost.lanes([CONTENDERS[name]], mode) as lanes:
                lane = lanes[name]
                yield f"to {mode}: {name}", shares(lane.program.pid, _often(lane, mode))


def _ping() -> None:
    pinger = str(compiled("pinger.c"))
    with child(pinger, "10.85.0.2", str(PINGS), core=FIRST_CORE) as process:
        output_of(process)


def _often(lane: cost.Lane, mode: str) -> Callable[[], None]:
    one = lane.read if mode == "read" else lane.write

    def work() -> None:
        for _ in range(ROUNDS):
            one(84, cost.COUNT)

    return work


def main() -> int:
    if os.geteuid() != 0 or shutil.which("perf") is None:
        print("benchmarks.profile needs root and perf (linux-perf)", file=sys.stderr)
        return 1
    isolate([], "benchmarks.profile")
    print(f"| percent of the samples | {' | '.join(KINDS)} |")
    print(f"|---|{'---:|' * len(KINDS)}")
    for what, found in profiles():
        cells = " | ".join(f"{found[kind] / 100:.0f}" for kind in KINDS)
        print(f"| {what} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
