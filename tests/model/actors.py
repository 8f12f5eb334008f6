"""The tasks of the model: every way to receive and to send, cancelled in every way."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import aiotun

from . import kernel
from .packets import OUT, Fault, Flow, make, payload, waiting_frame
from .world import Actor, Op, Target, World

__all__ = ["Actor", "cancel", "receive", "send"]

_SHORT = 100  # bytes: enough for the headers and our own


async def _recv(io: Any, limit: int) -> list[bytes]:
    return [await io.recv()]


async def _into(io: Any, limit: int) -> list[bytes]:
    buffer = bytearray(70_000)
    length = await io.recv_into(buffer)
    return [bytes(buffer[:length])]


async def _many(io: Any, limit: int) -> list[bytes]:
    batch: list[bytes] = await io.recv_many(limit)
    return _limited(batch, limit)


async def _anext(io: Any, limit: int) -> list[bytes]:
    return [await anext(aiter(io))]


async def _batches(io: Any, limit: int) -> list[bytes]:
    batch: list[bytes] = await anext(io.batches(limit))
    return _limited(batch, limit)


async def _decoded(io: Any, limit: int) -> list[bytes]:
    return [bytes(await anext(io.decoded()))]


def _limited(batch: list[bytes], limit: int) -> list[bytes]:
    if not 1 <= len(batch) <= limit:
        raise Fault("batch", f"{len(batch)} packets with limit={limit}")
    return batch


_RECEIVE: dict[str, Callable[[Any, int], Coroutine[Any, Any, list[bytes]]]] = {
    "recv": _recv,
    "into": _into,
    "many": _many,
    "anext": _anext,
    "batches": _batches,
    "decoded": _decoded,
}


async def _take(world: World, op: Op, how: str, limit: int) -> None:
    """One call that receives, and its account; nothing but a cancellation comes out."""
    op.ticket = next(world.tickets)  # here: a task of its own may have begun later
    world.receiving.append(op)
    try:
        with _caught(world):
            try:
                if how == "short":
                    await _take_short(world, op)
                    return
                datas = await _RECEIVE[how](op.target.io, limit)
            except (aiotun.DeviceClosedError, StopAsyncIteration) as error:
                if not op.target.closed:
                    raise Fault(
                        "error",
                        f"{op.what} of {op.target.name} ended with {error!r}; {world.told()}",
                    ) from error
            except (aiotun.AiotunError, OSError) as error:
                world.legitimate(error, op.target, op.what)
            else:
                world.received(op, datas, bare=how == "decoded")
    finally:
        world.receiving.remove(op)


async def _take_short(world: World, op: Op) -> None:
    buffer = bytearray(_SHORT)
    try:
        length = await op.target.io.recv_into(buffer)
    except aiotun.PacketTruncatedError:
        world.truncated += 1
        world.received(op, [bytes(buffer)], cut=True)
    else:
        world.received(op, [bytes(buffer[:length])])


@contextlib.contextmanager
def _caught(world: World) -> Iterator[None]:
    """Keep what broke for whoever runs the model; a task's exception would be told late."""
    try:
        yield
    except Fault as fault:
        world.faults.append(fault)
    except Exception as error:  # noqa: BLE001 - whatever the library lets out is a finding
        world.faults.append(Fault("error", f"{error!r} came out; {world.told()}"))
        world.faults[-1].__cause__ = error


Make = Callable[[Op], Coroutine[Any, Any, None]]


async def _wrapped(
    world: World, wrap: str, seconds: float, make_op: Callable[[], Op], go: Make
) -> None:
    """Await one call in the way that `wrap` says."""
    op = make_op()
    if wrap == "plain":
        await go(op)
    elif wrap == "timeout":
        op.disturbed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await go(op)
    elif wrap == "wait_for":
        op.disturbed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(go(op), seconds)
    elif wrap == "shield":
        inner = asyncio.ensure_future(go(op))
        world.actors.append(Actor(f"shielded {op.what}", [op], inner))
        await asyncio.shield(inner)
    elif wrap == "group":
        other = make_op()
        async with asyncio.TaskGroup() as group:
            group.create_task(go(op))
            group.create_task(go(other))
    else:  # a task that cancels itself: at its next await, whatever that is
        op.disturbed = True
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await go(op)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            task.uncancel()


def receive(
    world: World,
    target: Target,
    how: str,
    limit: int,
    rounds: int,
    wrap: str,
    milliseconds: int,
    extra: int,
) -> Actor:
    """Start a task that receives."""
    if how in ("decoded", "short") and world.config.raw:
        how = "recv"  # a super-packet has no header there to be known by, or is cut in the middle
    if how == "decoded" and world.config.mode.startswith("pair"):
        how = "anext"
    what = f"{how} ({wrap})"
    ops: list[Op] = []

    def make_op() -> Op:
        ops.append(Op(what, target))
        return ops[-1]

    async def run() -> None:
        for _ in range(rounds):
            await _wrapped(
                world, wrap, milliseconds / 1000, make_op, lambda op: _take(world, op, how, limit)
            )
            # A cancellation may be swallowed where the result was there already (wait_for).
            if target.closed or world.lost or world.faults or actor.cancelled:
                return
            with _caught(world):
                for _ in range(extra):
                    world.nowait(target, f"recv_nowait after {what}")

    actor = Actor(what, ops=ops)
    world.actors.append(actor)
    actor.task = asyncio.ensure_future(run())
    return actor


