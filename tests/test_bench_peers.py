"""The benchmark of other libraries: its report, its harness, and one run of each program."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import _charts, report
from benchmarks._harness import BenchError, Row, Table
from benchmarks._results import as_text
from benchmarks.peers import _field, _install, cost
from benchmarks.peers.__main__ import keep
from benchmarks.peers._contenders import CONTENDERS, Contender, present
from benchmarks.peers._install import Installed
from benchmarks.peers._sink import PORT, Sink

from .helpers import need


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results in two parts that were stored one after the other."""
    path = tmp_path / "results" / "peers.json"
    about = {"machine": "a & b", "load": "1"}
    c, ours, theirs = [100.0, 110.0, 120.0], [150.0, 160.0, 170.0], [9000.0, 9100.0, 9200.0]
    rows = [
        Row("C", "ns/packet", c),
        Row("aiotun", "ns/packet", ours, c),
        Row("scapy", "ns/packet", theirs, c),
        Row("aiotun / scapy", "ns/packet", ours, theirs, target=1.0),
        Row("aiotun / C", "ns/packet", ours, c, target=1.15),
    ]
    keep(path, about, "cost", [Table("cost", "all", "to read <a> packet", rows)])
    speed = [Row("aiotun", "Gbit/s", [9.0]), Row("C", "Gbit/s", [8.0])]
    keep(path, about, "forward", [Table("forward", "all", "one TCP stream", speed)])
    return path


def test_a_file_of_results_has_a_line_for_each_measurement(results: Path) -> None:
    text = results.read_text()
    rows = [
        row
        for part in json.loads(text).values()
        for table in part["tables"]
        for row in table["rows"]
    ]
    lines = [line.strip().removesuffix(",") for line in text.splitlines()]
    assert [json.loads(line) for line in lines if line.startswith('{"name"')] == rows


def test_the_published_results_are_stored_like_that() -> None:
    text = report.RESULTS.read_text()
    assert as_text(json.loads(text)) + "\n" == text


def test_the_report_tells_all_that_was_measured(results: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    report.write(results, docs)
    page = (docs / "benchmarks.md").read_text()
    assert "| aiotun | 150 | 160 | 170 | 1.45x (1.42-1.50) |" in page
    assert "to read <a> packet: aiotun / scapy | ≤ 1 | 0.02x (0.02-0.02) reached |" in page
    assert "to read <a> packet: aiotun / C | ≤ 1.15 | 1.45x (1.42-1.50) **missed** |" in page
    assert "| aiotun | 9 |" in page
    assert page.count("- machine: a & b") == 1
    assert "load" not in page.rpartition("## Measured on")[2]
    pictures = list((docs / "benchmarks").iterdir())
    assert [picture.name for picture in pictures] == ["cost-to-read-a-packet.svg"]
    assert f"(benchmarks/{pictures[0].name})" in page


def test_what_another_machine_reached_stands_beside_it(results: Path, tmp_path: Path) -> None:
    rows = [Row("aiotun / C", "ns/packet", [100.0], [100.0], target=1.15)]
    tables = [Table("cost", "all", "to read <a> packet", rows)]
    keep(results.with_name("peers-b.json"), {"machine": "b", "load": "2"}, "cost", tables)
    docs = tmp_path / "docs"
    report.write(results, docs)
    page = (docs / "benchmarks.md").read_text()
    assert "|  | target | a & b | b |" in page
    both = "1.45x (1.42-1.50) **missed** | 1.00x (1.00-1.00) reached |"
    assert f"to read <a> packet: aiotun / C | ≤ 1.15 | {both}" in page
    assert "aiotun / scapy | ≤ 1 | 0.02x (0.02-0.02) reached |  |" in page
    told = page.rpartition("## Measured on")[2]
    assert "- machine: a & b\n\nThe other machine:\n\n- machine: b\n" in told


def test_a_part_measured_again_replaces_itself_alone(results: Path) -> None:
    keep(results, {}, "cost", [])
    kept = json.loads(results.read_text())
    assert kept["cost"]["tables"] == []
    assert len(kept["forward"]["tables"]) == 1


def bars_of(text: str) -> list[tuple[str, float]]:
    root = ElementTree.fromstring(text)
    found = root.iter("{http://www.w3.org/2000/svg}rect")
    return [
        (rect.attrib["class"], float(rect.attrib["width"]))
        for rect in found
        if rect.attrib["class"] != "panel"
    ]


def test_bars_are_as_long_as_the_medians_and_ours_stand_out() -> None:
    samples = {"C": [1.0, 2.0, 9.0], "aiotun & co": [3.0, 4.0, 5.0], "water": [1.0, 1.0, 1.0]}
    text = _charts.chart("A < B", "less", [_charts.Bar(*item) for item in samples.items()])
    (_, c), (kind, ours), (_, water) = bars_of(text)
    assert kind == "ours"
    assert ours == pytest.approx(2 * c, abs=0.2) == pytest.approx(4 * water, abs=0.4)
    assert "prefers-color-scheme: dark" in text


def test_one_bar_that_is_far_longer_is_broken_off() -> None:
    values = {"C": 1.0, "aiotun": 2.0, "water": 1.5, "scapy": 300.0}
    bars = [_charts.Bar(name, [value]) for name, value in values.items()]
    text = _charts.chart("t", "n", bars)
    lengths = [length for _, length in bars_of(text)]
    assert lengths[3] == lengths[1] == max(lengths)
    assert text.count('class="gap"') == 1
    assert ">300<" in text


def test_peers_that_are_not_there_are_left_out() -> None:
    installed = {
        "aiotun": Installed("1"),
        "C": Installed("cc"),
        "water": Installed(missing="no go"),
    }
    found = present(["C", "aiotun", "water", "scapy"], installed)
    assert [each.name for each in found] == ["C", "aiotun"]


def test_a_missing_toolchain_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_install.MissingPeerError, match="nosuchtool is not installed"):
        _install._tool("nosuchtool", "~/nowhere")
    with pytest.raises(_install.MissingPeerError, match=r"python.* -c: .*ModuleNotFoundError"):
        _install._run([sys.executable, "-c", "import nosuch"], Path())


