"""Runs a command whose whole network is carried by this program.

Two namespaces do it: the command's own, with a TUN device, and a netstack that intercepts whatever
comes out of that device. `Outside` carries it on to the host's network.
"""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import math
import os
import resource
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import aiotun
from aiotun.netstack import UdpFlow

from .access import Access, Address, Place, is_of_this_machine
from .arguments import UsageError
from .job import Job
from .outside import Inside, Outside, as_text
from .outside_ping import PingsOutside
from .outside_udp import UdpOutside
from .resolvers import Resolvers
from .run_arguments import Options

if TYPE_CHECKING:
    from aiotun.testing import FaultInjector

__all__ = ["RunError", "run"]

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")

# Addresses of networks for benchmarks (RFC 2544) and of a private network (RFC 4193), which nobody
# meets outside. The first is the command's own; the others stand for the host's name servers.
_OWN = ("198.18.0.1/24", "fd03:a107:205::1/64")
_NAME_SERVERS = ("198.18.0.53", "198.18.0.54", "198.18.0.55")  # resolv.conf(5) has three at most
_ABROAD = {"default": "192.0.2.1", "::/0": "2001:db8::1"}

# Faults act on packets as they are on a network, and recordings show such packets. Otherwise the
# kernels at both ends of the device have less to do if they are large. What is sent outside has the
# size that the host's kernel gives it; it also fragments datagrams that are too large.
_MTU, _LARGEST_MTU = 1500, 65_520

_RING = 1000  # packets; the kernel's default of 500 loses some of a burst
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


class RunError(aiotun.AiotunError):
    """The command can't be run. The text is the one line that the user sees."""


def run(options: Options) -> int:
    """Run the command, and return its exit status: 128 + N where signal N ended it.

    Raises:
        UsageError: an option is wrong.
        AiotunError: the namespace or a device in it could not be made.
    """
    try:
        ipaddress.ip_address(options.host_loopback or "10.0.0.1")
    except ValueError:
        text = f"--host-loopback needs an IP address, got {options.host_loopback!r}"
        raise UsageError(text) from None
    access = Access(
        tuple(Place.parse(each) for each in options.deny),
        tuple(Place.parse(each) for each in options.allow),
    )
    # What is opened at the start is no garbage, either. Looking through it for garbage, then and
    # again when the interpreter exits, would take a fifth of the time.
    gc.disable()
    try:
        return asyncio.run(_run(options, access))
    finally:
        gc.enable()


async def _run(options: Options, access: Access) -> int:
    routes = [route for route, host in _ABROAD.items() if _is_routed(host)]
    addresses = _OWN if "::/0" in routes else _OWN[:1]
    resolvers = Resolvers()
    names = _NAME_SERVERS[: len(resolvers.servers)]
    log = options.note if options.log else _silent
    outside = Outside(Inside(names, options.host_loopback), access, resolvers, log)

    async def carry(flow: UdpFlow[tuple[bytes, Address]]) -> None:
        async with UdpOutside(flow, outside) as client:
            await client.run()
        if client.sent:
            log(f"udp {as_text(flow.peer)} {client.sent} sent, {client.received} received")

    with _more_descriptors() as original:
        offload: Literal["split", "raw"] = "split" if options.has_faults else "raw"
        mtu = _MTU if options.has_faults or options.write else _LARGEST_MTU
        async with (
            _at_once(
                _inside(addresses, routes or ["default"], offload, mtu),
                aiotun.open_netstack(
                    intercept=True,
                    offload=offload,
                    answer_pings=False,
                    mtu=mtu,
                ),
            ) as ((ns, tun), stack),
            _capturing(tun, options.write),
            await stack.intercept_tcp(outside.handle, admit=outside.admit),
            await stack.intercept_udp(carry, per="client"),
            await stack.intercept_ping(PingsOutside(outside).answered),
            _background(aiotun.relay(_with_faults(tun, options), stack.tun)),
        ):
            status = await _command(ns, options, resolvers, names, original)
            lost = (await tun.link.stats()).tx_dropped + (await stack.tun.link.stats()).tx_dropped
    if lost:
        options.note(f"{lost} packets were lost because this program was too slow for them")
    return status


def _silent(line: str) -> None:
    pass


