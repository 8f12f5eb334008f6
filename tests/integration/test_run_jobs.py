"""`aiotun run` as a job of a shell, and the signals that it gets."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..commandline import COMMAND, Running, in_terminal
from ..helpers import need
from .internet import run
from .test_wireguard import until

RUN = f"{' '.join(COMMAND)} run"
PROMPT = "your turn> "

# Marks are not in the words that are typed, which the terminal shows, too.
READER = "sh -c 'echo rea\"\"dy; while read x; do echo got-$x; done'"

# What programs with a screen do at Ctrl-Z: they restore the terminal, and only then stop.
SCREEN = f"""{sys.executable} -c '
import os, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    print("resto" + "red", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
signal.signal(signal.SIGTSTP, stop)
print("rea" + "dy", flush=True)
for line in iter(sys.stdin.readline, ""): print("got-" + line, flush=True)
'"""


@contextmanager
def shell(*options: str) -> Iterator[Running]:
    """A shell in a terminal, that has asked for a line.

    It edits no lines: it would lose what is typed while it prepares the terminal for that.
    """
    words = [need("bash"), "--norc", "--noediting", "-i", *options]
    with in_terminal(command=words, env={"PS1": PROMPT}) as running:
        running.read_until(PROMPT)
        yield running


def type_in(running: Running, text: str) -> None:
    running.out = ""
    os.write(running.out_fd, text.encode())


def answer(running: Running, line: str, words: str) -> None:
    """Type a line; wait for words of the command, and for the next prompt."""
    type_in(running, f"{line}\n")
    running.read_until(words)
    running.out = running.out.partition(words)[2]
    running.read_until(PROMPT)


def until_continued(running: Running) -> None:
    """Wait until aiotun goes on, too, and handles Ctrl-Z again. People don't type as fast."""
    bash = running.process.pid
    (child,) = Path(f"/proc/{bash}/task/{bash}/children").read_text().split()

    def handles() -> bool:
        status = Path(f"/proc/{child}/status").read_text()
        (caught,) = re.findall(r"SigCgt:\s(\w+)", status)
        return bool(int(caught, 16) >> (signal.SIGTSTP - 1) & 1)

    until(handles)


def continue_and_end(running: Running, name: str = "aiotun run") -> None:
    """Continue the job that reads, and interrupt it."""
    type_in(running, "fg\n")
    running.read_until(name)
    type_in(running, "line\n")
    running.read_until("got-line")
    type_in(running, "\x03")  # Ctrl-C
    running.read_until(PROMPT)
    answer(running, "echo st''atus $?", "status 130")


@pytest.mark.parametrize("program", [READER, SCREEN], ids=["reader", "screen"])
def test_ctrl_z_stops_it_and_fg_continues_it(program: str) -> None:
    """Two times; what is typed meanwhile is the shell's, not the command's."""
    with shell() as running:
        type_in(running, f"{RUN} -- {program}\n")
        running.read_until("ready")
        for _ in range(2):
            type_in(running, "\x1a")  # Ctrl-Z
            running.read_until("Stopped")
            running.read_until(PROMPT)
            if program == SCREEN:
                assert running.out.index("restored") < running.out.index("Stopped")
            answer(running, "jobs", "Stopped")
            type_in(running, "fg\n")
            running.read_until("aiotun run")
            type_in(running, "more\n")
            running.read_until("got-more")
            until_continued(running)
        type_in(running, "\x1a")
        running.read_until("Stopped")
        running.read_until(PROMPT)
        answer(running, "echo st''atus $?", "status 14")  # 128 and SIGTSTP or SIGSTOP
        continue_and_end(running)


def test_a_command_that_ignores_ctrl_z_goes_on() -> None:
    ignoring = READER.replace("echo", 'trap "" TSTP; echo', 1)
    with shell() as running:
        type_in(running, f"{RUN} -- {ignoring}\n")
        running.read_until("ready")
        type_in(running, "\x1a")
        type_in(running, "line\n")
        running.read_until("got-line")
        type_in(running, "\x04")  # Ctrl-D
        running.read_until(PROMPT)
        answer(running, "echo st''atus $?", "status 0")


def test_a_shell_inside_can_be_suspended() -> None:
    """It has a process group of its own; the outer shell continues only ours."""
    inner = "inside> "
    with shell() as running:
        type_in(running, f"PS1='{inner}' {RUN} -- bash --norc --noediting -i\n")
        running.read_until(f"\n{inner}")
        type_in(running, "suspend\n")
        running.read_until("Stopped")
        running.read_until(PROMPT)
        type_in(running, "fg\n")
        running.read_until("aiotun run")
        type_in(running, "echo on''ce more\n")
        running.read_until("once more")
        type_in(running, "exit 3\n")
        running.read_until(PROMPT)
        answer(running, "echo st''atus $?", "status 3")


def test_a_command_in_the_background_stops_when_it_reads() -> None:
    with shell() as running:
        type_in(running, f"{RUN} -- {READER} &\n")
        running.read_until("ready")
        type_in(running, "wait\n")
        running.read_until("Stopped")
        continue_and_end(running)


def test_messages_do_not_stop_it_while_a_job_inside_has_the_terminal() -> None:
    program = "echo >/dev/tcp/192.0.2.1/80"
    with shell() as running:
        options = "--log --deny 192.0.2.1"
        inner = f"bash -c 'set -m; stty tostop; bash -c \"{program}\"; echo en''d'"
        type_in(running, f"{RUN} {options} -- {inner}\n")
        running.read_until("denied")
        running.read_until("end")
        running.read_until(PROMPT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
async def test_without_a_terminal_every_signal_is_passed_on(number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 3' {int(number)}; echo ready; while :; do sleep 0.1; done"
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "run", "--", "sh", "-c", script, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, _ = await process.communicate()
    assert (process.returncode, out) == (3, b"got\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
async def test_what_is_ignored_stays_ignored(number: signal.Signals) -> None:
    """By nohup(1), for example."""
    ignoring = ["sh", "-c", f'trap "" {int(number)}; exec "$@"', "sh"]
    ended = await run("--", "grep", "SigIgn", "/proc/self/status", command=[*ignoring, *COMMAND])
    assert int(ended.out.split()[1], 16) >> (number - 1) & 1, ended.err
