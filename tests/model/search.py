"""Runs the cases of many seeds, and makes those that fail as short as they get."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from . import kernel
from .packets import Fault
from .runner import run_case
from .steps import Case, Config

__all__ = ["prepared", "shrink"]

_SHORT_PATIENCE = 0.4


@contextlib.contextmanager
def prepared() -> Iterator[bool]:
    """Make this thread's namespace ready; whether there is a bridge for sends that wait."""
    kernel.quiet()
    with kernel.slow_bridge() as bridge:
        yield bridge


def shrink(
    case: Case, fault: Fault, *, seconds: float = 20.0, tries: int = 2,
    run: Callable[[Case, float], Fault | None] = run_case,
) -> tuple[Case, Fault]:  # fmt: skip
    """Leave out steps, and simplify the configuration, as long as the same promise breaks."""
    deadline = time.monotonic() + seconds

    def fails(candidate: Case) -> Fault | None:
        for _ in range(tries):
            found = run(candidate, _SHORT_PATIENCE)
            if found is not None and found.kind == fault.kind:
                return found
        return None

    size = max(1, len(case.steps) // 2)
    while size and time.monotonic() < deadline:
        at, shorter = 0, False
        while at < len(case.steps) and time.monotonic() < deadline:
            candidate = dataclasses.replace(case, steps=case.steps[:at] + case.steps[at + size :])
            found = fails(candidate)
            if found is not None:
                case, fault, shorter = candidate, found, True
            else:
                at += size
        if not shorter or size > 1:
            size //= 2
    for name, value in dataclasses.asdict(Config(case.config.mode)).items():
        if getattr(case.config, name) != value and time.monotonic() < deadline:
            config = dataclasses.replace(case.config, **{name: value})
            candidate = dataclasses.replace(case, config=config)
            found = fails(candidate)
            if found is not None:
                case, fault = candidate, found
    return case, fault
