"""The time of a command that does nothing, with a network of its own: from start to exit."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import BenchError, Row, Table, in_turn, warm_environment
from ._contenders import RUN
from ._outside import Outside

NAMES = (RUN, "pasta", "slirp4netns")
ROUNDS = 3  # a run
TARGET = 150  # milliseconds


def started(contender: Contender, environment: Mapping[str, str]) -> float:
    """Return milliseconds."""
    start = time.perf_counter()
    command = [*contender.command, "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took = (time.perf_counter() - start) * 1000
    if done.returncode != 0:
        raise BenchError(f"{contender.name}: {done.stderr.strip()}")
    return took


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        Outside(stack)
        environment = stack.enter_context(warm_environment())
        cases = {each.name: partial(started, each, environment) for each in contenders}
        samples = in_turn(cases, runs * ROUNDS)
    rows = [
        Row(name, "ms", found, target=TARGET if name == RUN else None)
        for name, found in samples.items()
    ]
    yield Table("netstack", "all", "a command's start: `aiotun run -- true`", rows)
