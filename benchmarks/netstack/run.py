"""A program's TCP through `aiotun run`, pasta and slirp4netns.

Each runs a shell during the whole benchmark, which starts iperf3 when it is its turn. The server is
in a namespace outside, behind a veth pair. Nothing is pinned to a core. Each has the MTU that it
gives its command by default; slirp4netns has the one that Podman gives it.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .._contenders import Contender
from .._harness import Row, Table, columns, in_turn
from ..peers._field import Program, insist, iperf3, running
from ._contenders import RUN
from ._outside import TARGET, Outside

NAMES = (RUN, "pasta", "slirp4netns")
WAYS = {"up": "out of a command", "down": "into a command"}
STREAMS = (1, 16)
TARGETS = {"pasta": 1.0, "slirp4netns": 2.0}

# Runs each line of its input, and prints the output in one line.
SHELL = 'echo ready shell; while read -r line; do eval "$line" | tr -d "\\n"; echo; done'
MTU = r"ip -o link | sed -n '/LOOPBACK/!s/.* mtu \([0-9]*\).*/\1/p'"


@dataclass(frozen=True)
class Path:
    """A way to an iperf3 server, by a contender's program."""

    program: Program
    mtu: int
    address: str
    ask: Callable[[Sequence[str]], str]  # runs a command, and returns its output

    def stream(self, way: str, streams: int) -> tuple[float, float]:
        """Return Gbit/s, and the program's processor time for each gigabyte in seconds."""
        before = self.program.cpu
        count, gbits = iperf3(self.ask, self.address, streams, *["-R"] * (way == "down"))
        return gbits, (self.program.cpu - before) / count * 1e9


def compared(
    runs: int,
    paths: Mapping[str, Path],
    ours: str,
    ways: Mapping[str, str],
    targets: Mapping[str, float],
) -> Iterator[Table]:
    """Yield a table for each way, with one stream and with many."""
    for way, where in ways.items():
        for streams in STREAMS:
            cases = {
                name: partial(insist, partial(path.stream, way, streams))
                for name, path in paths.items()
            }
            speeds, costs = columns(in_turn(cases, runs))
            rows = [
                Row(f"{name}, MTU {paths[name].mtu}", "Gbit/s", found, cost=costs[name])
                for name, found in speeds.items()
            ]
            rows += [
                Row(f"{ours} / {peer}", "Gbit/s", speeds[ours], speeds[peer], 50, target, True)
                for peer, target in targets.items()
                if ours in speeds and peer in speeds
            ]
            what = "one TCP stream" if streams == 1 else f"{streams} TCP streams"
            yield Table("netstack", "asyncio", f"{what} {where}", rows)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        Outside(stack)
        paths = {}
        for each in contenders:
            program = stack.enter_context(running(each, "sh", "-c", SHELL))

            def ask(command: Sequence[str], program: Program = program) -> str:
                return program.ask(shlex.join(command))

            paths[each.name] = Path(program, program.order(MTU)[0], TARGET, ask)
        yield from compared(runs, paths, RUN, WAYS, TARGETS)
