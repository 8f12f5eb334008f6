"""The WireGuard example with boringtun, Cloudflare's WireGuard in Rust.

cargo needs minutes to build it, so these tests are apart from those with other implementations:
`make test-boringtun` builds it and runs them.
"""

import time
from pathlib import Path

import pytest

from ..helpers import fetched
from .test_wireguard import (
    INNER,
    QUICK,
    Side,
    end,
    endpoint,
    joined,
    start_ours,
    start_program,
    transfer,
    until,
)

pytestmark = pytest.mark.peers

REKEY_AFTER_TIME = 120  # seconds; section 6.1 of the WireGuard paper


def start_boringtun(side: Side, other: Side, to: str | None) -> None:
    # No "missing:": CI does not build it.
    program = fetched("boringtun-cli", "boringtun is not built; make test-boringtun does that")
    command = [program, "--foreground", "--disable-drop-privileges", side.name]
    start_program(command, side, other, to)


def start_both(a: Side, b: Side, first: str, *args: str) -> None:
    """Start the example at `a` and boringtun at `b`; only the first knows the other's endpoint."""
    start_boringtun(b, a, endpoint(a) if first == "boringtun" else None)
    start_ours(a, b, endpoint(b) if first == "ours" else None, *args)


FIRST = pytest.mark.parametrize("first", ["ours", "boringtun"])


@FIRST
def test_pings_and_100_mb_pass_both_ways(first: str, tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start_both(a, b, first)
        sides = (a, b) if first == "ours" else (b, a)
        for source, target in (sides, sides[::-1]):
            source.ping(INNER[4][target.index])
            source.ping(INNER[6][target.index])
        transfer(a, b, 4, 100_000_000)
        transfer(b, a, 6, 100_000_000)
        assert end(a) == ""


def test_rekeying_under_traffic(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start_both(a, b, "ours", *QUICK)
        a.ping(INNER[4][1])
        seen = {a.handshake()}
        deadline = time.monotonic() + 30
        while len(seen) < 4:
            assert time.monotonic() < deadline
            transfer(a, b, 4, 3_000_000)
            transfer(b, a, 4, 3_000_000)
            # No ping is lost.
            a.run("ping", "-c", "10", "-i", "0.01", "-W", "2", "-q", INNER[6][1])
            seen.add(a.handshake())
        assert end(a) == ""


@pytest.mark.slow
@pytest.mark.timeout(200)
@FIRST
def test_who_began_makes_new_keys_after_two_minutes(first: str, tmp_path: Path) -> None:
    """With the timers of the protocol: the first handshake's initiator begins the second, too."""
    with joined(tmp_path) as (a, b):
        start_both(a, b, first)
        initiator, responder = (a, b) if first == "ours" else (b, a)
        initiator.ping(INNER[4][responder.index])
        before, began = a.handshake(), time.monotonic()
        # The kernel's ping says at its end how many were lost.
        words = ["ping", "-i", "0.2", "-c", str(5 * (REKEY_AFTER_TIME + 5)), "-q", "-W", "5"]
        said = initiator.run(*words, INNER[4][responder.index])
        assert " 0% packet loss" in said
        assert time.monotonic() - began > REKEY_AFTER_TIME
        until(lambda: a.handshake() > before)
        assert a.handshake() - before >= REKEY_AFTER_TIME - 1
        responder.ping(INNER[6][initiator.index])
        assert end(a) == ""
