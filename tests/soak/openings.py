"""Opens and closes devices, deletes them while tasks read them, and cancels openings."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import aiotun
from aiotun import DeviceClosedError, DeviceLostError
from aiotun.device import Opener

from .network import delete_link, names, udp_socket
from .stage import HANG, Stage

__all__ = ["openings"]


async def openings(stage: Stage) -> None:
    number = 0
    while not stage.stop.is_set():
        number += 1
        way = stage.chance.choice([_closed, _deleted, _deleted, _cancelled, _handed_over])
        await way(stage, f"o{number % 1000}", f"10.{stage.number}.{number % 250}")
        await asyncio.sleep(stage.chance.uniform(0.02, 0.2))
    for netns in (None, stage.peer):
        left = [name for name in names(netns) if name[0] == "o"]
        if not await _gone(left, netns):
            stage.ledger.problem(f"interfaces left behind: {left}")


async def _gone(left: list[str], netns: int | None) -> bool:
    """Whether these interfaces are gone, or go at once.

    The helper of a netstack that another scene starts has copies of all file descriptors until it
    executes its program, and a device lives as long as its last copy.
    """
    for _ in range(round(HANG / 0.01)):
        if set(left).isdisjoint(names(netns)):
            return True
        await asyncio.sleep(0.01)
    return False


def _opener(stage: Stage, name: str, net: str, netns: int | None) -> Opener[Any]:
    chance = stage.chance
    openers: list[Callable[..., Opener[Any]]] = [aiotun.open_tun, aiotun.open_tap]
    opener = chance.choice(openers)
    return opener(
        name,
        addresses=[f"{net}.1/24"],
        netns=netns,
        queues=chance.choice([1, 1, 2, 5]),
        offload=chance.choice(["off", "split", "raw"]),
        mtu=chance.choice([None, 1280, 9000]),
        txqueuelen=100,
    )


async def _open(stage: Stage, name: str, net: str) -> tuple[aiotun.Device, int | None]:
    netns = stage.chance.choice([None, stage.peer])
    device = await _opener(stage, name, net, netns)
    stage.count("openings")
    return device, netns


async def _closed(stage: Stage, name: str, net: str) -> None:
    """A device is closed while tasks wait, by `close` or `aclose`."""
    device, _ = await _open(stage, name, net)
    waiting = [asyncio.create_task(device.recv()) for _ in range(3)]
    await asyncio.sleep(0)
    if stage.chance.random() < 0.5:
        device.close()
    await device.aclose()
    await _all_raise(stage, waiting, DeviceClosedError)


async def _deleted(stage: Stage, name: str, net: str) -> None:
    """A device is deleted from outside, with packets unread and tasks waiting."""
    device, netns = await _open(stage, name, net)
    if device.mode == "tap":  # no packet leaves a TAP before ARP has been answered
        await _delete(stage, device, netns)
        return
    flow = stage.flow("deleted")
    with udp_socket(netns, f"{net}.1") as sock:
        sock.connect((f"{net}.2", 7))
        sent = stage.chance.randrange(1, 50)
        for _ in range(sent):
            flow.send(sock)
    headers = 28 + (10 if device.offload == "raw" else 0)
    for _ in range(stage.chance.randrange(sent + 1)):
        flow.arrive((await device.recv())[headers:])
    unread = flow.sent - flow.delivered
    stage.count("packets in deleted devices", unread)
    stage.ledger.settle("deleted", flow, dropped=0, uncertain=unread)
    await _delete(stage, device, netns, unread)


async def _delete(stage: Stage, device: aiotun.Device, netns: int | None, unread: int = 0) -> None:
    waiting = [asyncio.create_task(device.recv()) for _ in range(unread + 2)]
    if unread == 0:
        await asyncio.sleep(0)
    delete_link(device.index, netns)
    stage.count("deletions from outside")
    await _all_raise(stage, waiting, DeviceLostError, unread)
    try:
        await device.send(b"\x45" + bytes(27))
    except DeviceLostError:
        pass
    else:
        stage.ledger.problem(f"{device.name} was deleted, and a packet could be sent")
    await device.aclose()


async def _all_raise(
    stage: Stage, tasks: list[asyncio.Task[bytes]], error: type[Exception], may_succeed: int = 0
) -> None:
    done, late = await asyncio.wait(tasks, timeout=HANG)
    for task in late:
        stage.ledger.problem(f"a receiver hangs: {task.get_stack()}")
        task.cancel()
    wrong = [task for task in done if not isinstance(task.exception(), error)]
    if len([task for task in wrong if task.exception() is not None]) or len(wrong) > may_succeed:
        stage.ledger.problem(f"instead of {error.__name__}: {wrong}")


async def _cancelled(stage: Stage, name: str, net: str) -> None:
    """An opening that is cancelled half-way leaves nothing."""
    netns = stage.chance.choice([None, stage.peer])

    async def open_it() -> aiotun.Device:
        device: aiotun.Device = await _opener(stage, name, net, netns)
        return device

    task = asyncio.create_task(open_it())
    await asyncio.wait({task}, timeout=stage.chance.uniform(0, 0.02))
    stage.count("cancelled openings", task.cancel())
    try:
        device = await task
    except asyncio.CancelledError:
        if not await _gone([name], netns):
            stage.ledger.problem(f"{name} is there after its opening was cancelled")
        return
    await device.aclose()


async def _handed_over(stage: Stage, name: str, net: str) -> None:
    """Queues' fds are detached, and another device takes them over."""
    device, _ = await _open(stage, name, net)
    kind = aiotun.TapDevice if device.mode == "tap" else aiotun.TunDevice
    fds = [queue.detach() for queue in device.queues]
    taken = kind.from_fd(*fds)
    if taken.name != name:
        stage.ledger.problem(f"from_fd: {taken.name} instead of {name}")
    with contextlib.suppress(BlockingIOError):
        taken.recv_nowait()
    await device.aclose()
    await taken.aclose()
