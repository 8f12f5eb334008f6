"""Connects the protocol with the device, the sockets and the clock."""

import asyncio
import contextlib
import errno
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime
from typing import Any

from _datagrams import Address, DatagramSocket, Run, bind
from _running import BATCH, QUEUE, Delivery, report, until_signal

import aiotun

from . import control, status
from .config import Config
from .interface import Interface
from .peer import Timers

__all__ = ["Options", "Service", "opened", "serve"]


def _now() -> float:
    """Seconds, including the time when the machine sleeps, as sessions age then, too."""
    return clock_gettime(CLOCK_BOOTTIME)


class Service:
    """A running interface."""

    def __init__(
        self, tun: aiotun.TunDevice, interface: Interface, socks: list[DatagramSocket], mark: int
    ) -> None:
        self.tun = tun
        self.interface = interface
        self.socks = socks
        self.port = socks[0].address[1]
        self.delivery = Delivery(tun, interface.dropped)
        self.mark = mark
        self._by_length = {len(sock.address): sock for sock in socks}
        self._nowhere: Counter[str] = Counter()
        self._armed = math.inf  # the time for which the timer is set
        self._timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()

    async def from_device(self) -> None:
        async for packets in self.tun.batches(BATCH):
            self.interface.send(packets, _now())
            if self.interface.due < self._armed:
                self._arm()
            outgoing, self.interface.outgoing = self.interface.outgoing, []
            for endpoint, messages in outgoing:
                sock = self._socket_for(endpoint, messages)
                if sock is not None and (left := sock.put(messages, endpoint)):
                    await sock.send(left, endpoint)

    def from_socket(self, runs: list[Run]) -> None:
        packets: list[bytes] = []
        now = _now()
        for datagrams, source in runs:
            packets += self.interface.receive(datagrams, source, now)
        if packets:
            self.delivery.put(packets)
        if self.interface.outgoing:
            self._transmit()
        if self.interface.due < self._armed:
            self._arm()

    async def keep_time(self) -> None:
        self.interface.start(_now())
        for sock in self.socks:
            sock.start(self.from_socket)
        try:
            while True:
                self._transmit()
                self._arm()
                await self._due.wait()
                self._due.clear()
                self.interface.tick(_now())
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _transmit(self) -> None:
        outgoing, self.interface.outgoing = self.interface.outgoing, []
        for endpoint, messages in outgoing:
            if sock := self._socket_for(endpoint, messages):
                sock.send_nowait(messages, endpoint)

    def _socket_for(self, endpoint: Address, messages: list[bytes]) -> DatagramSocket | None:
        sock = self._by_length.get(len(endpoint))
        if sock is None:
            self._nowhere["no such version of IP here"] += len(messages)
        return sock

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
            self.delivery.run(),
            report(self.tun, self.socks, self.show),
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


def open_sockets(port: int, mark: int) -> list[DatagramSocket]:
    """Listen on one port with IPv4 and IPv6, if the machine has both."""
    socks: list[DatagramSocket] = []
    try:
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            try:
                sock = bind(family, (host, port), mark)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                continue
            socks.append(DatagramSocket(sock))
            port = socks[0].address[1]
    except BaseException:
        for each in socks:
            each.close()
        raise
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
    ignored = [key for key in config.ignored if netns is None or key.lower() != "dns"]
    for note in [*(f"{key} is ignored" for key in ignored), *notes]:
        print(f"note: {note}", file=sys.stderr)
    async with contextlib.AsyncExitStack() as stack:
        socks = open_sockets(config.listen_port, config.mark)
        for sock in socks:
            stack.callback(sock.close)
        tun = await stack.enter_async_context(
            aiotun.open_tun(
                options.name,
                netns=netns,
                addresses=config.addresses,
                routes=routes,
                mtu=config.mtu,
                txqueuelen=QUEUE,
                offload="split",
            )
        )
        interface = Interface(
            config.private_key,
            config.peers,
            epoch=time.time() - _now(),
            mtu=config.mtu,
            timers=options.timers,
            handshakes=options.handshakes,
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
