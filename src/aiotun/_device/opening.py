"""Opening a device: attach the queues, configure the link, and undo every step if one fails.

All of this blocks, and runs in one short-lived thread in the device's network namespace. The steps
that can't be undone come last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .._kernel import ioctl, namespaces, napi
from .._kernel.abi import VNET_HDR_SIZE, Iff, OffloadFlag
from .._kernel.interface import Interface
from .._link.netlink import in_session
from .._link.values import DEFAULT_METRICS
from .._queue.port import Offloads
from ..errors import AiotunError, DeviceBusyError, DeviceLostError, DeviceMismatchError, LinkError
from .options import Options

if TYPE_CHECKING:
    from .._link.info import LinkInfo, TunTapInfo
    from .._link.session import Session
    from .._link.values import LinkAddress, Route

__all__ = ["Opened", "Opening"]

T = TypeVar("T")

_OFFLOADS = OffloadFlag.CSUM | OffloadFlag.TSO4 | OffloadFlag.TSO6 | OffloadFlag.TSO_ECN
_USO = OffloadFlag.USO4 | OffloadFlag.USO6  # Linux 6.2; both or neither

_RTPROT_KERNEL = 2  # rtnetlink.h

Undo = Callable[["Session"], Awaitable[None]]


class Before(NamedTuple):
    """The configuration of an interface before the opening changed it."""

    info: LinkInfo
    addresses: list[LinkAddress]
    routes: list[tuple[Route, int]]


class Opened(NamedTuple):
    """The result of an opening: queues and an interface, which the receiver owns."""

    fds: list[int]
    interface: Interface
    offloads: Offloads


class _AbortedError(Exception):
    """The opening was aborted. Users never see this error: their task gets a CancelledError."""


class Opening:
    """One opening. Call `run` and `undo` in a short-lived thread, and `abort` in any thread."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._fds: list[int] = []
        self._name = ""
        self._created = False
        self._offloads = Offloads(0)
        # The functions that undo the steps done on an interface that existed before, in the order
        # of the steps.
        self._undo_steps: list[Undo] = []
        # The values before this opening changed them; None if it did not.
        self._before: Before | None = None
        self._persist_before: bool | None = None
        self._carrier_before: bool | None = None
        self._threaded_before: bool | None = None
        self._aborted = threading.Event()

    def abort(self) -> None:
        """Tell `run`, which may be running in another thread, to stop after its current step."""
        self._aborted.set()

    def run(self) -> Opened:
        """Open the device.

        Raises:
            AiotunError: a step failed. The steps before it are undone.
        """
        namespace = namespaces.NamespaceFd(namespaces.open_netns(self._options.netns))
        namespaces.setns(namespace.fd)
        try:
            self._attach_queues()
            index = ioctl.get_index(self._name)
            info = in_session(lambda session: self._set_up(session, index))
            self._set_ownership(info)
        except BaseException as error:
            lost = self._lost(error)
            self._undo_all(namespace)
            del namespace  # otherwise the error's traceback would keep the namespace open
            if lost is not None:
                raise lost from error
            raise
        interface = Interface(info.name, info.index, info.mtu, namespace)
        return Opened(self._fds, interface, self._offloads)

    def _lost(self, error: BaseException) -> DeviceLostError | None:
        """Return the error for an interface that was deleted while we configured it.

        To netlink it looks like one that never existed.
        """
        if not isinstance(error, LinkError) or error.errno != errno.ENODEV or not self._fds:
            return None
        try:
            ioctl.get_flags(self._fds[0], self._name)
        except DeviceLostError as lost:
            text = f"{self._name} was deleted while it was opened; open it again"
            return DeviceLostError(lost.errno, text, self._name)
        return None

    def undo(self, opened: Opened) -> None:
        """Undo an opening that succeeded after its task was cancelled."""
        namespace = opened.interface.namespace
        assert namespace is not None
        self._undo_all(namespace)

    def _undo_all(self, namespace: namespaces.NamespaceFd) -> None:
        try:
            # An interface that we created is deleted when its last queue is closed.
            if (self._undo_steps or self._before) and not self._created:
                namespaces.setns(namespace.fd)
                in_session(self._restore_link)
            if self._carrier_before is not None and not self._created:
                ioctl.set_carrier(self._fds[0], self._name, self._carrier_before)
            if self._threaded_before is False and not self._created:
                namespaces.setns(namespace.fd)
                napi.set_threaded(self._name, False)
        finally:
            self._close_queues()

    # The queues

    def _attach_queues(self) -> None:
        wanted = self._options
        flags = Iff.TAP if wanted.mode == "tap" else Iff.TUN
        if not wanted.packet_info:
            flags |= Iff.NO_PI
        if wanted.offload != "off":
            flags |= Iff.VNET_HDR
        if wanted.napi:
            flags |= Iff.NAPI
        if wanted.multi_queue:
            flags |= Iff.MULTI_QUEUE
        self._attach_first(flags)
        while len(self._fds) < wanted.queues:
            self._check_aborted()
            ioctl.attach(self._open_node(), self._name, flags)

    def _attach_first(self, flags: Iff) -> None:
        """Attach one queue, and determine without a race whether that created the interface."""
        name = self._options.name or ""
        fd = self._open_node()
        if name and "%" not in name:
            try:
                self._name = ioctl.attach_new(fd, name, flags)
                self._created = True
            except DeviceBusyError:
                if self._options.exclusive:
                    raise
                self._name = ioctl.attach(fd, name, flags)
        else:  # the kernel picks a free name
            self._name = ioctl.attach(fd, name, flags)
            self._created = True

    def _open_node(self) -> int:
        fd = ioctl.open_node()
        self._fds.append(fd)
        return fd

    def _close_queues(self) -> None:
        fds, self._fds = self._fds, []
        try:
            if fds and self._persist_before is not None:
                ioctl.set_persist(fds[0], self._name, self._persist_before)
        finally:
            for fd in fds:
                os.close(fd)

    # Headers and offloads, which belong to the device and not to a queue

    def _set_headers(self, info: LinkInfo) -> None:
        """Check that packets have the headers that we expect, and set the offloads."""
        super_packets = self._options.offload != "off"
        # gVisor's netlink has no `tuntap`. Its devices have the headers that they are opened with.
        if info.tuntap is not None and self._is_shared(info.tuntap, super_packets):
            # The other programs rely on the offloads that they set.
            if super_packets:
                from .._queue.judging import known_offloads

                self._offloads = known_offloads(info.name)
            return
        # A persistent device keeps the header size and the offloads of the last program.
        if super_packets:
            ioctl.set_vnet_header_size(self._fds[0], self._name, VNET_HDR_SIZE)
            self._offloads = ~Offloads(0)
            try:
                ioctl.set_offload(self._fds[0], self._name, _OFFLOADS | _USO)
            except DeviceMismatchError:
                ioctl.set_offload(self._fds[0], self._name, _OFFLOADS)
                self._offloads = ~Offloads.USO
            return
        try:
            ioctl.set_offload(self._fds[0], self._name, OffloadFlag(0))
        except DeviceMismatchError as error:
            if error.errno != errno.ENOTTY:  # a driver without this ioctl has no offloads
                raise

    def _is_shared(self, device: TunTapInfo, super_packets: bool) -> bool:
        """Return whether other programs hold queues of the device.

        Raises:
            DeviceMismatchError: they hold it with other headers than this opening needs.
        """
        for what, found, expected in (
            ("virtio-net header", device.vnet_header, super_packets),
            ("packet-info header", device.packet_info, self._options.packet_info),
        ):
            if found != expected:
                raise self._header_error(f"a {what}" if found else f"no {what}")
        if device.queues <= len(self._fds):
            return False
        size = ioctl.get_vnet_header_size(self._fds[0], self._name)
        if super_packets and size != VNET_HDR_SIZE:
            raise self._header_error(f"a virtio-net header of {size} bytes")
        return True

    def _header_error(self, found: str) -> DeviceMismatchError:
        return DeviceMismatchError(
            errno.EINVAL,
            f"another program holds {self._name} with {found}, and all queues of a device have the "
            "same headers; open it with the same offload and packet_info, or end that program",
            self._name,
        )

    # The link

    async def _set_up(self, session: Session, index: int) -> LinkInfo:
        info = await session.get(index)
        self._set_headers(info)
        wanted = self._options
        for fd in self._fds:
            if wanted.sndbuf is not None:
                ioctl.set_sndbuf(fd, self._name, wanted.sndbuf)
        if wanted.carrier is not None:
            self._carrier_before = info.carrier
            ioctl.set_carrier(self._fds[0], self._name, wanted.carrier)
        if wanted.napi == "threaded":
            self._threaded_before = napi.set_threaded(self._name, True)
        await self._configure(session, info)
        self._check_aborted()
        return await session.get(index)

    async def _configure(self, session: Session, info: LinkInfo) -> None:
        """Configure the link, without a request for a setting that it has already.

        So an ordinary user can open a device that root prepared: reading needs no privilege.
        """
        wanted = self._options
        hint = f"'ip -d link show {info.name}' shows what it supports"
        for option, attribute, new, old in (
            ("MAC", "address", wanted.mac, info.mac),
            ("MTU", "mtu", wanted.mtu, info.mtu),
            ("queue length", "txqlen", wanted.txqueuelen, info.txqueuelen),
            ("GSO segments", "gso_max_segs", wanted.gso_max_segs, info.gso_max_segs),
            ("GSO size", "gso_max_size", wanted.gso_max_size, info.gso_max_size),
        ):
            if new is not None and new != old:
                what = f"set the {option} to {new}"
                await self._set(session, info, what, hint, attribute, new, old)
        if wanted.bridge is not None and wanted.bridge != info.master:
            await self._enslave(session, info, wanted.bridge)
        await self._set_autoconf(session, info)
        if wanted.addresses:
            await self._add_addresses(session, info)
        if wanted.up and not info.up:
            await self._set(session, info, "bring the link up", hint, "state", "up", "down")
        if wanted.up or info.up:
            await session.settle(info, wanted.addresses)
        if wanted.routes:
            await self._add_routes(session, info)

    async def _set(
        self,
        session: Session,
        info: LinkInfo,
        what: str,
        hint: str,
        attribute: str,
        new: Any,
        old: Any,
    ) -> None:
        await self._about_to_change(session, info)
        if old is not None:
            back = f"set the {attribute} back to {old}"
            # Before the request, because it can fail halfway: the interface has left its old
            # bridge, and the new bridge rejects it.
            self._undo_steps.append(lambda session: session.set(info, back, **{attribute: old}))
        await session.set(info, what, hint, **{attribute: new})

    async def _about_to_change(self, session: Session, info: LinkInfo) -> None:
        """Stop if the opening was aborted; otherwise record the link's configuration once."""
        self._check_aborted()
        if not self._created and self._before is None:
            self._before = Before(
                info, await session.addresses(info), await session.found_routes(info)
            )

    async def _set_autoconf(self, session: Session, info: LinkInfo) -> None:
        """Switch the kernel's IPv6 autoconfiguration on or off, before the link comes up."""
        on = self._options.ipv6_autoconf
        if on is None or (now := await session.autoconf(info)) is None:
            return
        from .._link.autoconf import apply, switched

        wanted = switched(now, on)
        if wanted != now:
            await self._about_to_change(session, info)
            self._undo_steps.append(lambda session: apply(session, info, wanted, now))
            await apply(session, info, now, wanted)
        # If the link was up already, the kernel has made a link-local address: attaching gave the
        # link its carrier.
        for address in [] if on else await session.own_link_locals(info):
            await self._about_to_change(session, info)
            await session.remove_address(info, address)

    async def _enslave(self, session: Session, info: LinkInfo, bridge: str) -> None:
        master = await session.get(bridge)
        before = 0 if info.master is None else (await session.get(info.master)).index
        what, hint = f"set the master to {bridge}", f"check that {bridge} is a bridge"
        await self._set(session, info, what, hint, "master", master.index, before)

    async def _add_addresses(self, session: Session, info: LinkInfo) -> None:
        present = {(each.interface, each.peer) for each in await session.addresses(info)}
        for address in self._options.addresses:
            if (address.interface, address.peer) in present:
                continue
            self._check_aborted()
            try:
                await session.add_address(info, address)
            except LinkError as error:
                # Another opening of the same device may have added it after we checked.
                if error.errno == errno.EEXIST and await _has_address(session, info, address):
                    continue
                raise
            present.add((address.interface, address.peer))
            self._undo_steps.append(functools.partial(_remove_address, info, address))

    async def _add_routes(self, session: Session, info: LinkInfo) -> None:
        present = set(await session.routes(info))
        for route in self._options.routes:
            if route in present:
                continue
            self._check_aborted()
            try:
                await session.add_route(info, route)
            except LinkError as error:
                if error.errno == errno.EEXIST and route in await session.routes(info):
                    continue  # added by another opening, as above
                raise
            present.add(route)
            self._undo_steps.append(functools.partial(_remove_route, info, route))

    async def _restore_link(self, session: Session) -> None:
        """Undo the steps done on an interface that existed before, the last one first.

        If a step can't be undone, because another program changed the link in the meantime, the
        other steps are undone anyway.
        """
        while self._undo_steps:
            await _attempt(self._undo_steps.pop()(session))
        if self._before is None:
            return
        # If the MTU falls below 1280 or the link goes down, the kernel removes IPv6 addresses and
        # their routes. It does not restore them.
        info, addresses, routes = self._before
        present = await session.addresses(info)
        for address in addresses:
            if address not in present:
                await _attempt(session.add_address(info, address))
        # The kernel adds its own routes together with the addresses.
        routes_now = await session.routes(info)
        for route, protocol in routes:
            if route not in routes_now and protocol != _RTPROT_KERNEL:
                await _attempt(session.add_route(info, route, protocol))

    # Steps that can't be undone

    def _set_ownership(self, info: LinkInfo) -> None:
        """Set group, owner and persistence, if they differ from what was asked for."""
        wanted, device, fd = self._options, info.tuntap, self._fds[0]
        self._check_aborted()
        if wanted.group is not None and (device is None or wanted.group != device.group):
            ioctl.set_group(fd, self._name, wanted.group)
        if wanted.owner is not None and (device is None or wanted.owner != device.owner):
            ioctl.set_owner(fd, self._name, wanted.owner)
        persists = device is not None and device.persist
        if wanted.persist is not None and wanted.persist != persists:
            ioctl.set_persist(fd, self._name, wanted.persist)
            self._persist_before = persists

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise _AbortedError


async def _remove_address(info: LinkInfo, address: LinkAddress, session: Session) -> None:
    await session.remove_address(info, address)


async def _remove_route(info: LinkInfo, route: Route, session: Session) -> None:
    # Give the metric: without one the kernel may remove another route to the same destination.
    if route.metric is None and route.dst.version == 6:
        route = dataclasses.replace(route, metric=DEFAULT_METRICS[6])
    await session.remove_route(info, route)


async def _has_address(session: Session, info: LinkInfo, address: LinkAddress) -> bool:
    return (address.interface, address.peer) in {
        (each.interface, each.peer) for each in await session.addresses(info)
    }


async def _attempt(request: Awaitable[None]) -> None:
    """Await a request and ignore its failure, which means that another program changed the link."""
    with contextlib.suppress(AiotunError):
        await request
