"""The model for some seconds, on each kind of device: the same seeds each time, and new ones.

A failure names the seed, the steps that are left of its case, and the command that repeats it.
"""

import os
import random
import time

import pytest

from .packets import Fault
from .runner import run_case
from .search import prepared, shrink
from .steps import MODES, Case, Config, Step, make_case

SECONDS = 1.6  # for each mode, about half of them for new seeds
# CI judges a change, so it runs the same cases each time; people and the soak look for new ones.
NEW = 1_000_000 if os.environ.get("CI") else random.SystemRandom().randrange(1 << 32)

# Cases in which the model was wrong about what the kernel does.
KNOWN: dict[str, tuple[int, tuple[Step, ...]]] = {
    "a bad buffer takes a packet of any flow whose queue is not known": (
        4,
        (
            ("receive", 4, "decoded", 64, 50, "wait_for", 3, 3),
            ("feed", 3, 40, 1), ("feed", 1, 2, 1), ("feed", 3, 2, 1), ("feed", 1, 40, 1),
            ("settle",),
            ("bad_buffer", 4, 2),
        ),
    ),
    "a bad buffer takes a packet of a flow that has moved": (
        6,
        (
            ("feed", 3, 1, 2),
            ("send", 1, "generator", 2, 64, "wait_for", 1, None),
            ("feed", 2, 2, 1),
            ("nowait", 1),
            ("settle",),
            ("receive", 1, "short", 1, 1, "plain", 0, 1),
            ("feed", 2, 2, 1),
            ("bad_buffer", 1, 2),
        ),
    ),
    "a capture does not see what a detached queue sends": (
        4,
        (("detach", 2, 1), ("capture",), ("send", 4, "send", 3, 1, "plain", 0, None)),
    ),
}  # fmt: skip


def explain(seed: int, case: Case, fault: Fault) -> str:
    mode = case.config.mode
    shorter, last = shrink(case, fault)
    return (
        f"{fault}\n\nIt is left of these steps:\n{shorter}\n{last}\n\n"
        f"Again: python -m tests.model --mode {mode} --seed {seed} --shrink"
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_packet_is_accounted_for_and_nobody_waits_in_vain(mode: str) -> None:
    print(f"new seeds from {NEW}")
    with prepared() as bridge:
        if "tap" in mode and not bridge:
            pytest.skip("missing: ip(8) and tc(8); install iproute2")
        for first in (0, NEW):
            deadline = time.monotonic() + SECONDS / 2
            seed = first
            while seed == first or time.monotonic() < deadline:
                case = make_case(seed, modes=[mode])
                fault = run_case(case)
                if fault is not None:
                    pytest.fail(explain(seed, case, fault), pytrace=False)
                seed += 1


@pytest.mark.parametrize("name", KNOWN)
def test_cases_that_failed_once(name: str) -> None:
    version, steps = KNOWN[name]
    case = Case(Config("off", queues=3, version=version), steps)
    with prepared():
        for _ in range(4):  # what the kernel does differs each time
            assert run_case(case) is None
