"""The pages about virtual machines and TCP/IP stacks: types their commands into a shell."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..documents import programs
from ..helpers import ROOT, need
from .programs import running, wait_for

pytestmark = pytest.mark.peers

# Commands that need a disk with a system (tests/integration/test_guests.py boots guests), or that
# would prove nothing more.
LEFT_OUT = ("qemu", "virtual_switch.py", "kill %1", "curl")


def typed() -> Iterator[tuple[str, list[str]]]:
    """Each command of the pages, and its output according to the page."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        if not re.search(r"\$ python examples/(dhcp_server\.py|lwip_host)", text):
            continue
        text = re.sub(r"\\\n *", "", text)
        for found in re.finditer(r"^( *)\$ (.+)\n((?:\1(?!\$ |```)\S.*\n)*)", text, re.MULTILINE):
            if not any(word in found[2] for word in LEFT_OUT):
                yield found[2], [line.strip() for line in found[3].splitlines()]


def steady(line: str) -> str:
    """The part of a line that is the same each time, without times, versions and counters."""
    return re.split(r" time=|, in |, v\d|(?<=counters ack_sent)", line)[0]


def wait_for_text(output: Path, start: int, wanted: str, command: str) -> None:
    try:
        wait_for(lambda: wanted in output.read_text()[start:], 30)
    except AssertionError:
        said = output.read_text()[start:]
        raise AssertionError(f"{command}: no {wanted!r}; it said\n{said}") from None


def test_the_commands_print_what_the_pages_say(tmp_path: Path) -> None:
    for name in ("udhcpc", "cc", "bash", *programs("\n".join(command for command, _ in typed()))):
        need(name)
    if not Path("/usr/include/lwip/netif/tapif.h").exists():
        pytest.skip("missing: lwIP; install liblwip-dev")
    if importlib.util.find_spec("cffi") is None:
        pytest.skip("missing: cffi; pip install 'aiotun[examples]'")
    # The commands leave files behind.
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "tests/integration").mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "lwip_host.c", tmp_path / "tests/integration")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}
    output = tmp_path / "output"
    # Background programs end with their PID namespace.
    shell = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "bash",
        "-mc",
        f"exec bash -m &>{output}",
    ]
    commands = list(typed())
    assert len(commands) > 10
    with running(shell, cwd=tmp_path, env=env, stdin=subprocess.PIPE) as program:
        assert program.process.stdin is not None
        wait_for(output.exists)
        for command, lines in commands:
            before = len(output.read_text())
            program.process.stdin.write(command + "\n")
            program.process.stdin.flush()
            for line in lines:
                wait_for_text(output, before, steady(line), command)
