"""The `aiotun` command as a process of its own: with a terminal, or with pipes."""

import contextlib
import errno
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

from .helpers import need

COMMAND = [sys.executable, "-W", "error", "-m", "aiotun"]


class Running:
    """A running command. Its output is read as it comes."""

    def __init__(self, process: subprocess.Popen[bytes], out: int, err: int | None) -> None:
        self.process = process
        self.out_fd, self.err_fd = out, err
        self.out = self.err = ""

    def read_until(self, words: str, *, err: bool = False, timeout: float = 20) -> None:
        """Read until the output has these words; with `err`, until stderr has if it is separate."""
        deadline = time.monotonic() + timeout
        while words not in (self.err if err and self.err_fd is not None else self.out):
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"never said {words!r}: {self.out!r} {self.err!r}")

    def _read(self, timeout: float) -> bool:
        """Read once from each stream that is ready; False when all have ended."""
        fds = [fd for fd in (self.out_fd, self.err_fd) if fd is not None and fd >= 0]
        if not fds:
            return False
        for fd in select.select(fds, [], [], timeout)[0]:
            try:
                data = os.read(fd, 65536).decode()
            except OSError as error:  # the terminal's other side has been closed
                if error.errno != errno.EIO:
                    raise
                data = ""
            if fd == self.out_fd:
                self.out += data
                self.out_fd = self.out_fd if data else -1
            else:
                self.err += data
                self.err_fd = self.err_fd if data else -1
        return True

    def end(self, timeout: float = 20) -> int:
        """Read the rest of the output, and return the exit status."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0 and self._read(left):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@contextlib.contextmanager
def piped(
    *args: str, command: list[str] = COMMAND, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Run `aiotun` with stdout and stderr in separate pipes."""
    process = subprocess.Popen(
        [*command, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**(os.environ if env is None else env)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        try:
            yield Running(process, process.stdout.fileno(), process.stderr.fileno())
        finally:
            process.kill()


@contextlib.contextmanager
def in_terminal(
    *args: str, command: list[str] = COMMAND, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Run `aiotun` in a terminal of its own; `type_in` writes there."""
    setsid = need("setsid")
    ours, theirs = pty.openpty()
    try:
        own = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        process = subprocess.Popen(
            [setsid, "--ctty", *command, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**own, "TERM": "xterm", **(env or {})},
        )
        os.close(theirs)
        with process:
            try:
                yield Running(process, ours, None)
            finally:
                process.kill()
    finally:
        os.close(ours)
