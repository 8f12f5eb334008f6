"""The rounds of a soak: each runs on a new event loop, asyncio's and uvloop's in turn."""

import asyncio
import faulthandler
import itertools
import os
import random
import signal
import time
import traceback
from collections.abc import Callable

import uvloop

from . import gauges, planting
from .ledger import Ledger
from .modelling import Beside
from .network import make_namespace, names, quiet
from .openings import openings
from .report import Report
from .scenes import faults, receivers, responder, senders
from .stacks import stacks
from .stage import HANG, Scene, Stage
from .wires import wire

__all__ = ["soak"]

_WARM_UP = 2  # rounds: one on each loop, in which everything is imported and caches are filled
_STUCK = 90.0  # seconds a round may take beyond its time before all stacks are printed

_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

_SCENES: dict[str, Scene] = {
    "wire tun off": wire("tun", "off", 1, flapping=True),
    "wire tun split": wire("tun", "split", 2, flapping=True),
    "wire tun raw": wire("tun", "raw", 1, flapping=False),
    # Not flapping: the kernel takes IPv6 addresses off a link that goes down.
    "wire tun off IPv6": wire("tun", "off", 2, flapping=False, version=6),
    "wire tun split IPv6": wire("tun", "split", 1, flapping=False, version=6),
    "wire tap off": wire("tap", "off", 2, flapping=False),
    "wire tap split": wire("tap", "split", 1, flapping=True),
    "responder tun": responder("tun"),
    "responder tap": responder("tap"),
    "receivers": receivers,
    "senders": senders,
    "faults": faults,
    "openings": openings,
    "stacks": stacks,
}


def soak(
    seconds: float, round_seconds: float, rate: float, seed: int, plant: str | None = None
) -> int:
    """Run the soak in this process's own network namespace and return the exit status.

    Args:
        seconds: how long; as many rounds as fit, but at least four: two to warm up and two to
            compare.
        round_seconds: how long the devices and the loop of one round live.
        rate: datagrams a second of each flow.
        seed: the seed of all random choices; the machine's timing still varies.
        plant: a fault to plant, one of `planting.PLANTS`.
    """
    # Ctrl-C may end this process in the middle of a round: the namespaces end with it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet()
    planting.prepare(plant)
    scenes = {**_SCENES, "hanging": planting.hanging} if plant == "hang" else _SCENES
    ledger, report = Ledger(), Report(seconds, seed)
    model = Beside(seconds, seed)
    history: list[gauges.Gauge] = []
    end = time.monotonic() + seconds
    for number, (name, loop) in enumerate(itertools.cycle(_LOOPS.items())):
        enough = number >= _WARM_UP + 2 and time.monotonic() > end - round_seconds / 2
        if enough or ledger.problems:
            break
        chance = random.Random(f"{seed} {number}")
        faulthandler.dump_traceback_later(round_seconds + _STUCK, exit=True)
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(_round(scenes, ledger, report, chance, round_seconds, rate))
        faulthandler.cancel_dump_traceback_later()
        planting.after_round(plant)
        if left := names():
            ledger.problem(f"interfaces left after round {number + 1}: {left}")
        gauge = gauges.measure(tidy=True)
        report.end_of_round(number, name, gauge, ledger)
        if number >= _WARM_UP:
            history.append(gauge)
    for grown in gauges.growth(history):
        ledger.problem(grown)
    if said := model.finish(early=bool(ledger.problems)):
        ledger.problem(f"the model: {said}")
    report.final(ledger, history)
    return 1 if ledger.problems else 0


async def _round(
    scenes: dict[str, Scene],
    ledger: Ledger,
    report: Report,
    chance: random.Random,
    seconds: float,
    rate: float,
) -> None:
    stop = asyncio.Event()
    peer = make_namespace()
    status = asyncio.create_task(report.status(ledger))
    try:
        tasks = [
            asyncio.create_task(
                scene(Stage(ledger, random.Random(chance.random()), peer, stop, rate, number)),
                name=name,
            )
            for number, (name, scene) in enumerate(scenes.items(), 11)
        ]
        # A scene that fails ends the round.
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        done, late = await asyncio.wait(tasks, timeout=4 * HANG)
        for task in late:
            ledger.problem(f"{task.get_name()} hangs: {task.get_stack()}")
            task.cancel()
        for task in done:
            if (error := task.exception()) is not None:
                text = "".join(traceback.format_exception(error))
                ledger.problem(f"{task.get_name()} failed:\n{text}")
        await asyncio.gather(*late, return_exceptions=True)
    finally:
        status.cancel()
        os.close(peer)
