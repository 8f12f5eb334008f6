"""The benchmark of the netstack: one short measurement of each program, and its report."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import _building, report
from benchmarks._contenders import Contender
from benchmarks._harness import BenchError, Row, Table
from benchmarks._suite import keep
from benchmarks.netstack import (
    datagrams,
    faults,
    opening,
    run,
    start,
    streams,
    tun2socks,
    wireguard,
)
from benchmarks.netstack.__main__ import SUITE
from benchmarks.netstack._contenders import CONTENDERS, RAW, STACKS, Host, host

from .helpers import need


def program(name: str) -> Contender:
    """A contender that can run here. Tests don't fetch stacks."""
    contender = CONTENDERS[name]
    if contender.peer != "aiotun" and (
        not SUITE.state.exists() or _building.installed(SUITE.state)[contender.peer].missing
    ):
        pytest.skip(f"{contender.peer} is not built; make bench-netstack does that")
    return contender


@contextlib.contextmanager
def running(name: str) -> Iterator[Host]:
    need("cc")
    with contextlib.ExitStack() as stack:
        yield host(stack, program(name), 0)


@pytest.mark.parametrize("name", STACKS)
def test_a_program_serves_what_the_contract_says(name: str) -> None:
    with running(name) as at:
        for way in ("up", "down"):
            gbits, seconds = streams.stream(at, way, 2, 50)
            assert gbits > 0
            assert seconds >= 0
        assert streams.connections(at, 50) > 0


@pytest.mark.parametrize("name", datagrams.NAMES)
def test_a_program_sends_datagrams_back(name: str) -> None:
    with running(name) as at:
        assert len(streams.client("echo", at, 1, 20)) == 20


def test_a_stream_that_the_device_did_not_carry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("aiotun raw") as at:
        monkeypatch.setattr(streams, "client", lambda *args: [10**9, 1])
        with pytest.raises(BenchError, match="the device carried 0"):
            streams.stream(at, "up", 1)


def test_opening_is_measured() -> None:
    tables = list(opening.run(1, [program(RAW)]))
    assert [len(table.rows) for table in tables] == [3, 1]
    assert all(row.figure > 0 for table in tables for row in table.rows)


def test_datagrams_are_measured() -> None:
    (table,) = datagrams.run(1, [program(RAW)])
    assert [row.name for row in table.rows] == [RAW]
    assert table.rows[0].cost[0] > 0


# --- Programs ------------------------------------------------------------------------------------


@pytest.fixture
def iperf3() -> None:
    need("iperf3")
    need("cc")


@pytest.mark.parametrize("name", run.NAMES)
def test_a_command_starts_and_is_carried(
    name: str, iperf3: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (table,) = start.run(1, [program(name)])
    assert table.rows[0].figure > 0
    monkeypatch.setattr(run, "STREAMS", (2,))
    tables = list(run.run(1, [program(name)]))
    assert [table.what for table in tables] == [f"2 TCP streams {way}" for way in run.WAYS.values()]
    assert all(table.rows[0].figure > 0 and table.rows[0].cost[0] > 0 for table in tables)


def test_delay_and_loss_are_measured(iperf3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PINGS", 2)
    monkeypatch.setattr(faults, "DATAGRAMS", 200)
    delay, drop = faults.run(1, [program("aiotun run")])
    assert delay.rows[0].figure >= 100
    assert 0 < drop.rows[0].figure < 30


@pytest.mark.parametrize("name", [wireguard.NAMES[0], wireguard.NAMES[-1]])
def test_a_download_passes_the_tunnel(
    name: str, iperf3: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("wireguard-go's netstack")  # the other end is of the same build
    monkeypatch.setattr(wireguard, "SECONDS", 0.1)
    (table,) = wireguard.run(1, [program(name)])
    assert table.rows[0].figure > 0


@pytest.mark.parametrize("name", tun2socks.NAMES)
def test_a_stream_passes_the_proxy(
    name: str, iperf3: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("gVisor")  # the proxy is of the same build
    monkeypatch.setattr(run, "STREAMS", (2,))
    tables = list(tun2socks.run(1, [program(name)]))
    assert all(table.rows[0].figure > 0 for table in tables)


# --- The report ----------------------------------------------------------------------------------


def test_the_page_has_the_parts_of_the_netstack(tmp_path: Path) -> None:
    about = {"machine": "a"}
    target = Row("aiotun raw / gVisor", "Gbit/s", [8.0], [1.0], target=8, at_least=True)
    rows = [Row("aiotun raw", "Gbit/s", [8.0]), Row("gVisor", "Gbit/s", [1.0]), target]
    keep(tmp_path / "peers.json", about, "cost", [])
    table = Table("netstack", "all", "one TCP stream into the stack", rows)
    keep(tmp_path / "netstack.json", about, "netstack streams", [table])
    assert json.loads((tmp_path / "netstack.json").read_text())
    rows = [
        Row("new_namespace", "ms", [12.0, 14.0, 13.0], target=40),
        Row("socket", "us", [9.0, 9.0, 9.0]),
    ]
    keep(
        tmp_path / "netstack.json", about, "netstack opening", [Table("netstack", "all", "x", rows)]
    )
    report.write(tmp_path, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| new_namespace, ms | 12 | 13 | 14 |  |" in page
    assert "| socket, µs | 9 | 9 | 9 |  |" in page
    assert "| x: new_namespace | ≤ 40 | 13 reached |" in page
    assert "## Netstack: TCP" in page
    assert "| one TCP stream into the stack: aiotun raw / gVisor | ≥ 8 |" in page
