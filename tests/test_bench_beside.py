"""The comparison of two checkouts: its command line, and how turns become figures."""

from pathlib import Path

import pytest

from benchmarks import beside
from benchmarks.__main__ import parse
from benchmarks._harness import BenchError


def test_what_follows_beside_are_its_cases(tmp_path: Path) -> None:
    options = parse(["beside", "--other", str(tmp_path), "recv", "ping", "--runs", "5"])
    assert (options.names, options.cases) == (["beside"], ["recv", "ping"])
    assert options.other == tmp_path


def test_beside_needs_another_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["beside"])
    assert "'beside' needs '--other DIR'" in capsys.readouterr().err


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="not a checkout of aiotun"):
        list(beside.run(5, ["asyncio"], other=tmp_path))


def test_an_unknown_case_is_refused_with_those_that_exist() -> None:
    with pytest.raises(BenchError, match="unknown case 'fast' for 'beside'; the cases are recv"):
        list(beside.run(5, ["asyncio"], other=Path(), names=["fast"]))


def test_sides_take_turns_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def side(name: str, *costs: float) -> beside.Turn:
        left = list(costs)

        def turn() -> tuple[float, ...]:
            order.append(name)
            return (left.pop(0),)

        return turn

    found = beside.medians([side("a", 99, 1, 2, 3), side("b", 99, 4, 6, 5)], 3)
    assert found == [[2], [5]]
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_rows_show_the_other_checkout_and_the_ratio_to_it() -> None:
    other, ours = beside.rows_of("captured", [[[2.0, 1.0], [10.0, 64.0]]] * 5)[:2]
    assert (other.name, other.figure) == ("captured (other)", 10)
    assert (ours.name, ours.figure, ours.verdict) == ("captured", 0.2, "reached")
