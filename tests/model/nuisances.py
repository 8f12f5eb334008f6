"""Rarer things that happen to a device: bad arguments, forks, wrong loops, crowds, floods."""

import asyncio
import contextlib
import importlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import aiotun
from aiotun.testing import isolated

from . import actors, kernel
from .packets import Fault, Flow
from .world import Op, Target, World

__all__ = ["another_namespace", "bad_buffer", "crowd", "flood", "fork", "opening", "wrong_loop"]

_READS = 25  # system calls that may be made for one packet, whoever waits for it


async def bad_buffer(world: World, target: Target, which: int) -> None:
    """recv_into with a buffer that is none: nothing may be taken, or it is counted."""
    buffer: Any = [b"bytes", memoryview(bytearray(400))[::2], bytearray(0), _fortran()][which]
    truncated = target.io.stats.truncated
    op = Op("recv_into (bad buffer)", target, next(world.tickets), disturbed=True)
    world.receiving.append(op)
    try:
        length = await asyncio.wait_for(target.io.recv_into(buffer), 0.002)
    except aiotun.PacketTruncatedError:  # first, as it is a ValueError
        if target.io.stats.truncated <= truncated:
            raise Fault("stats", "a packet was truncated and not counted") from None
        world.truncated += 1
        world.taken_unseen(target)
        for recording in world.recordings:
            recording.unseen += 1
        return
    except (TypeError, ValueError, BufferError, TimeoutError):
        return  # and what was there has to come yet
    except (aiotun.AiotunError, OSError) as error:
        world.legitimate(error, target, op.what)
        return
    finally:
        world.receiving.remove(op)
    if which != 3:
        raise Fault("buffer", f"recv_into took a bad buffer and gave {length}")
    world.received(op, [buffer.tobytes("A")[:length]])


def _fortran() -> Any:
    """A writable buffer in Fortran's order, or an empty one where nothing makes such."""
    try:
        maker = importlib.import_module("_testbuffer")  # of CPython's own tests
    except ImportError:
        return bytearray(0)
    flags = maker.ND_WRITABLE | maker.ND_FORTRAN
    return memoryview(maker.ndarray([0] * 4096, shape=[64, 64], flags=flags))


def fork(world: World, how: int) -> None:
    """A child inherits the device, and closes or detaches it."""
    if not world.fds or world.closed:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about threads
        child = os.fork()
    if child == 0:
        try:
            if how == 0:
                world.device.close()
            else:
                queue = world.base.queues[0] if world.base is not None else world.device
                queue.detach()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def wrong_loop(world: World, target: Target, how: int) -> None:
    """Another loop, of a thread that this one waits for, uses the device: a RuntimeError."""
    if not target.captured:
        return  # of an fd, and nobody's yet: it would belong to that loop
    outcome: list[Any] = []
    io = target.io

    async def attempt() -> Any:
        if how == 2:
            return await io.send(b"")
        return await (io.recv() if how == 0 else io.recv_many(4))

    def work() -> None:
        try:
            outcome.append(asyncio.run(_bounded(attempt())))
        except BaseException as error:  # noqa: BLE001 - told to the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (came,) = outcome
    if isinstance(came, RuntimeError) or came is None:
        return
    if isinstance(came, TimeoutError):
        raise Fault("wrong loop", f"waits on {target.name} instead of raising RuntimeError")
    if isinstance(came, BaseException):
        world.legitimate(came, target, "another loop's call", bad=how == 2)
        return
    op = Op("another loop's recv", target, next(world.tickets))
    world.received(op, came if isinstance(came, list) else [came])


async def _bounded(coroutine: Any) -> Any:
    return await asyncio.wait_for(coroutine, 0.5)


async def crowd(world: World, target: Target, count: int) -> None:
    """Many tasks wait, and one packet comes: it takes a few reads, not one a task."""
    if target.closed or world.lost or world.down or world.moved or world.disabled:
        return
    everybody = [actors.receive(world, target, "recv", 1, 1, "plain", 0, 0) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    world.feed(world.flows[0], 1, 1)
    before = kernel.reads()
    for _ in range(20):
        await asyncio.sleep(0)
    used = kernel.reads() - before
    for actor in reversed(everybody):
        actors.cancel(actor, 1)
    await world.settle()
    if used > _READS:
        raise Fault("reads", f"{used} reads for one packet while {count} tasks wait")


async def flood(world: World, flow: Flow) -> None:
    """More packets than a budget, all at once; one call may not take them all."""
    if world.lost or world.down or world.moved or world.closed:
        return
    if world.config.split:
        world.feed(flow, 40, 64)
    else:
        world.feed(flow, 140, 1)
    target = world.targets[0]
    while world.waiting_for(target):
        actor = actors.receive(world, target, "many", 1_000_000, 1, "plain", 0, 0)
        await world.settle()
        if actor.task is not None and not actor.task.done():
            break


@contextlib.contextmanager
def another_namespace() -> Iterator[int]:
    """An empty network namespace, as an fd."""
    found: list[int] = []

    def work() -> None:
        with isolated() as fd:
            found.append(os.dup(fd))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    try:
        yield found[0]
    finally:
        os.close(found[0])


async def opening(world: World, turns: int, failing: int) -> None:
    """Open another device and cancel that; with `failing`, no thread can be started meanwhile.

    With 1 that begins at the cancellation, with 2 before.
    """
    name = f"o{world.index}"

    async def open_it() -> aiotun.Device:
        return await aiotun.open_tun(name, up=False)

    with contextlib.ExitStack() as stack:
        if failing == 2:
            stack.enter_context(_no_threads())
        task = asyncio.ensure_future(open_it())
        await asyncio.sleep(turns * 0.0005)
        if failing == 1:
            stack.enter_context(_no_threads())
        task.cancel()
        await asyncio.wait([task], timeout=world.patience)
    if not task.done():
        raise Fault("opening", "a cancelled opening goes on")
    try:
        device = task.result()
    except asyncio.CancelledError:
        pass
    except aiotun.AiotunError as error:
        if not failing:
            raise Fault("opening", f"raised {error!r}") from error
    except RuntimeError as error:
        raise Fault("opening", f"cancelled, it raised {error!r}") from error
    else:
        await device.aclose()
    deadline = time.monotonic() + world.patience
    while name in [each for _, each in socket.if_nameindex()]:
        if time.monotonic() > deadline:
            raise Fault("opening", "was cancelled, and the interface is still there")
        await asyncio.sleep(0.001)


def _no_threads() -> Any:
    error = RuntimeError("can't start new thread")  # as CPython says it, for RLIMIT_NPROC
    return mock.patch.object(threading.Thread, "start", side_effect=error)
