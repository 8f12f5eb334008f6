"""A short soak, and that it finds planted faults; `make soak` runs a long one."""

import asyncio
import os
import random
import re
import subprocess
import sys

import pytest

from .helpers import ROOT
from .soak.gauges import Gauge, growth
from .soak.ledger import Flow, Ledger
from .soak.planting import PLANTS
from .soak.stage import Stage

# CI judges a change, so it runs the same soak each time; people's seeds are new ones.
_SEED = ["--seed", "1"] if os.environ.get("CI") else []

# The report of each planted fault.
SAID = {
    "fd": r"fds grew from \d+ to \d+",
    "thread": r"threads grew from \d+ to \d+",
    "memory": r"blocks grew from \d+ to \d+",
    "lose": r"received: \d+ here, \d+ by the kernel's count|unaccounted for",
    "duplicate": r"came twice|received: \d+ here, \d+ by the kernel's count",
    "hang": r"hanging hangs",
}


def soak(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", "0.2", "--round", "3", *_SEED, *options],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_soak_loses_nothing() -> None:
    done = soak()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing lost, nothing grew, nothing hung\n")
    assert "2 on asyncio, 2 on uvloop" in done.stdout
    numbers = dict(re.findall(r"\| ([a-zA-Z ,]+) \| ([\d,]+) \|", done.stdout))
    for what in ("delivered, whole and once", "openings", "flaps", "MTU changes", "TCP bytes",
                 "deletions from outside", "cancelled receivers", "cancelled senders",
                 "faults injected"):  # fmt: skip
        assert int(numbers[what].replace(",", "")) > 0, (what, done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTS)
def test_each_planted_fault_is_found(plant: str) -> None:
    done = soak("--plant", plant)
    assert done.returncode == 1, done.stdout + done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM: ")]
    assert any(re.search(SAID[plant], line) for line in problems), done.stdout


# --- Its parts -----------------------------------------------------------------------------------


def gauges(*rss: int, fds: int = 10, last_fds: int = 10) -> list[Gauge]:
    found = [Gauge(fds, 1, each, 1000) for each in rss]
    return [*found[:-1], found[-1]._replace(fds=last_fds)]


def test_noise_is_no_growth_and_a_leak_is() -> None:
    assert growth([]) == []
    assert growth(gauges(50_000)) == []
    assert growth(gauges(50_000, 53_000, 49_000, 52_900)) == []
    assert growth(gauges(50_000, 52_000, 55_000, 57_000)) == []
    (said,) = growth(gauges(50_000, 52_000, 57_000, 60_000))
    assert said.startswith("rss_kib grew from 52000 to 57000")
    assert growth(gauges(1, 1, last_fds=11)) == ["fds grew from 10 to 11"]


@pytest.fixture
def flow() -> Flow:
    return Flow(Ledger(), "way", random.Random(1))


def test_every_packet_is_accounted_for(flow: Flow) -> None:
    payloads = [flow.make() for _ in range(10)]
    for payload in payloads[:7]:
        flow.arrive(payload)
        flow.count_sent()
    for _ in range(3):
        flow.count_sent()
    ledger = flow.ledger
    ledger.settle("way", flow, dropped=2, uncertain=1)
    assert ledger.problems == []
    assert ledger.packets == {"sent": 10, "delivered": 7, "dropped": 2, "uncounted": 1}
    ledger.settle("way", flow, dropped=2)
    assert ledger.problems == [
        "way: 1 of 10 packets unaccounted for (7 delivered, 2 counted as dropped, 0 uncertain)"
    ]


def test_more_deliveries_than_sent_packets_are_a_problem(flow: Flow) -> None:
    flow.arrive(flow.make())
    flow.ledger.settle("way", flow, dropped=5)
    assert flow.ledger.problems == ["way: 0 packets sent, and 1 delivered"]


def test_torn_twice_and_foreign(flow: Flow) -> None:
    payload = flow.make()
    flow.arrive(payload)
    flow.arrive(payload)
    flow.arrive(payload[:-1])
    flow.arrive(payload[:-1] + bytes([payload[-1] ^ 1]))
    twice, torn, turned = flow.ledger.problems
    assert twice == "way: packet 1 came twice"
    assert "torn" in torn
    assert "torn" in turned
    flow.arrive(b"something else")
    flow.arrive(Flow(Ledger(), "another", random.Random(2)).make())
    assert flow.foreign == 2
    assert flow.delivered == 1


async def test_a_task_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.soak.stage.HANG", 0.01)
    stage = Stage(Ledger(), random.Random(1), -1, asyncio.Event(), 1, 1)
    task = asyncio.create_task(asyncio.Event().wait(), name="waiter")
    await stage.finish(task)
    (said,) = stage.ledger.problems
    assert said.startswith("a task hangs: waiter")
    await asyncio.wait([task])
