"""For tests of programs that use aiotun; `aiotun.pytest_plugin` has these as fixtures.

`memory_pair` gives two connected devices without a kernel, `FaultInjector` makes a device's line a
bad one, `isolated` and `isolated_run` give a network namespace that is nobody else's.
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
    """Run a function in a process of its own, in private network and mount namespaces.

    Root gets just these; anybody else a user namespace around them, in which they are root. The
    network namespace is as that of `isolated`, and ``/sys/class/net`` shows it.

    Args:
        function: is imported in the new process, and so at the top level of a module. Whatever it
            leaves running there ends with it.
        args, kwargs: for the function; pickled, as is what it returns.

    Returns:
        What the function returns. What it raises comes out here, with a note of where.

    Raises:
        NotPermittedError: private namespaces are not allowed; the function was not run.
        RuntimeError: the process ended without a word.

    Blocks; in a program with an event loop, call it by `asyncio.to_thread`.
    """
    # Not fork: a copy of a program with threads, or an event loop, is no place to run anything.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # Pickled here, so that there nothing is imported before the process has moved.
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
        raise RuntimeError(f"the isolated process ended with status {status}, without a result")
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
        pickle.loads(outcome)  # an exception may be pickled in vain
    except Exception as caught:  # noqa: BLE001 - whatever pickling objects of others may raise
        what = f"what the function returned ({value!r})" if error is None else f"{error!r}"
        text = f"{what} can't be sent back: {caught!r}"
        outcome = pickle.dumps((None, RuntimeError(text)))
    connection.send_bytes(outcome)
    connection.close()
