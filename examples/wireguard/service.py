"""Connects the protocol with the device, the sockets and the clock."""

import asyncio
import contextlib
import errno
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from ipaddress import ip_network
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime
from typing import Any

from _running import QUEUE, until_signal
from _tunnel import RECEIVE_BYTES, deliver, report, send

import aiotun
from aiotun import DatagramSocket, LinkDownError, PacketError
from aiotun.datagrams import Address, segments_for
from aiotun.runs import Pool, Run

from . import control, status
from .config import Config, look_up
from .interface import Interface
from .messages import OVERHEAD_BYTES
from .peer import Peer, Timers
from .runs import Opener, Sealer

__all__ = ["Options", "Service", "opened", "serve"]


def _now() -> float:
    """Seconds, including the time when the machine sleeps.

    The peer's clock goes on meanwhile, so that sessions have aged when the machine wakes up. The
    first packet then finds that and begins a handshake. The loop's timers don't count that time,
    and are late by what they had left, at most.
    """
    return clock_gettime(CLOCK_BOOTTIME)


def _epoch() -> float:
    return time.time() - _now()


class Service:
    """A running interface.

    Runs of packets take the fast path (`Sealer` and `Opener`), single packets and whatever that
    leaves go through the interface as lists.
    """

    def __init__(
        self, tun: aiotun.TunDevice, interface: Interface, socks: list[DatagramSocket], mark: int
    ) -> None:
        self.tun = tun
        self.interface = interface
        self.socks = socks
        self.port = socks[0].address[1]
        self.mark = mark
        self._by_length = {len(sock.address): sock for sock in socks}
        self._nowhere: Counter[str] = Counter()
        self._armed = math.inf  # the time for which the timer is set
        self._timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._looking_up: set[Peer] = set()

    # From the device to the sockets

    async def from_device(self) -> None:
        interface, sealer, pool = self.interface, Sealer(self.interface), Pool(1)
        segments = segments_for(interface.mtu, OVERHEAD_BYTES)
        while True:
            with await self.tun.recv_run(pool, limit=segments) as run:
                now = _now()
                endpoint = sealer.seal(run, now)
                if endpoint is not None:
                    await self._send(run, endpoint)
                else:
                    interface.send(run.segments(), now)
            if interface.outgoing or interface.due < self._armed:
                await self._settle()

    async def _settle(self) -> None:
        """Send what the interface has to send, and set the timer if it is due earlier."""
        if self.interface.outgoing:
            outgoing, self.interface.outgoing = self.interface.outgoing, []
            for endpoint, messages in outgoing:
                await self._send(messages, endpoint)
            while self.interface.unreached:
                self._look_up(self.interface.unreached.pop())
        if self.interface.due < self._armed:
            self._arm()

    async def _send(self, messages: Run | list[bytes], endpoint: Address) -> None:
        """Send messages to one endpoint, in order; drop what the kernel refuses."""
        sock = self._by_length.get(len(endpoint))
        if sock is None:
            self._nowhere["no such version of IP here"] += len(messages)
        elif not isinstance(messages, Run):
            await send(sock, messages, endpoint)
        else:
            try:
                await sock.send_run(messages, endpoint)
            except PacketError as error:
                await send(sock, error.unsent[1:], endpoint)

    def _look_up(self, peer: Peer) -> None:
        """Look a peer's endpoint up again, and try the next address that is found.

        This takes as long as the resolver likes, so a thread does it. At exit nobody waits for it.
        """
        text, loop = peer.config.endpoint_text, asyncio.get_running_loop()
        if not text or peer in self._looking_up:
            return
        self._looking_up.add(peer)

        def done(found: list[Address]) -> None:
            self._looking_up.discard(peer)
            peer.try_another(found)

        def work() -> None:
            found: list[Address] = []
            with contextlib.suppress(OSError):  # the next handshake that fails asks again
                found = look_up(text)
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(done, found)

        threading.Thread(target=work, daemon=True).start()

    # From the sockets to the device

    async def from_socket(self, sock: DatagramSocket) -> None:
        interface, opener, pool = self.interface, Opener(self.interface), Pool(1)
        while True:
            try:
                run, source = await sock.recv_run(pool)
            except PacketError:
                continue  # the socket counts it
            with run:
                now = _now()
                opened = opener.open(run, source, now)
                if opened is not None:
                    await self._deliver(opened)
                elif packets := interface.receive(run.segments(), source, now):
                    await deliver(self.tun, packets, interface.dropped)
            if interface.outgoing or interface.due < self._armed:
                await self._settle()

    async def _deliver(self, packets: Run) -> None:
        """Send packets to the device, in order; drop and count what the kernel refuses."""
        dropped = self.interface.dropped
        try:
            await self.tun.send_run(packets)
        except LinkDownError as error:
            dropped["the link is down"] += len(error.unsent)
        except PacketError as error:
            dropped["refused by the kernel"] += 1
            await deliver(self.tun, error.unsent[1:], dropped)

    # The clock

    async def keep_time(self) -> None:
        self.interface.start(_now())
        try:
            while True:
                await self._settle()
                self._arm()
                await self._due.wait()
                self._due.clear()
                self.interface.tick(_now())
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _arm(self) -> None:
        """Set the timer earlier. It is never delayed: when it fires, it is set again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed = due = self.interface.due
        if due < math.inf:
            loop = asyncio.get_running_loop()
            # A little later, so that the tick finds a timer due despite the clocks' rounding.
            self._timer = loop.call_later(max(0.0, due - _now()) + 0.001, self._due.set)

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run, concurrently."""
        return [
            self.from_device(),
            self.keep_time(),
            report(self.tun, self.socks, self.show),
            *map(self.from_socket, self.socks),
        ]

    def show(self, lost: Counter[str]) -> str:
        lost = lost + self._nowhere
        return status.text(self.tun.name, self.port, self.interface, lost, _now())

    def uapi(self) -> str:
        return status.uapi(self.port, self.mark, self.interface)