# --- The programs --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the C program. The others exist only if `make bench-peers` has built them."""
    folder = tmp_path_factory.mktemp("peers")
    source = _install.SOURCES / "peer.c"
    words = ["-O1", "-Wall", "-Wextra", "-Werror", "-o", str(folder / "peer"), str(source)]
    subprocess.run([need("cc"), *words], check=True)
    return folder


def program(name: str, programs: Path) -> Contender:
    """A contender that can run here. Tests don't fetch libraries."""
    contender = CONTENDERS[name]
    if contender.peer == "C":
        return Contender(name, "C", (str(programs / "peer"), *contender.command[1:]))
    if contender.peer in ("aiotun", "add_reader"):
        return contender
    if not _install.STATE.exists() or _install.installed()[contender.peer].missing:
        pytest.skip(f"{contender.peer} is not built; make bench-peers does that")
    return contender


@contextlib.contextmanager
def lane(contender: Contender, mode: str) -> Iterator[cost.Lane]:
    sink = Sink()
    try:
        with _field.running(contender, mode, "tun0") as running:
            yield cost.Lane(running, 0, sink)
    finally:
        sink.close()


plain = pytest.mark.parametrize("name", [name for name in cost.NAMES if "uvloop" not in name])


@plain
def test_a_program_reads_what_waits(name: str, programs: Path) -> None:
    with lane(program(name, programs), "read") as found:
        assert found.read(84, 30) > 0  # which counts them
        assert found.read(1400, 30) > 0


@plain
def test_a_program_writes_what_it_is_told(name: str, programs: Path) -> None:
    with lane(program(name, programs), "write") as found:
        assert found.write(84, 130) > 0
        assert found.write(1400, 130) > 0


@plain
def test_a_program_answers_pings(name: str, programs: Path) -> None:
    with _field.running(program(name, programs), "echo", "tun0"):
        _field.configure("tun0", "10.9.0.1/24")
        ping = [need("ping"), "-q", "-c", "5", "-i", "0.01", "-W", "5", "10.9.0.2"]
        done = subprocess.run(ping, capture_output=True, text=True, check=False)
        assert "5 received" in done.stdout


@pytest.mark.parametrize("name", [name for name in CONTENDERS if "uvloop" not in name])
def test_a_program_forwards(name: str, programs: Path) -> None:
    contender = program(name, programs)
    with contextlib.ExitStack() as stack:
        far = _field.Far(stack, iperf=False)
        way = _field.forwarder(stack, contender, 0, far)
        before = way.bytes
        ping = [need("ping"), "-q", "-c", "3", "-i", "0.01", "-W", "5", way.target]
        done = subprocess.run(ping, capture_output=True, text=True, check=False)
        assert "3 received" in done.stdout
        assert [a - b for a, b in zip(way.bytes, before, strict=True)] == [3 * 84] * 2
        assert way.program.memory() > 0


def test_a_program_that_is_gone_is_noticed(programs: Path) -> None:
    with _field.running(program("C", programs), "read", "tun0") as running:
        os.kill(running.pid, 9)
        with pytest.raises((BenchError, BrokenPipeError)):
            cost.Lane(running, 0, None).read(84, 1)


def test_a_program_that_ends_at_an_order_is_noticed() -> None:
    command = ["sh", "-c", "read order"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        program = _field.Program(process, Contender("ended", "none", tuple(command)))
        with pytest.raises(BenchError, match="ended before it answered"):
            program.order(1)


def test_the_sink_counts_what_it_throws_away(netns: Any) -> None:
    import socket

    sink = Sink()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(5):
                sock.sendto(b"x" * 20, ("127.0.0.1", PORT))
        assert sink.count == 5
    finally:
        sink.close()
