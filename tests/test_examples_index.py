"""examples/README.md lists every example, and its statements are true."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from .helpers import ROOT

EXAMPLES = ROOT / "examples"
ROW = re.compile(r"\| \[`(.+?)`\]\((.+?)\) \| (.+?) \| (\d+) \|(.*)\|")
ROWS = {
    row[1]: row
    for row in map(ROW.fullmatch, (EXAMPLES / "README.md").read_text().splitlines())
    if row
}
PACKAGES = {"aiohttp", "cffi", "cryptography", "dpkt", "python_socks"}
OPTIONAL = {"uvloop"}  # with --uvloop only


def programs() -> list[str]:
    modules = [each.name for each in EXAMPLES.glob("*.py") if not each.name.startswith("_")]
    return modules + [each.parent.name for each in EXAMPLES.glob("*/__main__.py")]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module.partition(".")[0]


def parts(name: str) -> set[Path]:
    """The files of a program, including those that it imports from the folder."""
    place = EXAMPLES / name
    found: set[Path] = set()
    waiting = list(place.rglob("*.py")) if place.is_dir() else [place]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [EXAMPLES / f"{each}.py" for each in imports(path) if each.startswith("_")]
            waiting = [each for each in waiting if each.exists()]
    return found


def test_every_example_is_listed_once() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert sorted(ROWS) == sorted(programs())
    assert text.count("](") == len(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_what_the_index_says_of_an_example_is_so(name: str) -> None:
    row = ROWS[name]
    assert (EXAMPLES / row[2]).is_file()
    files = parts(name)
    lines = sum(len(each.read_text().splitlines()) for each in files)
    assert abs(int(row[4]) - lines) <= lines / 10, f"{name} has {lines} lines"
    here = {each.stem for each in EXAMPLES.rglob("*.py")} | {
        each.name for each in EXAMPLES.iterdir()
    }
    others = {each for path in files for each in imports(path)} - set(sys.stdlib_module_names)
    packages = {each for each in others - here - OPTIONAL if not each.startswith("_")} - {"aiotun"}
    named = {each.strip() for each in row[5].split(",")} & PACKAGES
    assert named == packages


def test_the_extra_installs_what_the_examples_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["examples"]
    assert {re.split("[<>=]", each)[0].replace("-", "_") for each in extra} == PACKAGES
