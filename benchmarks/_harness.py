"""What the benchmarks share: taking turns, figures, C programs, children, cores."""

import asyncio
import contextlib
import ctypes
import importlib.util
import math
import os
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K")
T = TypeVar("T")

HERE = Path(__file__).resolve().parent
LOOPS = ("asyncio", "uvloop")

# Two cores for a pair of processes. Both are the same if there is only one.
FIRST_CORE, *_, LAST_CORE = sorted(os.sched_getaffinity(0)) * 2

# prctl.h
_PR_SET_PDEATHSIG = 1


class BenchError(Exception):
    """A benchmark could not measure correctly: a wrong count, a missing tool, a dead child."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    With a `baseline`, the figure is the median of the ratios of runs next to each other. Otherwise
    it is the `percentile` of the samples. The table shows it only if it says more than the samples.
    `cost` is the processor time that goes with each sample, in `cost_unit`.
    """

    name: str
    unit: str
    samples: Sequence[float]
    baseline: Sequence[float] | None = None
    percentile: int = 50
    target: float | None = None
    at_least: bool = False  # whether the target is a minimum; otherwise it is a maximum
    cost: Sequence[float] = ()
    cost_unit: str = "s/GB"

    @property
    def _values(self) -> Sequence[float]:
        if self.baseline is None:
            return self.samples
        return [a / b for a, b in zip(self.samples, self.baseline, strict=True)]

    @property
    def figure(self) -> float:
        return percentile(self._values, self.percentile)

    @property
    def label(self) -> str:
        """The figure as the table shows it."""
        if self.baseline is not None:
            low, high = span(self._values)
            return f"{self.figure:.2f}x ({low:.2f}-{high:.2f})"
        if self.percentile != 50:
            name = "max" if self.percentile == 100 else f"p{self.percentile}"
            return f"{name} {plain_number(self.figure)}"
        return "" if self.target is None else plain_number(self.figure)

    @property
    def verdict(self) -> str:
        """Whether the target is reached; empty without a target.

        It can't be said if the median may lie on either side of the target.
        """
        if self.target is None:
            return ""
        if self.percentile == 50:
            low, high = span(self._values)
            if low < self.target < high:
                return "not distinguishable"
        reached = self.figure >= self.target if self.at_least else self.figure <= self.target
        return "reached" if reached else "missed"


@dataclass(frozen=True)
class Table:
    """What one benchmark measured on one event loop."""

    bench: str
    loop: str
    what: str
    rows: Sequence[Row]

    def __str__(self) -> str:
        lines = [f"{self.bench} ({self.loop}): {self.what}"]
        width = max(26, *(len(row.name) + 1 for row in self.rows))
        costs = any(row.cost for row in self.rows)
        head = f"{'processor':<16}" if costs else ""
        lines.append(
            f"  {'':<{width}}{'min':>10}{'median':>10}{'max':>10} {'':<10}{head}"
            f"{'figure':<20}  target"
        )
        for row in self.rows:
            numbers = min(row.samples), statistics.median(row.samples), max(row.samples)
            cells = "".join(f"{plain_number(n):>10}" for n in numbers)
            cost = ""
            if row.cost:
                cost = f"{plain_number(statistics.median(row.cost))} {row.cost_unit}"
            target = ""
            if row.target is not None:
                target = f"{'>=' if row.at_least else '<='} {row.target:<6g} {row.verdict}"
            line = f"  {row.name:<{width}}{cells} {row.unit:<10}{cost:<{16 * costs}}"
            lines.append(f"{line}{row.label:<20}  {target}".rstrip())
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "loop": self.loop,
            "what": self.what,
            "rows": [
                {
                    "name": row.name,
                    "unit": row.unit,
                    "figure": row.figure,
                    "label": row.label,
                    "ratio": row.baseline is not None,
                    "percentile": row.percentile,
                    "target": row.target,
                    "at_least": row.at_least,
                    "verdict": row.verdict,
                    "samples": list(row.samples),
                    "cost": list(row.cost),
                    "cost_unit": row.cost_unit,
                }
                for row in self.rows
            ],
        }


