"""docs/topics/architecture.md: the names and files in it exist, and its picture shows the rooms."""

import importlib
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from .helpers import ROOT
from .test_exports import MODULES, PACKAGE, ROOMS

PAGE = (ROOT / "docs" / "topics" / "architecture.md").read_text()
WORDS = sorted(set(re.findall(r"`([^`]+)`", PAGE)))
FILES = [each for each in WORDS if re.fullmatch(r"[\w./-]+(/|\.(py|pyi|c|md))", each)]
# Names of other packages are written in full: `os.write`.
NAMES = [each for each in WORDS if re.fullmatch(r"\w+(\.\w+)+", each) and each not in FILES]

ROOMS_PICTURE = ElementTree.parse(ROOT / "docs" / "images" / "rooms.svg").getroot()


def look_up(name: str) -> Any:
    """Find `queue.Queue.recv` in aiotun, or else where Python finds it."""
    words = name.split(".")
    for length in range(len(words) - 1, 0, -1):
        module = ".".join(words[:length])
        if module in MODULES or length == 1:
            found = importlib.import_module(f"aiotun.{module}" if module in MODULES else module)
            for word in words[length:]:
                found = getattr(found, word)
            return found
    raise AssertionError


def reachable(arrows: dict[str, set[str]], room: str) -> set[str]:
    return set().union(*({each} | reachable(arrows, each) for each in arrows[room]))


def test_the_page_names_functions_and_files() -> None:
    assert len(NAMES) > 50
    assert len(FILES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_page_exists(name: str) -> None:
    if name not in MODULES:
        look_up(name)


@pytest.mark.parametrize("file", FILES)
def test_every_file_on_the_page_exists(file: str) -> None:
    sources = ROOT / "src" / "aiotun" / "queue.py"
    if not sources.exists() and (file.startswith("src/") or file.endswith(".c")):
        pytest.skip("the wheel is tested, and a wheel has no sources")
    assert (ROOT / file).exists() or (PACKAGE / file).exists()


def test_the_picture_has_every_room() -> None:
    drawn = [each.get("data-room") for each in ROOMS_PICTURE.iter() if each.get("data-room")]
    assert sorted(drawn, key=str) == sorted(ROOMS)


def test_the_arrows_lead_to_every_room_that_may_be_imported_and_to_no_other() -> None:
    arrows: dict[str, set[str]] = {room: set() for room in ROOMS}
    for each in ROOMS_PICTURE.iter():
        if (source := each.get("data-from")) is not None:
            arrows[source].add(each.attrib["data-to"])
    for room, allowed in ROOMS.items():
        assert arrows[room] <= allowed
        assert allowed <= reachable(arrows, room)
