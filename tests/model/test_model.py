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
from .steps import MODES, Case, make_case

SECONDS = 1.6  # for each mode, about half of them for new seeds
# CI judges a change, so it runs the same cases each time; people and the soak look for new ones.
NEW = 1_000_000 if os.environ.get("CI") else random.SystemRandom().randrange(1 << 32)


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
