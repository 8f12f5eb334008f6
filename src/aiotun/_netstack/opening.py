"""Opening a stack: its namespace, its device, what makes the kernel answer for every address.

What was done before a step that fails is undone; see also `_device.opening`.
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
"""Told apart from the same routes given: of these, what the kernel can't have is left out."""

_VARIABLE = "AIOTUN_NETSTACK"


class Options(NamedTuple):
    """The arguments of `open_netstack`, after the checks; an opener each can be used once."""

    namespace: NamespaceOpener | Namespace
    tun: dict[str, Any]
    ipv6_default: Route | None
    intercept: bool
    answer_pings: bool


class Prepared(NamedTuple):
    """An open stack: what is shared by its parts, and what is needed to close it."""

    core: Core
    diag: socket.socket
    owns_namespace: bool
    # The namespace, where something is to be undone in it: it is another's, and we intercept.
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
        TypeError, ValueError: one is invalid.
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
    open_tun(**tun)
    ipv6_default = None
    if routes is DEFAULT_ROUTES and mtu >= IPV6_MIN_MTU:
        ipv6_default = parse_route(DEFAULT_ROUTES[1])
    return Options(namespace or new_namespace(), tun, ipv6_default, intercept, answer_pings)


async def open_core(options: Options) -> Prepared:
    """Open everything.

    Raises:
        ValueError: `AIOTUN_NETSTACK` has a word that it can't have.
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
            core.mechanism = Tproxy(namespace, tun.name)
        else:
            core.mechanism = Listeners(namespace, tun.name)
    undo_at_close = options.intercept and not owns
    place = NamespaceFd(os.dup(namespace.fileno())) if undo_at_close else None
    return Prepared(core, done.control, owns, place)


def _forced() -> str:
    """Read the mechanism that is asked for."""
    word = os.environ.get(_VARIABLE, "")
    if word not in ("", "tproxy", "listeners"):
        raise ValueError(f"{_VARIABLE} must be 'tproxy', 'listeners' or empty, got {word!r}")
    return word


class _Done(NamedTuple):
    """What `_Work` has done: the own addresses, a socket to reset connections, nf_tables' rules."""

    own: frozenset[bytes]
    control: socket.socket
    tproxy: bool


class _Work:
    """What is left to do in a thread in the namespace once the device is there."""

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
        """Have nf_tables redirect to sockets of ours; False where sockets are made on demand.

        Raises:
            LinkError: nf_tables is insisted on, and this kernel has none.
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
    """Leave a namespace as it was. Call it in a thread that is in there."""
    with contextlib.suppress(OSError):
        nftables.remove(name)
    in_session(lambda session: routing.undo(session, name))
