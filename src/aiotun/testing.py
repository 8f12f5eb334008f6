"""Helpers for the tests of programs that use aiotun; `aiotun.pytest_plugin` has fixtures of them.

`memory_pair` returns two connected devices without a kernel interface. `FaultInjector` adds faults
to a device's traffic. `isolated` and `isolated_run` give a private network namespace.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar, cast

from ._kernel import isolation
from ._kernel.isolation import isolated
from ._testing.faults import FaultCounts, FaultInjector
from ._testing.memory import memory_pair
from .errors import AiotunError

__all__ = ["FaultCounts", "FaultInjector", "isolated", "isolated_run", "memory_pair"]

P = ParamSpec("P")
T = TypeVar("T")


def isolated_run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a new process, in private network and mount namespaces.

    For an ordinary user there is also a user namespace around them, in which the user is root. The
    network namespace is like that of `isolated`, and ``/sys/class/net`` shows its interfaces.

    Args:
        function: must be at the top level of a module, because the new process imports it. Threads
            and tasks that the function leaves running end with the process.
        args, kwargs: the function's arguments. They are pickled, and so is the function's result.

    Returns:
        The function's result. If the function raises, its exception is raised here, with the
        traceback as a note.

    Raises:
        NotPermittedError: private namespaces are not allowed. The function was not run.
        RuntimeError: the process ended without a result, or the result can't be pickled.

    This blocks. In a program with an event loop, call it with `asyncio.to_thread`.
    """
    # Not fork: in a forked copy of a program with threads or an event loop, locks may be held
    # forever and fds are shared.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # Pickle here: unpickling imports the function's module, which must happen in the namespaces.
    work = pickle.dumps((function, args, kwargs))
    with ours:
        process = context.Process(target=_run_inside, args=(theirs, work), name="aiotun-isolated")
        process.start()
        theirs.close()
        try:
            outcome: bytes | None = None
            with contextlib.suppress(EOFError):
                outcome = ours.recv_bytes()
        finally:
            process.join()
            status = process.exitcode
            process.close()
    if outcome is None:
        raise RuntimeError(
            f"the isolated process ended with status {status} and without a result; see its stderr"
        )
    value, error = pickle.loads(outcome)
    if error is not None:
        raise error
    return cast(T, value)


def _run_inside(connection: Connection, work: bytes) -> None:
    value, error = None, None
    try:
        isolation.enter()
        function, args, kwargs = pickle.loads(work)
        value = function(*args, **kwargs)
    except Exception as caught:  # noqa: BLE001 - raised again, in the process that asked
        error = caught
        if not isinstance(caught, AiotunError):
            error.add_note("In the isolated process:\n" + traceback.format_exc())
    try:
        outcome = pickle.dumps((value, error))
        pickle.loads(outcome)  # some exceptions can be pickled but not unpickled
    except Exception as caught:  # noqa: BLE001 - whatever pickling objects of others may raise
        what = f"what the function returned ({value!r})" if error is None else f"{error!r}"
        text = f"{what} can't be sent back: {caught!r}"
        outcome = pickle.dumps((None, RuntimeError(text)))
    connection.send_bytes(outcome)
    connection.close()
