"""Opening a stack: its namespace, its device, and the rules to answer for every address.

If a step fails, the steps before it are undone; see also `_device.opening`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple

from .._device.options import switch
from .._kernel import places, threads
from .._kernel.namespaces import NamespaceFd
from .._link.netlink import in_session
from .._link.values import IPV6_MIN_MTU, AddressArg, Route, RouteArg, parse_route
from ..device import Opener, TunDevice, open_tun
from ..errors import LinkError
from ..namespaces import Namespace, NamespaceOpener, new_namespace
from . import diag, nftables, routing
from .core import Core
from .counts import Counts
from .intake import Intake
from .intakeport import IntakePort
from .listeners import Listeners
from .tproxy import Tproxy

if TYPE_CHECKING:
    from .._link.session import Session

__all__ = ["DEFAULT_ROUTES", "Options", "Prepared", "check", "open_core", "undo"]

DEFAULT_ROUTES = ("default", "::/0")
"""Compared by identity: of these routes, but not of equal ones that the user gives, the route for
IPv6 is left out if the kernel can't have it."""

_VARIABLE = "AIOTUN_NETSTACK"


class Options(NamedTuple):
    """The checked arguments of `open_netstack`. They can be used once, because openers can."""

    namespace: NamespaceOpener | Namespace
    tun: dict[str, Any]
    ipv6_default: Route | None
    intercept: bool
    answer_pings: bool


class Prepared(NamedTuple):
    """An open stack: the state that its parts share, and what is needed to close it."""

    core: Core
    diag: socket.socket
    owns_namespace: bool
    # The namespace, if rules must be removed from it at the end: the stack intercepts, and the
    # namespace was given by the user.
    place: NamespaceFd | None


def check(
    *,
    addresses: Iterable[AddressArg],
    routes: Iterable[RouteArg | Route],
    mtu: int,
    offload: Any,
    intercept: bool,
    answer_pings: bool,
    namespace: Namespace | None,
    name: str | None,
    txqueuelen: int | None,
) -> Options:
    """Check the arguments of `open_netstack`. No system call is made.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    switch("intercept", intercept)
    switch("answer_pings", answer_pings)
    if namespace is not None and not isinstance(namespace, Namespace):
        raise TypeError(
            f"namespace must be a Namespace, got {namespace!r}; open_namespace makes one"
        )
    tun: dict[str, Any] = {
        "name": name,
        "addresses": addresses,
        "routes": DEFAULT_ROUTES[:1] if routes is DEFAULT_ROUTES else routes,
        "mtu": mtu,
        "offload": offload,
        "txqueuelen": txqueuelen,
        "ipv6_autoconf": False,
        "exclusive": True,
    }
    if name is None:
        del tun["exclusive"]
    # The check uses iterators up, so they are kept as lists.
    for word in ("addresses", "routes"):
        if isinstance(tun[word], Iterator):
            tun[word] = list(tun[word])
    if mtu is None:  # which `open_tun` takes for its default
        raise TypeError("mtu must be an int, got None")
    open_tun(**tun)
    ipv6_default = None
    if routes is DEFAULT_ROUTES and mtu >= IPV6_MIN_MTU:
        ipv6_default = parse_route(DEFAULT_ROUTES[1])
    return Options(namespace or new_namespace(), tun, ipv6_default, intercept, answer_pings)


async def open_core(options: Options) -> Prepared:
    """Open everything.

    Raises:
        ValueError: the environment variable `AIOTUN_NETSTACK` has an unknown value.
        AiotunError: a step failed.
    """
    forced = _forced()
    given = options.namespace
    owns = isinstance(given, NamespaceOpener)
    namespace = await given if isinstance(given, NamespaceOpener) else given
    tun: TunDevice | None = None
    try:
        opener: Opener[TunDevice] = open_tun(netns=namespace, **options.tun)
        tun = await opener
        work = _Work(tun.name, tun.index, options, forced)
        done = await threads.run(work.run, namespace.fileno(), undo=work.undo)
    except BaseException:
        if tun is not None:
            tun.close()
        if owns:
            namespace.close()
        raise
    counts = Counts()
    intake = Intake(done.own, counts, options.answer_pings)
    core = Core(namespace, tun, done.own, None, counts, intake)
    if options.intercept:
        queue = tun.queues[0]
        queue.use(IntakePort(queue.port, intake))
        if done.tproxy:
            core.mechanism = Tproxy(namespace, tun.name, tun.mtu)
        else:
            core.mechanism = Listeners(namespace, tun.name, tun.mtu)
    undo_at_close = options.intercept and not owns
    place = NamespaceFd(os.dup(namespace.fileno())) if undo_at_close else None
    return Prepared(core, done.control, owns, place)


def _forced() -> str:
    """Return the mechanism that the environment variable asks for, or an empty string."""
    word = os.environ.get(_VARIABLE, "")
    if word not in ("", "tproxy", "listeners"):
        raise ValueError(f"{_VARIABLE} must be 'tproxy', 'listeners' or empty, got {word!r}")
    return word


class _Done(NamedTuple):
    """The own addresses, a socket to reset connections, and whether `tproxy` works."""

    own: frozenset[bytes]
    control: socket.socket
    tproxy: bool


class _Work:
    """The steps that run in a thread in the namespace, after the device was opened."""

    def __init__(self, name: str, index: int, options: Options, forced: str) -> None:
        self._forced = forced
        self._name = name
        self._index = index
        self._options = options

    def run(self) -> _Done:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        control = places.make_socket(socket.AF_NETLINK, kind, diag.FAMILY)
        try:
            control.setblocking(False)
            addresses = in_session(self._configure)
            tproxy = self._options.intercept and self._redirect(addresses)
        except BaseException:
            control.close()
            with contextlib.suppress(Exception):
                undo(self._name)
            raise
        return _Done(frozenset(each.packed for each in addresses), control, tproxy)

    def undo(self, done: _Done) -> None:
        done.control.close()
        undo(self._name)

    def _redirect(self, own: list[IPv4Address | IPv6Address]) -> bool:
        """Have nf_tables redirect to sockets of ours; False if sockets are made on demand instead.

        Raises:
            LinkError: `AIOTUN_NETSTACK` asks for `tproxy`, and this kernel has no nf_tables.
        """
        if self._forced == "listeners":
            return False
        try:
            nftables.intercept(self._name, own)
        except nftables.NoTproxyError as error:
            if self._forced:
                raise LinkError(error.errno, error.strerror, self._name) from error
            return False
        return True

    async def _configure(self, session: Session) -> list[IPv4Address | IPv6Address]:
        if self._options.ipv6_default is not None:
            await routing.add_if_ipv6(session, self._index, self._options.ipv6_default)
        if self._options.intercept:
            await routing.answer_for_all(session, self._name)
        found = await session.all_addresses()
        return [each.interface.ip for link in found.values() for each in link]


def undo(name: str) -> None:
    """Remove a stack's rules and routes. Call this in a thread that is in the namespace."""
    with contextlib.suppress(OSError):
        nftables.remove(name)
    in_session(lambda session: routing.undo(session, name))
