"""Makes this program and the command one job for the shell that started them.

The command runs in our process group, so that the terminal is its own as well as ours: the terminal
sends Ctrl-C, Ctrl-\\ and Ctrl-Z to the whole group, and the command decides what they mean. This
program follows: it ends when the command ends, and stops when the command stops.
"""

import asyncio
import contextlib
import os
import signal
import threading
from typing import Self

__all__ = ["Job"]

_TERMINAL = "/dev/tty"  # of this process; tty(4)


class Job:
    """Handles the signals of this process, which are meant for the command.

    It begins before the command starts: the command may say that it is ready, and somebody may send
    a signal for it, before this process knows that it has started.
    """

    _FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
    _FOR_THE_COMMAND = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._early: list[signal.Signals] = []
        self._handled: list[signal.Signals] = []

    def __enter__(self) -> Self:
        for number in (*self._FROM_TERMINALS, *self._FOR_THE_COMMAND):
            self._handle(number)
        if _foreground() is not None:  # without a terminal nobody would continue us
            self._handle(signal.SIGTSTP)
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._look)
            self._handled.append(signal.SIGCHLD)
        return self

    def __exit__(self, *error: object) -> None:
        loop = asyncio.get_running_loop()
        for number in self._handled:
            loop.remove_signal_handler(number)

    def _handle(self, number: signal.Signals) -> None:
        # An ignored signal (nohup, a shell's background job) stays ignored, here and in the
        # command, which would not inherit that if we had a handler.
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, self._came, number)
            self._handled.append(number)

    def begin(self, process: asyncio.subprocess.Process) -> None:
        """Pass signals on to the command, which has started."""
        self._process = process
        # Those of the terminal, too: the command ignores Ctrl-C while it starts. If it has started
        # since, it gets a signal twice.
        for number in self._early:
            _kill(process.pid, number)
        # A shell inside has a process group of its own, and the terminal is that group's. Under
        # 'stty tostop' our messages would stop us, and with us the command's network. Not earlier:
        # the command would inherit that the signal is ignored.
        if signal.getsignal(signal.SIGTTOU) is signal.SIG_DFL:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        if signal.SIGCHLD in self._handled:
            self._look()  # a shell that has its own process group may have stopped already

    def _came(self, number: signal.Signals) -> None:
        if self._process is not None:
            if number in self._FOR_THE_COMMAND or not self._has_it_too(self._process.pid):
                _kill(self._process.pid, number)
        elif number != signal.SIGTSTP:
            self._early.append(number)
        else:
            try:
                os.waitid(*self._child(), os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # there is no process yet that could stop
                self._stop(number)

    def _child(self) -> tuple[int, int]:
        """The command, in the words of waitid(2).

        While it starts, it is our only child in our process group.
        """
        if self._process is None:
            return os.P_PGID, os.getpgrp()
        return os.P_PID, self._process.pid

    def _has_it_too(self, pid: int) -> bool:
        """Whether the terminal, if it has sent us this signal, has sent it to the command as well.

        A signal from kill(1) while both are in the foreground looks the same, and is lost.
        """
        with contextlib.suppress(ProcessLookupError):
            return os.getpgid(pid) == os.getpgrp() == _foreground()
        return True  # the command has ended

    def _look(self) -> None:
        """Stop if the command has stopped.

        Not before that: when this process stops, the shell takes the terminal back, and the command
        would still read from it what is typed for the shell, or restore the screen.
        """
        with contextlib.suppress(ChildProcessError):  # it has ended
            while found := os.waitid(*self._child(), os.WSTOPPED | os.WNOHANG):
                self._stop(signal.Signals(found.si_status))
                # The shell has continued our process group. The command may be in another one. If
                # it is in ours, it may have stopped again before we ran: then leave it so.
                changes = os.WCONTINUED | os.WSTOPPED | os.WNOWAIT
                if os.waitid(os.P_PID, found.si_pid, changes | os.WNOHANG) is None:
                    _continue(found.si_pid)

    def _stop(self, number: signal.Signals) -> None:
        """Stop this process as this signal does, which the shell then shows; return afterwards."""
        before = None
        if number != signal.SIGSTOP:
            before = signal.signal(number, signal.SIG_DFL)
        # To this thread, so that the process has stopped before the call returns.
        signal.pthread_kill(threading.get_ident(), number)
        if before is not None:
            signal.signal(number, before)


def _continue(pid: int) -> None:
    """Continue the command as the shell has continued us."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) != pid:
            os.kill(pid, signal.SIGCONT)
            return
        # A shell that was suspended. Without the terminal it would find that it can't read.
        if _foreground() == os.getpgrp():
            _give_terminal_to(pid)
        os.killpg(pid, signal.SIGCONT)


def _foreground() -> int | None:
    """The process group that our terminal sends signals to; None if there is no terminal."""
    with contextlib.suppress(OSError), open(_TERMINAL, "rb", 0) as terminal:
        return os.tcgetpgrp(terminal.fileno())
    return None


def _give_terminal_to(group: int) -> None:
    with contextlib.suppress(OSError), open(_TERMINAL, "rb", 0) as terminal:
        os.tcsetpgrp(terminal.fileno(), group)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
