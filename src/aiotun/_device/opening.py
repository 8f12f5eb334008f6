"""Opening a device: attach the queues, configure the link, and take it all back if that fails.

All of it is blocking and runs in one short-lived thread, in the device's network namespace. It is
done in an order in which every step but the last ones can be undone.
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

from .._kernel import ioctl, namespaces
from .._kernel.abi import VNET_HDR_SIZE, Iff, OffloadFlag
from .._kernel.interface import Interface
from .._link.netlink import in_session
from .._link.values import DEFAULT_METRICS
from ..errors import AiotunError, DeviceBusyError, DeviceMismatchError, LinkError
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
    """What was on an interface before it was touched."""

    info: LinkInfo
    addresses: list[LinkAddress]
    routes: list[tuple[Route, int]]


class Opened(NamedTuple):
    """What an opening came to: queues and an interface, owned by whoever takes this."""

    fds: list[int]
    interface: Interface


class _AbortedError(Exception):
    """The task that wanted the device was cancelled. Never leaves this module."""


class Opening:
    """One opening. `run` and `undo` are called in a thread, `abort` from anywhere."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._fds: list[int] = []
        self._name = ""
        self._created = False
        # How to take back each step done on an interface that existed before, the first one first.
        self._undo: list[Undo] = []
        self._before: Before | None = None
        self._persisted: bool | None = None  # what it was before that was changed
        self._carried: bool | None = None
        self._aborted = threading.Event()

    def abort(self) -> None:
        """Ask `run`, which may be under way, to stop after the step that it is at."""
        self._aborted.set()

    def run(self) -> Opened:
        """Open the device.

        Raises:
            AiotunError: a step failed, and what was done before is undone.
        """
        namespace = namespaces.NamespaceFd(namespaces.open_netns(self._options.netns))
        namespaces.setns(namespace.fd)
        try:
            self._attach()
            index = ioctl.get_index(self._name)
            info = in_session(lambda session: self._set_up(session, index))
            self._hand_over(info)
        except BaseException:
            self._take_all_back(namespace)
            del namespace  # or the error's traceback would hold it, for as long as anybody has that
            raise
        return Opened(self._fds, Interface(info.name, info.index, info.mtu, namespace))

    def undo(self, opened: Opened) -> None:
        """Take back an opening that had succeeded when nobody wanted it any more."""
        namespace = opened.interface.namespace
        assert namespace is not None
        self._take_all_back(namespace)

    def _take_all_back(self, namespace: namespaces.NamespaceFd) -> None:
        try:
            # What we created goes with its last queue.
            if (self._undo or self._before) and not self._created:
                namespaces.setns(namespace.fd)
                in_session(self._take_back)
            if self._carried is not None and not self._created:
                ioctl.set_carrier(self._fds[0], self._name, self._carried)
        finally:
            self._close()

    # The queues

    def _attach(self) -> None:
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
            ioctl.attach(self._open(), self._name, flags)

    def _attach_first(self, flags: Iff) -> None:
        """Attach one queue, and find out without a race whether that created the interface."""
        name = self._options.name or ""
        fd = self._open()
        if name and "%" not in name:
            try:
                self._name = ioctl.attach_new(fd, name, flags)
                self._created = True
            except DeviceBusyError:
                if self._options.exclusive:
                    raise
                self._name = ioctl.attach(fd, name, flags)
        else:  # the kernel picks a name that is free
            self._name = ioctl.attach(fd, name, flags)
            self._created = True

    def _open(self) -> int:
        fd = ioctl.open_node()
        self._fds.append(fd)
        return fd

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        try:
            if fds and self._persisted is not None:
                ioctl.set_persist(fds[0], self._name, self._persisted)
        finally:
            for fd in fds:
                os.close(fd)

    # The headers and offloads, which are the device's and not the queue's

    def _set_headers(self, info: LinkInfo) -> None:
        """Check that packets will look as we expect, and say what the kernel may leave to us."""
        super_packets = self._options.offload != "off"
        # gVisor's netlink does not tell; its devices have the headers that they are opened with.
        if info.tuntap is not None and self._is_shared(info.tuntap, super_packets):
            return  # the others rely on what they set
        # A persistent device remembers both from whoever was attached before.
        if super_packets:
            ioctl.set_vnet_header_size(self._fds[0], self._name, VNET_HDR_SIZE)
            try:
                ioctl.set_offload(self._fds[0], self._name, _OFFLOADS | _USO)
            except DeviceMismatchError:
                ioctl.set_offload(self._fds[0], self._name, _OFFLOADS)
            return
        try:
            ioctl.set_offload(self._fds[0], self._name, OffloadFlag(0))
        except DeviceMismatchError as error:
            if error.errno != errno.ENOTTY:  # a driver without the request leaves nothing to us
                raise

    def _is_shared(self, device: TunTapInfo, super_packets: bool) -> bool:
        """Whether others are attached, too; what is the device's must be as we expect it."""
        for what, is_so, shall in (
            ("virtio-net header", device.vnet_header, super_packets),
            ("packet-info header", device.packet_info, self._options.packet_info),
        ):
            if is_so != shall:
                raise self._mismatch(f"a {what}" if is_so else f"no {what}")
        if device.queues <= len(self._fds):
            return False
        size = ioctl.get_vnet_header_size(self._fds[0], self._name)
        if super_packets and size != VNET_HDR_SIZE:
            raise self._mismatch(f"a virtio-net header of {size} bytes")
        return True

    def _mismatch(self, found: str) -> DeviceMismatchError:
        return DeviceMismatchError(
            errno.EINVAL,
            f"another program holds {self._name} with {found}, which is the device's and not one "
            "queue's; open it with the same offload and packet_info, or end that program",
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
            self._carried = info.carrier
            ioctl.set_carrier(self._fds[0], self._name, wanted.carrier)
        await self._configure(session, info)
        self._check_aborted()
        return await session.get(index)

    async def _configure(self, session: Session, info: LinkInfo) -> None:
        """Make the link what was asked for, without a request where it is that already.

        So an ordinary user may open what root prepared: reading takes no privilege.
        """
        wanted = self._options
        hint = f"'ip -d link show {info.name}' tells what it can have"
        for option, attribute, new, old in (
            ("MAC", "address", wanted.mac, info.mac),
            ("MTU", "mtu", wanted.mtu, info.mtu),
            ("queue length", "txqlen", wanted.txqueuelen, info.txqueuelen),
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
            back = f"put the {attribute} back to {old}"
            # Before it is done: a refusal may come halfway, when the interface has left its old
            # bridge and the new one won't have it.
            self._undo.append(lambda session: session.set(info, back, **{attribute: old}))
        await session.set(info, what, hint, **{attribute: new})

    async def _about_to_change(self, session: Session, info: LinkInfo) -> None:
        """Stop here if nobody wants the device any more; else remember what is on it."""
        self._check_aborted()
        if not self._created and self._before is None:
            self._before = Before(
                info, await session.addresses(info), await session.found_routes(info)
            )

    async def _set_autoconf(self, session: Session, info: LinkInfo) -> None:
        """Switch the kernel's own IPv6 on or off, before the link comes up."""
        on = self._options.ipv6_autoconf
        if on is None or (now := await session.autoconf(info)) is None:
            return
        from .._link.autoconf import apply, switched

        wanted = switched(now, on)
        if wanted != now:
            await self._about_to_change(session, info)
            self._undo.append(lambda session: apply(session, info, wanted, now))
            await apply(session, info, now, wanted)
        # On a link that is up already the kernel has made one, at the latest as we attached.
        for address in [] if on else await session.own_link_locals(info):
            await self._about_to_change(session, info)
            await session.remove_address(info, address)

    async def _enslave(self, session: Session, info: LinkInfo, bridge: str) -> None:
        master = await session.get(bridge)
        before = 0 if info.master is None else (await session.get(info.master)).index
        what, hint = f"set the master to {bridge}", f"look whether {bridge} is a bridge"
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
                # Another opening of the same device may have added it since we looked.
                if error.errno == errno.EEXIST and await _has(session, info, address):
                    continue
                raise
            present.add((address.interface, address.peer))
            self._undo.append(functools.partial(_remove_address, info, address))

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
                    continue  # as above
                raise
            present.add(route)
            self._undo.append(functools.partial(_remove_route, info, route))

    async def _take_back(self, session: Session) -> None:
        """Undo what was done to an interface that existed, the last step first.

        One that can't be undone (somebody else was there in between) does not keep the others.
        """
        while self._undo:
            await _tried(self._undo.pop()(session))
        if self._before is None:
            return
        # The kernel takes IPv6 addresses away, and routes with them, where the MTU falls below 1280
        # or the link goes down; it does not bring them back.
        info, addresses, routes = self._before
        present = await session.addresses(info)
        for address in addresses:
            if address not in present:
                await _tried(session.add_address(info, address))
        # Those of the kernel itself come with the addresses.
        there = await session.routes(info)
        for route, protocol in routes:
            if route not in there and protocol != _RTPROT_KERNEL:
                await _tried(session.add_route(info, route, protocol))

    # What can't be taken back

    def _hand_over(self, info: LinkInfo) -> None:
        """Set group, owner and persistence, where they are not so already."""
        wanted, device, fd = self._options, info.tuntap, self._fds[0]
        self._check_aborted()
        if wanted.group is not None and (device is None or wanted.group != device.group):
            ioctl.set_group(fd, self._name, wanted.group)
        if wanted.owner is not None and (device is None or wanted.owner != device.owner):
            ioctl.set_owner(fd, self._name, wanted.owner)
        persists = device is not None and device.persist
        if wanted.persist is not None and wanted.persist != persists:
            ioctl.set_persist(fd, self._name, wanted.persist)
            self._persisted = persists

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise _AbortedError


async def _remove_address(info: LinkInfo, address: LinkAddress, session: Session) -> None:
    await session.remove_address(info, address)


async def _remove_route(info: LinkInfo, route: Route, session: Session) -> None:
    # With its metric, or the kernel might take another one to the same destinations.
    if route.metric is None and route.dst.version == 6:
        route = dataclasses.replace(route, metric=DEFAULT_METRICS[6])
    await session.remove_route(info, route)


async def _has(session: Session, info: LinkInfo, address: LinkAddress) -> bool:
    return (address.interface, address.peer) in {
        (each.interface, each.peer) for each in await session.addresses(info)
    }


async def _tried(request: Awaitable[None]) -> None:
    """Go on where it fails: then somebody else was there in between."""
    with contextlib.suppress(AiotunError):
        await request