def plain_number(value: float) -> str:
    """Format a number with no more digits than are significant."""
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return the smallest sample that `percent` % of the samples do not exceed (50: the median)."""
    if percent == 50:
        return statistics.median(samples)
    rank = -(-len(samples) * percent // 100)  # rounded up
    return sorted(samples)[max(rank, 1) - 1]


def span(values: Sequence[float]) -> tuple[float, float]:
    """Return the range in which the median lies, with 95 % certainty.

    The range reaches from one of the values to another, and assumes nothing about how they are
    distributed: of N values, K or fewer are below the median as often as N coins show K heads or
    fewer. Of up to eight values it is the range of all; of fewer than six, that is less certain.
    """
    ordered, number = sorted(values), len(values)
    cut, ways = 0, 1
    while 2 * (ways := ways + math.comb(number, cut + 1)) <= 0.05 * 2**number:
        cut += 1
    return ordered[cut], ordered[-1 - cut]


def in_turn(cases: Mapping[K, Callable[[], T]], runs: int) -> dict[K, list[T]]:
    """Run the cases in turn, A B C A B C, so that disturbances affect all of them equally.

    A first round warms the caches and is not counted.
    """
    rounds = [{name: case() for name, case in cases.items()} for _ in range(runs + 1)]
    return {name: [each[name] for each in rounds[1:]] for name in cases}


async def interleave(cases: Mapping[K, Callable[[], Awaitable[T]]], runs: int) -> dict[K, list[T]]:
    """Like `in_turn`, with cases that are awaited."""
    rounds = [{name: await case() for name, case in cases.items()} for _ in range(runs + 1)]
    return {name: [each[name] for each in rounds[1:]] for name in cases}


def columns(samples: Mapping[K, Sequence[Sequence[float]]]) -> list[dict[K, list[float]]]:
    """Turn samples of several numbers each into a dictionary for each of the numbers."""
    count = len(next(iter(samples.values()))[0]) if samples else 0
    return [
        {name: [v[i] for v in values] for name, values in samples.items()} for i in range(count)
    ]


def expect(what: str, found: object, wanted: object) -> None:
    """Check that a benchmark measured what it should."""
    if found != wanted:
        raise BenchError(f"{what}: expected {wanted}, got {found}")


def has_uvloop() -> bool:
    return importlib.util.find_spec("uvloop") is not None


def run_on(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a fresh event loop of that kind."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def compiled(source: str) -> Path:
    """Compile a C file of this folder: to a program if it has a main, else to a library."""
    path = HERE / source
    library = "int main" not in path.read_text()
    output = HERE / "build" / (path.stem + (".so" if library else ""))
    if output.exists() and output.stat().st_mtime > path.stat().st_mtime:
        return output
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise BenchError(
            f"there is no C compiler {compiler[0]!r}; install gcc or clang, or set CC to a compiler"
        )
    output.parent.mkdir(exist_ok=True)
    flags = ["-O2", *(["-shared", "-fPIC"] if library else [])]
    command = [*compiler, *flags, "-o", str(output), str(path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{source} does not compile: {done.stderr.strip()}")
    return output


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def child(
    *command: str, core: int | None = None, stdin: int | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run a program, perhaps on one core. It ends with the block, or when this process dies.

    `stdin` is passed to subprocess.
    """

    def prepare() -> None:
        _die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the benchmark ends the child
        if core is not None:
            os.sched_setaffinity(0, {core})

    process = subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, text=True, preexec_fn=prepare
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def output_of(process: "subprocess.Popen[str]", timeout: float = 60) -> str:
    """Wait for a child to end, and return its output."""
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{process.args!r} did not end within {timeout:g} s") from None
    expect(f"exit status of {process.args!r}", process.returncode, 0)
    return text


def wait_ready(process: "subprocess.Popen[str]", timeout: float = 20) -> None:
    """Wait until a responder prints its line `ready NAME`."""
    assert process.stdout is not None
    until = time.monotonic() + timeout
    while select.select([process.stdout], [], [], max(until - time.monotonic(), 0))[0]:
        line = process.stdout.readline()
        if line.startswith("ready "):
            return
        if not line:
            break
    raise BenchError(f"{process.args!r} did not print 'ready' within {timeout:g} s")


@contextlib.contextmanager
def warm_environment() -> Iterator[dict[str, str]]:
    """An environment in which fresh interpreters find compiled modules, as in an installation."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        yield environment


def fresh(*arguments: str, environment: dict[str, str]) -> list[str]:
    """Run a fresh interpreter, and return the words that it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"a fresh interpreter failed: {done.stderr.strip()}")
    return done.stdout.split()


def processor_time(pid: int) -> float:
    """Return the processor time of a running program in seconds, all its threads together."""
    # The clock ID that clock_getcpuclockid(3) returns: the process ID and CPUCLOCK_SCHED.
    return time.clock_gettime(~pid << 3 | 2)


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Pin this thread, and the threads and children that it starts, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
