"""Runs the code of the README and the documentation and compares its output with the page."""

import ast
import asyncio
import contextlib
import errno
import functools
import inspect
import os
import pty
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..documents import SILENT, Block, Command, blocks_of, matches, pages, programs
from ..helpers import ROOT, need

TUTORIAL = ("first-packets", "ping-responder", "vpn")
PAGES = [page for page in pages() if blocks_of(page)]


# What an interactive shell says of its jobs: "[1] 4711", "[1]+  Terminated   python look.py".
_JOB = re.compile(r"\[\d+\][ +-]")


def session(leader: int) -> list[int]:
    """The processes of the session that this process leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = path.read_text().partition(" (")
            if int(rest.rpartition(")")[2].split()[3]) == leader:
                found.append(int(pid))
    return found


class Shell:
    """One shell for all blocks of a page, with the programs that it has started.

    An interactive one has a terminal and jobs, like the shell of a person who types the commands.
    """

    def __init__(self, folder: Path, *, interactive: bool = False) -> None:
        programs = folder / ".bin"
        programs.mkdir()
        # The tests run as root in these namespaces, so sudo has nothing to do.
        (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
        # Programs start more slowly on a machine that is busy with tests, so sleep longer.
        sleep = shutil.which("sleep")
        (programs / "sleep").write_text(f'#!/bin/sh\n{sleep} "$1"; {sleep} "$1"; {sleep} "$1"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        command, ends = ["bash", "--noprofile", "--norc"], (subprocess.PIPE, subprocess.PIPE)
        if interactive:
            ours, theirs = pty.openpty()
            settings = termios.tcgetattr(theirs)
            settings[1] &= ~termios.ONLCR
            settings[3] &= ~termios.ECHO
            termios.tcsetattr(theirs, termios.TCSANOW, settings)
            command, ends = ["setsid", "--ctty", *command, "--noediting", "-i"], (theirs, theirs)
        self._process = subprocess.Popen(
            command,
            stdin=ends[0],
            stdout=ends[1],
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={
                **env,
                "PS1": "",
                "PS2": "",
                "NO_COLOR": "1",
                "USER": "root",
                "PATH": ":".join(path),
                "PYTHONUNBUFFERED": "1",
                "COLUMNS": "80",
            },
            start_new_session=not interactive,  # setsid does it
        )
        self._input, self._output = self._process.stdin, self._process.stdout
        if interactive:
            os.close(theirs)
            self._input, self._output = os.fdopen(os.dup(ours), "w"), os.fdopen(ours)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._output is not None
        try:
            for line in self._output:
                if not _JOB.match(line):
                    self._lines.put(line.rstrip("\n"))
        except OSError as error:  # the terminal's other side has been closed
            if error.errno != errno.EIO:
                raise

    def run(self, command: Command) -> str | None:
        """Run a command; return what is wrong with its output, or None."""
        assert self._input is not None
        end = f"---{time.monotonic_ns()}---"
        self._input.write(f"{command.text}\necho {end} $?\n")
        self._input.flush()
        printed: list[str] = []
        status: str | None = None
        # The output of a background program may come at any time.
        background = command.text.rstrip().endswith("&")
        deadline = time.monotonic() + 20
        while status is None or (background and not matches(command.output, printed)):
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return f"timeout; expected {command.output}; it printed {printed}"
            before, marker, after = line.partition(end)
            if marker:
                status = after.strip()
                if before:
                    printed.append(before)
            else:
                printed.append(line)
        if status == "127" and any("not found" in line for line in printed):
            pytest.skip(f"missing: {' '.join(printed)}")
        if matches(command.output, printed):
            return None
        return f"status {status}; it printed\n" + "\n".join(printed)

    def close(self) -> None:
        assert self._input is not None
        self._input.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            # End the whole session: the jobs of an interactive shell have groups of their own.
            for pid in session(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                continue
            self._reader.join(5)
            if not self._reader.is_alive():
                break
        self._process.wait()
        self._reader.join()
        assert self._output is not None
        self._output.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.fixture
def shell(folder: Path) -> Iterator[Shell]:
    need("bash")
    shell = Shell(folder)
    try:
        yield shell
    finally:
        shell.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, folder: Path, shell: Shell) -> None:
    threads: list[threading.Thread] = []
    names: dict[str, Any] = {"__name__": "__page__", "knock": functools.partial(knock, threads)}
    for block in blocks_of(page):
        if block.not_run is None:
            for program in programs(block.code):
                need(program)
    with asyncio.Runner() as runner:
        for block in blocks_of(page):
            if block.not_run is not None or block.language.startswith("{"):
                continue
            run_code(runner, page, block.line, block.before, names)
            if block.language in ("python", "ini") and block.file is not None:
                (folder / block.file).write_text(block.text)
            elif block.language == "python":
                run_code(runner, page, block.line, block.text, names)
            elif block.language == "console":
                for command in block.commands:
                    problem = shell.run(command)
                    assert problem is None, f"{page}:{block.line}: {command.text}: {problem}"
    for thread in threads:
        thread.join()


def test_the_tutorial_can_be_typed_into_one_shell(folder: Path) -> None:
    """Page after page, in the shell of a person: the jobs of one page do not disturb the next."""
    need("bash")
    need("setsid")
    tutorial = [ROOT / "docs" / "tutorial" / f"{page}.md" for page in TUTORIAL]
    assert {*tutorial} == {*(ROOT / "docs" / "tutorial").glob("*.md")} - {
        ROOT / "docs" / "tutorial" / "index.md"
    }
    shell = Shell(folder, interactive=True)
    try:
        for page in tutorial:
            for block in blocks_of(page):
                if block.not_run is None and block.file is not None:
                    (folder / block.file).write_text(block.text)
                elif block.not_run is None and block.language == "console":
                    for program in programs(block.code):
                        need(program)
                    for command in block.commands:
                        problem = shell.run(command)
                        assert problem is None, f"{page}:{block.line}: {command.text}: {problem}"
            assert shell.run(Command("jobs", [])) is None, f"{page} leaves a program running"
    finally:
        shell.close()


def knock(threads: list[threading.Thread], address: str) -> None:
    """For a page's hidden code: send a datagram to `address` as soon as there is a route."""

    def send() -> None:
        deadline = time.monotonic() + 20
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while time.monotonic() < deadline:
                try:
                    sock.sendto(b"", (address, 9))
                    return
                except OSError:
                    time.sleep(0.01)

    thread = threading.Thread(target=send)
    threads.append(thread)
    thread.start()