def _is_routed(host: str) -> bool:
    """Whether the host has a route for this address, and with it for its family."""
    try:
        is_of_this_machine(host)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _more_descriptors() -> Iterator[tuple[int, int]]:
    """Raise our own limit of descriptors; a connection takes two. Yields the original limits."""
    original = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (original[1], original[1]))
    try:
        yield original
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, original)


@contextlib.asynccontextmanager
async def _inside(
    addresses: Sequence[str], routes: Sequence[str], offload: Literal["split", "raw"], mtu: int
) -> AsyncIterator[tuple[aiotun.Namespace, aiotun.TunDevice]]:
    """The command's namespace, and its device."""
    async with (
        aiotun.new_namespace() as ns,
        aiotun.open_tun(
            "tun0",
            netns=ns,
            addresses=addresses,
            routes=routes,
            txqueuelen=_RING,
            ipv6_autoconf=False,
            offload=offload,
            mtu=mtu,
        ) as tun,
    ):
        yield ns, tun


@contextlib.asynccontextmanager
async def _at_once(
    one: AbstractAsyncContextManager[A], other: AbstractAsyncContextManager[B]
) -> AsyncIterator[tuple[A, B]]:
    """Enter both at the same time, and leave both at the same time.

    Each waits for a helper process when it is entered, and when it is left for the kernel, which
    takes some 20 ms to remove a device.
    """
    tasks = asyncio.create_task(_enter(one)), asyncio.create_task(_enter(other))
    try:
        await asyncio.wait(tasks)
        yield tasks[0].result(), tasks[1].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        entered = [
            manager
            for manager, task in zip((one, other), tasks, strict=True)
            if not task.cancelled() and task.exception() is None
        ]
        await asyncio.gather(*(each.__aexit__(None, None, None) for each in entered))


async def _enter(manager: AbstractAsyncContextManager[T]) -> T:
    return await manager.__aenter__()


@contextlib.asynccontextmanager
async def _capturing(tun: aiotun.TunDevice, path: str | None) -> AsyncIterator[None]:
    if path is None:
        yield
        return
    from aiotun.capture import PcapWriter  # not needed otherwise

    try:
        writer = PcapWriter(path, "tun", interface=tun.name)
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error
    async with writer:
        with tun.capture(writer):
            yield


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _with_faults(tun: aiotun.TunDevice, options: Options) -> "aiotun.TunDevice | FaultInjector":
    if not options.has_faults:
        return tun
    from aiotun.testing import FaultInjector  # not needed otherwise

    return FaultInjector(
        tun,
        drop=options.drop / 100,
        delay=1.0 if options.delay else 0.0,
        delay_by=options.delay / 1000,
        bandwidth=options.rate or math.inf,
        seed=options.seed,
    )


# --- The command ---------------------------------------------------------------------------------


async def _command(
    ns: aiotun.Namespace,
    options: Options,
    resolvers: Resolvers,
    names: Sequence[str],
    limits: tuple[int, int],
) -> int:
    """Run the command, and return its exit status."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with contextlib.AsyncExitStack() as stack:
        job = stack.enter_context(Job())
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)  # what the command inherits
        try:
            process = await _start(ns, options, resolvers, names, stack)
        except FileNotFoundError:
            options.note(f"{options.command[0]}: command not found")
            return _NOT_FOUND
        except PermissionError as error:
            if isinstance(error, aiotun.AiotunError):
                raise
            options.note(f"{options.command[0]}: {os.strerror(error.errno or errno.EACCES)}")
            return _NOT_EXECUTABLE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, ours)
        job.begin(process)
        gc.freeze()
        gc.enable()
        status = await process.wait()
    return status if status >= 0 else 128 - status


async def _start(
    ns: aiotun.Namespace,
    options: Options,
    resolvers: Resolvers,
    names: Sequence[str],
    stack: contextlib.AsyncExitStack,
) -> asyncio.subprocess.Process:
    """Start the command, with a /etc/resolv.conf of its own if possible."""
    text = resolvers.text(*names)
    try:
        return await ns.create_subprocess_exec(*options.command, resolv_conf=text)
    except aiotun.NotPermittedError:
        # Mounts are refused, or there is no such file. If it is something else, the second attempt
        # raises the same error.
        from .loopback_names import answering_on_loopback

    if options.log:
        options.note("this machine refuses mounts: the command has its /etc/resolv.conf")
    log = options.note if options.log else _silent
    await stack.enter_async_context(answering_on_loopback(ns, resolvers.servers, log))
    return await ns.create_subprocess_exec(*options.command)