class Options:
    """The options of the command line."""

    name: str
    control: Path | None
    handshakes: int
    timers: Timers


async def open_sockets(
    stack: contextlib.AsyncExitStack, port: int, mark: int
) -> list[DatagramSocket]:
    """Listen on one port with IPv4 and IPv6, if the machine has both."""
    socks: list[DatagramSocket] = []
    for host in ("0.0.0.0", "::"):
        opener = aiotun.open_datagrams(
            (host, port), mark=mark, receive_bytes=RECEIVE_BYTES, send_bytes=RECEIVE_BYTES
        )
        try:
            socks.append(await stack.enter_async_context(opener))
        except OSError as error:
            if socks and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue
            raise
        port = socks[0].address[1]
    return socks


def routes_of(config: Config, *, private: bool = False) -> tuple[list[str], list[str]]:
    """Return the routes to the peers, and notes about routes that are not made.

    In a private namespace a route may cover everything: our own datagrams leave from outside.
    """
    if not config.routes:
        return [], []
    routes: list[str] = []
    notes: list[str] = []
    own = [str(address.network) for address in config.addresses]
    for network in {net for peer in config.peers for net in peer.allowed_ips}:
        if network.prefixlen == 0 and not private:
            # It would also route our own datagrams into the tunnel; wg-quick prevents that with
            # rules by fwmark.
            notes.append(f"no route for {network} is made: add one that leaves out the endpoints")
        elif str(network) not in own:
            routes.append(str(network))
    return routes, notes


@contextlib.asynccontextmanager
async def opened(
    config: Config, options: Options, netns: aiotun.Namespace | None = None
) -> AsyncIterator[Service]:
    """Open the sockets here, and the device in `netns`."""
    routes, notes = routes_of(config, private=netns is not None)
    own = [address.network for address in config.addresses]
    ignored = [key for key in config.ignored if netns is None or key.lower() != "dns"]
    for note in [*(f"{key} is ignored" for key in ignored), *notes]:
        print(f"note: {note}", file=sys.stderr)
    async with contextlib.AsyncExitStack() as stack:
        socks = await open_sockets(stack, config.listen_port, config.mark)
        tun = await stack.enter_async_context(
            aiotun.open_tun(
                options.name,
                netns=netns,
                addresses=config.addresses,
                routes=routes,
                mtu=config.mtu,
                txqueuelen=QUEUE,
                gso_max_segs=segments_for(config.mtu, OVERHEAD_BYTES),
                offload="split",
            )
        )
        interface = Interface(
            config.private_key,
            config.peers,
            epoch=_epoch,
            mtu=config.mtu,
            timers=options.timers,
            handshakes=options.handshakes,
            inside=[ip_network(each) for each in routes] + own if netns is None else (),
        )
        yield Service(tun, interface, socks, config.mark)


async def serve(config: Config, options: Options) -> None:
    """Open everything, print "ready NAME", and run until a signal comes."""
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(opened(config, options))
        path = options.control or control.FOLDER / f"{service.tun.name}.sock"
        try:
            await stack.enter_async_context(control.serve(path, service.uapi))
        except OSError as error:
            print(f"note: no control socket: {error}", file=sys.stderr)
        await until_signal(service.tun.name, *service.work())