def send(
    world: World,
    target: Target,
    how: str,
    flow: Flow,
    count: int,
    wrap: str,
    milliseconds: int,
    bad_at: int | None,
) -> Actor:
    """Start a task that sends."""
    if world.config.mode.startswith("pair") or bad_at is None or bad_at > count:
        bad_at = None  # a socket takes anything
    what = f"send {how} ({wrap})"
    ops: list[Op] = []

    def make_op() -> Op:
        ops.append(Op(what, target))
        return ops[-1]

    async def run() -> None:
        await _wrapped(
            world,
            wrap,
            milliseconds / 1000,
            make_op,
            lambda op: _put(world, op, how, flow, count, bad_at),
        )

    actor = Actor(what, ops=ops)
    world.actors.append(actor)
    actor.task = asyncio.ensure_future(run())
    return actor


async def _put(world: World, op: Op, how: str, flow: Flow, count: int, bad_at: int | None) -> None:
    """One call that sends, and its account."""
    config, io = world.config, op.target.io
    op.ticket = next(world.tickets)
    world.calls_to_send += 1
    if len(world.fds) > 1:
        world.epoch += 1  # the kernel sends the flow to another queue from now on, perhaps
    packets = [world.out.add(flow.number, int(op.ticket) + 1, "doubtful") for _ in range(count)]
    datas = []
    for packet in packets:
        packet.captured = op.target.captured
        body = payload(OUT, flow.number, packet.number, config.size)
        data = make(flow, [body], config.frame)
        if config.frame and not config.split:
            data = waiting_frame(data)
        datas.append(bytes(10 if config.raw else 0) + data)
    if bad_at is not None:
        datas.insert(bad_at, b"")
    before = _kernel_packets(world) if how == "list" else None
    alone, calls = not world.sending, world.calls_to_send
    sent = 0
    unsent: Any = None
    error: BaseException | None = None
    world.sending.append(op)
    try:
        if how == "list":
            sent = await io.send_many(datas)
        elif how == "generator":
            sent = await io.send_many(data for data in datas)
        else:
            for data in datas:
                if how == "nowait":
                    io.send_nowait(data)
                else:
                    await io.send(data)
                sent += 1
    except BaseException as caught:  # noqa: BLE001 - judged below, a cancellation raised again
        error = caught
        if how in ("list", "generator"):
            sent = getattr(caught, "sent", -1)
            unsent = getattr(caught, "unsent", None)
    finally:
        world.sending.remove(op)
        if len(world.fds) > 1:
            world.epoch += 1  # a queue may have gone meanwhile, and its flow moved to another
    with _caught(world):
        if error is not None and not isinstance(error, asyncio.CancelledError):
            _judge(world, op, how, error, bad_at, sent, alone)
        if sent < 0:
            raise Fault("sent", f"{op.what} raised {error!r}, which has no attribute sent")
        if error is not None and how in ("list", "generator"):
            # All are of one flow, and of a generator only those count that were taken.
            others = datas[sent:] if how == "list" else datas[sent:][: len(unsent or ())]
            if unsent != others:
                raise Fault("unsent", f"{op.what} raised {error!r} with sent={sent}, {unsent=}")
        _account(world, op, packets, sent, count if error is None else None)
        # A long list gives the loop turns, in which other tasks may have sent.
        alone = alone and not world.sending and world.calls_to_send == calls
        if before is not None and error is None and alone:
            _check_merged(world, op, before, count)
    if isinstance(error, asyncio.CancelledError):
        raise error


def _judge(
    world: World,
    op: Op,
    how: str,
    error: BaseException,
    bad_at: int | None,
    sent: int,
    alone: bool,
) -> None:
    if isinstance(error, BlockingIOError) and how == "nowait" and (world.config.waits or not alone):
        return
    bad = bad_at is not None and sent == bad_at
    world.legitimate(error, op.target, op.what, bad=bad, saw_down=op.saw_down)


def _account(world: World, op: Op, packets: list[Any], sent: int, whole: int | None) -> None:
    if whole is not None and sent != whole:
        raise Fault("sent", f"{op.what} gave {sent} for {whole} packets")
    for place, packet in enumerate(packets):
        if place < sent:
            if packet.state != "done" and not world.moved and not world.lost:
                world.out.mark(packet, "there")
        elif packet.state == "done":
            raise Fault("unsent", f"{op.what} sent packet {packet.number}, and says sent={sent}")
        else:
            world.out.mark(packet, "never")
    world.collect()


def _kernel_packets(world: World) -> int | None:
    """What the kernel counts as packets from the program, where merging has to show."""
    if not (world.config.split and world.config.linked):
        return None
    found = kernel.counters(world.name)
    return found.rx_packets if found else None


def _check_merged(world: World, op: Op, before: int, count: int) -> None:
    after = _kernel_packets(world)
    if after is None or world.device.stats.split_fallbacks:
        return
    if after - before > 3 + count // 8:
        raise Fault(
            "merging",
            f"{op.what}: {count} adjoining packets of one flow went as {after - before}, "
            f"{'' if world.recordings else 'not '}captured",
        )


def cancel(actor: Actor, times: int) -> None:
    """Cancel a task; its calls may give up their places from now on."""
    if actor.task is None or actor.task.done():
        return
    for op in actor.ops:
        op.disturbed = True
    actor.cancelled = True
    for _ in range(times):
        actor.task.cancel()
