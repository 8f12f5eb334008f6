"""What the command line's process does, in namespaces of its own."""

import argparse
import faulthandler
import logging
import os
import random
import time
import traceback
from typing import Any

from . import search
from .runner import run_case
from .steps import MODES, Case, Config, make_case

__all__ = ["work"]

_STUCK = 60.0  # seconds that one case may take until all stacks are printed


def cases(options: argparse.Namespace, seed: int) -> Case:
    if options.steps:
        return read_case(options.steps)
    return make_case(
        seed,
        modes=options.mode or MODES,
        loops=[options.loop] if options.loop else ("asyncio", "uvloop"),
        queues=options.queues,
        only=options.only,
        without=options.without,
    )


def read_case(path: str) -> Case:
    """Read what `Case.__str__` wrote: a `Config` and a list, both Python's."""
    with open(0 if path == "-" else path) as file:
        text = file.read()
    config, _, steps = text.partition("\n")
    made = eval(config, {"Config": Config})  # a developer's own file
    return Case(made, tuple(eval(steps)))


def work(options: argparse.Namespace, journal: str) -> int:
    """In private namespaces: run, and print what breaks."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    seconds = options.seconds or (options.minutes or 0) * 60
    count = options.cases or (
        None if seconds else 1 if options.seed is not None or options.steps else 100
    )
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    begin = time.monotonic()
    done, parent = 0, os.getppid()
    kinds: dict[str, Any] = {}
    with search.prepared() as bridge, open(journal, "w") as log:
        if not bridge:
            options.mode = [m for m in options.mode or MODES if "tap" not in m]
            print("note: no ip(8) or tc(8): modes with a TAP device are left out")
        while count is None or done < count:
            # Whoever started this may have been killed.
            if os.getppid() != parent or (seconds and time.monotonic() > begin + seconds):
                break
            case = cases(options, seed)
            if options.show:
                print(case)
            log.seek(0)
            log.write(f"{seed:<20}\n{case}\n")
            log.truncate()
            log.flush()
            faulthandler.dump_traceback_later(_STUCK, exit=True)
            fault = run_case(case, options.patience)
            faulthandler.cancel_dump_traceback_later()
            done += 1
            if fault is not None and fault.kind not in options.ignore:
                spent = time.monotonic() - begin
                if options.keep_going:
                    place = kinds.setdefault(
                        fault.kind, [0, seed, spent, str(fault), case.config.mode]
                    )
                    place[0] += 1
                else:
                    tell(options, seed, case, fault, spent, done)
                    return 1
            seed += 1
    spent = time.monotonic() - begin
    print(f"{done} cases in {spent:.1f} s, the last of seed {seed - 1}: "
          f"{sum(p[0] for p in kinds.values())} failed")  # fmt: skip
    for kind, (number, first, when, text, mode) in sorted(kinds.items(), key=lambda i: -i[1][0]):
        print(
            f"  {number:>5} {kind}, first after {when:.1f} s, seed {first} ({mode}): {text[:160]}"
        )
    return 1 if kinds else 0


def tell(
    options: argparse.Namespace, seed: int, case: Case, fault: Any, spent: float, done: int
) -> None:
    print(f"seed {seed} fails, case {done}, after {spent:.1f} s")
    if options.shrink:
        case, fault = search.shrink(case, fault)
    print("".join(traceback.format_exception(fault)))
    print(case)
    print(f"\n{fault}")