def run_code(
    runner: asyncio.Runner, page: Path, line: int, text: str, names: dict[str, Any]
) -> None:
    code = compile(
        "\n" * (line - 1) + text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    # Code with an await at its top level is compiled to a coroutine's code.
    if code.co_flags & inspect.CO_COROUTINE:

        async def work() -> None:
            await asyncio.wait_for(eval(code, names), 20)

        runner.run(work())
    else:
        exec(code, names)


def test_all_code_is_marked_as_what_it_is() -> None:
    problems: list[str] = []
    for page in pages():
        for block in blocks_of(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            if block.not_run is None and not (
                block.language in ("python", "console", *SILENT) or block.language.startswith("{")
            ):
                problems.append(f"{where}: say what {block.language!r} is, or why it is not run")
            if block.not_run is not None and block.language in SILENT:
                problems.append(f"{where}: {block.language} is not run anyway")
    assert problems == []


def test_files_in_a_page_are_used_there() -> None:
    """Otherwise a file's code would not be run."""
    problems: list[str] = []
    for page in pages():
        blocks = blocks_of(page)
        for number, block in enumerate(blocks):
            if block.file is None or block.not_run is not None or block.language == "text":
                continue
            if page.name == "service.md" and block.language == "ini":
                continue  # for systemd; test_service_units.py checks them
            later = "".join(each.text for each in blocks[number + 1 :] if _runs(each))
            name = block.file.partition(".")[0]
            if not re.search(rf"\b{re.escape(name)}\b", later):
                problems.append(f"{page.relative_to(ROOT)}:{block.line}: nobody runs {block.file}")
    assert problems == []


def _runs(block: Block) -> bool:
    return block.not_run is None and block.language in ("python", "console")


def _run_elsewhere(block: Block) -> bool:
    """Whether another test, which the reason names and which must exist, runs this block."""
    named = re.search(r"tests/\S+\.py", block.not_run or "")
    assert named is None or (ROOT / named[0]).exists(), block.not_run
    return named is not None


def test_what_is_not_run_is_the_exception() -> None:
    blocks = [block for page in pages() for block in blocks_of(page)]
    run = [block for block in blocks if _runs(block)]
    left_out = [block for block in blocks if block.not_run and not _run_elsewhere(block)]
    assert len(left_out) * 3 <= len(run), f"{len(left_out)} are not run, {len(run)} are"


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (["a 1.5 b"], ["a 22.25 b"], True),
        (["10.0.0.1 x"], ["10.0.0.2 x"], False),
        (["time=0.2 ms, 3ms"], ["time=1.9 ms, 41ms"], True),
        (["3 sent"], ["2 sent"], False),
        (["a", "...", "z"], ["a", "b", "c", "z"], True),
        (["a", "...", "z"], ["a", "z"], True),
        (["a ... z"], ["a b z"], True),
        (["a"], ["a", "b"], False),
        ([], [], True),
    ],
)
def test_output_matches_apart_from_ellipses_times_and_decimals(
    expected: list[str], printed: list[str], same: bool
) -> None:
    assert matches(expected, printed) == same
