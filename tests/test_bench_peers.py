"""The benchmark of other libraries: its report, its harness, and one run of each program."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import _building, _charts, report
from benchmarks._building import Installed
from benchmarks._contenders import Contender, present
from benchmarks._harness import BenchError, Row, Table, in_turn, span
from benchmarks._results import as_text
from benchmarks._suite import keep
from benchmarks.peers import _field, _install, cost, echo, forward
from benchmarks.peers.__main__ import SUITE
from benchmarks.peers._contenders import CONTENDERS
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
    for path in report.RESULTS.glob("*.json"):
        text = path.read_text()
        assert as_text(json.loads(text)) + "\n" == text


def test_the_published_page_is_made_of_the_published_results(tmp_path: Path) -> None:
    report.write(report.RESULTS, tmp_path)
    published = [report.DOCS / "benchmarks.md", *(report.DOCS / "benchmarks").iterdir()]
    made = [tmp_path / "benchmarks.md", *(tmp_path / "benchmarks").iterdir()]
    assert {p.name: p.read_text() for p in made} == {p.name: p.read_text() for p in published}


def test_the_report_tells_all_that_was_measured(results: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    report.write(results.parent, docs)
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
    rows = [
        Row("aiotun / C", "ns/packet", [100.0], [100.0], target=1.15),
        Row("aiotun / scapy", "ns/packet", [100.0], [100.0], target=0.9),
    ]
    tables = [Table("cost", "all", "to read <a> packet", rows)]
    keep(results.with_name("peers-b.json"), {"machine": "b", "load": "2"}, "cost", tables)
    docs = tmp_path / "docs"
    report.write(results.parent, docs)
    page = (docs / "benchmarks.md").read_text()
    assert "|  | target | a & b | b |" in page
    both = "1.45x (1.42-1.50) **missed** | 1.00x (1.00-1.00) reached |"
    assert f"to read <a> packet: aiotun / C | ≤ 1.15 | {both}" in page
    both = "0.02x (0.02-0.02) reached | 1.00x (1.00-1.00) **missed** (its target was ≤ 0.9) |"
    assert f"aiotun / scapy | ≤ 1 | {both}" in page
    told = page.rpartition("## Measured on")[2]
    assert "- machine: a & b\n\nAnother machine:\n\n- machine: b\n" in told


def test_a_part_measured_again_replaces_itself_alone(results: Path) -> None:
    keep(results, {}, "cost", [])
    kept = json.loads(results.read_text())
    assert kept["cost"]["tables"] == []
    assert len(kept["forward"]["tables"]) == 1


# --- Figures -------------------------------------------------------------------------------------


def test_the_median_lies_in_the_span_of_95_percent() -> None:
    # The usual tables of order statistics for the median.
    for number, cut in ((1, 0), (5, 0), (8, 0), (9, 1), (12, 2), (20, 5), (40, 13)):
        values = [float(each) for each in range(number)]
        assert span(values) == (values[cut], values[-1 - cut])


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([11.0, 12.0, 13.0], "reached"),
        ([7.0, 8.0, 9.0], "missed"),
        ([9.0, 12.0, 13.0], "not distinguishable"),
        ([10.0, 12.0, 13.0], "reached"),
    ],
)
def test_a_target_within_the_span_can_be_neither_reached_nor_missed(
    ours: list[float], verdict: str
) -> None:
    row = Row("ours", "Gbit/s", ours, [10.0] * 3, target=1.0, at_least=True)
    assert row.verdict == verdict
    assert f">= 1      {verdict}" in str(Table("bench", "all", "what", [row]))
    swapped = Row("ours", "us", [10.0] * 3, ours, target=1.0)
    assert swapped.verdict == verdict


def test_runs_next_to_each_other_are_compared() -> None:
    # The machine is half as fast in the second run.
    row = Row("ours", "us", [10.0, 20.0, 11.0], [5.0, 10.0, 5.5])
    assert row.label == "2.00x (2.00-2.00)"


def test_the_processor_time_stands_next_to_the_throughput(results: Path, tmp_path: Path) -> None:
    rows = [Row("aiotun", "Gbit/s", [9.0, 8.0], cost=[0.5, 0.6]), Row("C", "Gbit/s", [8.0, 9.0])]
    table = Table("forward", "all", "one TCP stream", rows)
    assert "0.55 s/GB" in str(table)
    keep(results, {"machine": "a"}, "forward", [table])
    report.write(results.parent, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| Gbit/s | min | median | max | processor time |" in page
    assert "| aiotun | 8 | 8.5 | 9 | 0.55 s/GB |" in page


def test_cases_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def case(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turn({name: functools.partial(case, name) for name in "ab"}, 2)
    assert order == list("ababab")
    assert found == {"a": [3, 5], "b": [4, 6]}


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
    found = present(CONTENDERS, ["C", "aiotun", "water", "scapy"], installed)
    assert [each.name for each in found] == ["C", "aiotun"]


def test_a_missing_toolchain_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_building.MissingPeerError, match="nosuchtool is not installed"):
        _building.tool("nosuchtool", "~/nowhere")
    with pytest.raises(_building.MissingPeerError, match=r"python.* -c: .*ModuleNotFoundError"):
        _building.run([sys.executable, "-c", "import nosuch"], Path())
    with pytest.raises(_building.MissingPeerError, match="Debian's package is nosuch"):
        _building.debian("nosuch", "nosuchtool")


def test_what_failed_to_install_is_kept_as_the_reason(tmp_path: Path) -> None:
    state = tmp_path / "new" / "installed.json"

    def fails() -> str:
        raise _building.MissingPeerError("no compiler")

    _building.install(state, {"good": lambda: "1.2", "bad": fails})
    found = {"good": Installed("1.2"), "bad": Installed(missing="no compiler")}
    assert _building.installed(state) == found


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
    if not SUITE.state.exists() or _building.installed(SUITE.state)[contender.peer].missing:
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


@pytest.mark.parametrize("name", [name for name in echo.NAMES if "uvloop" not in name])
def test_a_program_answers_pings(name: str, programs: Path) -> None:
    with _field.running(program(name, programs), "echo", "tun0"):
        _field.configure("tun0", "10.82.0.1/24")
        ping = [need("ping"), "-q", "-c", "5", "-i", "0.01", "-W", "5", "10.82.0.2"]
        done = subprocess.run(ping, capture_output=True, text=True, check=False)
        assert "5 received" in done.stdout


@pytest.mark.parametrize("name", [name for name in forward.NAMES if "uvloop" not in name])
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
