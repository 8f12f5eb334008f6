"""Runs the examples and other programs during a test, and ends them."""

import contextlib
import importlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from ..helpers import ROOT, need


def example(name: str, *args: str) -> list[str]:
    """Return the command that runs one of the examples."""
    return [sys.executable, "-W", "error", str(ROOT / "examples" / name), *args]


def example_module(name: str) -> Any:
    """Import a module of the examples as the other examples do: from their folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "examples"))


def wait_for(predicate: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `predicate` returns true, in a test without an event loop."""
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process with all its threads, in seconds (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Program:
    """A running program. A thread reads its output all the time, so it never waits for the test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=[process.stdout])
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._new.put(line.rstrip("\r\n"))
        self._new.put(None)

    def expect(self, text: str, seconds: float = 20.0) -> str:
        """Wait for a line with this text in it."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(self._without(text, f"not within {seconds} s")) from None
            if line is None:
                raise AssertionError(self._without(text, f"ended, {self.process.wait(10)}"))
            self.lines.append(line)
            if text in line:
                return line

    def _without(self, text: str, why: str) -> str:
        return f"no {text!r}: {why}; it said\n" + "\n".join(self.lines[-40:])

    def end(self, number: signal.Signals = signal.SIGTERM, status: int = 0) -> list[str]:
        """End the program by a signal, check its exit status, and return all its output."""
        self.process.send_signal(number)
        return self.wait(status)

    def wait(self, status: int = 0, seconds: float = 20.0) -> list[str]:
        """Wait until the program ends, check its exit status, and return all its output."""
        found = self.process.wait(seconds)
        self._reader.join()
        while (line := self._new.get()) is not None:
            self.lines.append(line)
        assert found == status, f"exit status {found}; it said\n" + "\n".join(self.lines[-40:])
        return self.lines

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)


@contextlib.contextmanager
def running(command: Sequence[str], ready: str | None = None, **options: Any) -> Iterator[Program]:
    """Run a program, wait for a line with `ready` in it if given, and kill the program at the end.

    Its stderr goes to its stdout. The kernel kills it if this process dies first.
    """
    setpriv = need("setpriv")
    with subprocess.Popen(
        [setpriv, "--pdeathsig", "KILL", "--", *command],
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    ) as process:
        program = Program(process)
        try:
            if ready is not None:
                program.expect(ready)
            yield program
        finally:
            program._kill()


@contextlib.contextmanager
def booting(netdev: str, mac: str, *more: str, model: str = "virtio-net-pci") -> Iterator[Program]:
    """Boot a machine from the network with QEMU's built-in iPXE; the output is its screen."""
    qemu = need("qemu-system-x86_64")
    if not Path("/usr/lib/ipxe/qemu").exists():
        pytest.skip("missing: iPXE for QEMU; install ipxe-qemu")
    command = [qemu, "-accel", "tcg", "-m", "64", "-boot", "n", "-nodefaults"]
    command += ["-display", "none", "-netdev", f"{netdev.replace(',', ',id=net,', 1)}"]
    command += ["-device", f"{model},netdev=net,mac={mac}", *more]
    with running(command) as program:
        yield program
