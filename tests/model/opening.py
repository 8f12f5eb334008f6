"""Opens the device under test that a configuration asks for."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiotun
from aiotun.testing import FaultInjector, memory_pair

from .lines import KernelLine, MemoryLine, PairLine
from .packets import Flow, begin_run
from .steps import Config
from .world import Target, World

__all__ = ["open_world"]

_names = itertools.count()


def _flows(config: Config) -> list[Flow]:
    net = 8 if config.frame else 9
    ends = (f"10.{net}.0.1", f"10.{net}.0.2")
    if config.version == 6:
        ends = (f"fd0{net}::1", f"fd0{net}::2")
    return [Flow(number, *ends) for number in range(4)]


async def open_world(config: Config, patience: float, receiver: Any = None) -> World:
    """Open the device and its far end.

    Args:
        config: what is under test.
        patience: seconds that a wait which has to end may take.
        receiver: a protocol, for a transport.
    """
    begin_run()
    world = World(config, patience)
    world.flows = _flows(config)
    if config.mode.startswith("pair"):
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        )
        world.line = PairLine(theirs, config)
        offload: Any = "split" if config.split else "raw" if config.raw else "off"
        world.device = aiotun.Queue.from_fd(ours.detach(), offload)
        world.fds = {0: world.device.fileno()}
    elif config.mode == "memory":
        one, other = memory_pair()
        world.line = MemoryLine(other)
        world.device = world.base = one
    else:
        await _open_device(world, receiver)
    _set_targets(world)
    return world


async def _open_device(world: World, receiver: Any) -> None:
    config = world.config
    name = f"m{next(_names)}"
    offload: Any = "split" if config.split else "raw" if config.raw else "off"
    if config.frame:
        options: dict[str, Any] = {"bridge": "br0", "sndbuf": 65536, "offload": offload}
    else:
        options = {
            "addresses": ["10.9.0.1/24", "fd09::1/64"],
            "offload": offload,
            "queues": config.queues,
        }
    if config.transport:
        create = aiotun.create_tap_endpoint if config.frame else aiotun.create_tun_endpoint
        transport, _ = await create(lambda: receiver, name, **options)
        world.base = transport.get_extra_info("device")
    else:
        opener: Any = aiotun.open_tap if config.frame else aiotun.open_tun
        world.base = await opener(name, **options)
    assert world.base is not None
    world.name, world.index = world.base.name, world.base.index
    world.device = FaultInjector(world.base) if config.mode == "faults" else world.base
    try:
        world.line = KernelLine(world.flows, frames=config.frame)
    except OSError:
        await world.base.aclose()
        raise


def _set_targets(world: World) -> None:
    queues = world.base.queues if world.base is not None else ()
    world.fds = world.fds or {ring: queue.fileno() for ring, queue in enumerate(queues)}
    world.targets = [Target("device", world.device, set(world.fds))]
    if world.config.mode == "faults":
        return  # its own line of tasks is all that it promises
    for ring, queue in enumerate(queues):
        world.targets.append(Target(f"queue {ring}", queue, {ring}))


@contextlib.asynccontextmanager
async def opened(config: Config, patience: float, receiver: Any = None) -> AsyncIterator[World]:
    """The same, with the far end and everything that a failed run left closed in the end."""
    world = await open_world(config, patience, receiver)
    try:
        yield world
    finally:
        for actor in world.actors:
            if actor.task is not None:
                actor.task.cancel()
        for recording in world.recordings:
            recording.close()
        world.line.close()
        for target in [] if world.closed_late else world.targets[1:] + world.targets[:1]:
            with contextlib.suppress(aiotun.AiotunError, OSError):
                target.io.close()
        tasks = [actor.task for actor in world.actors if actor.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=patience)
        for target in [] if world.closed_late else world.targets:
            await target.io.aclose()
        world.keep.close()
