"""Routes and rules that make a namespace's kernel answer for every address.

Without these, the kernel would forward or drop packets from the TUN device to an address that is
not local. A local default route makes every address local, so that packets reach sockets. If no
socket waits, the kernel answers as any host does: with a reset, port unreachable, or an echo reply.

For IPv4 the route must be in the table `local`, because the kernel looks up the source address of
such answers only there. But then the packets of local programs would be delivered locally, too. To
prevent that, the rule that looks up every packet in this table is replaced by two::

    1: from all lookup local suppress_prefixlength 0     everything but the default route
    2: from all iif TUN lookup local

For IPv6 the route is in a table of its own. The kernel answers for any address that is routed as
local, and a default route in the table `local` would break IPv6.

All of this concerns packets *to* the stack. Packets from the stack follow the device's own routes.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING

from ..errors import AiotunError, LinkError, NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from .._link.session import Session
    from .._link.values import Route

__all__ = ["add_if_ipv6", "answer_for_all", "undo"]

_LOCAL = 255  # rtnetlink.h: RT_TABLE_LOCAL
_OURS = 0x6169_6F74  # the number of our table; nothing else is likely to use it
_RULE_IPV6 = 30_000  # any number before that of the table `main`, 32766

# The kernel's errors if it has no IPv6, or the link has none.
_NO_IPV6 = {errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EACCES, errno.ENODEV}


async def add_if_ipv6(session: Session, index: int, route: Route) -> bool:
    """Add an IPv6 route to a link; False if the kernel or the link has no IPv6."""
    info = await session.get(index)
    try:
        await session.add_route(info, route)
    except (LinkError, NotPermittedError) as error:
        if error.errno not in _NO_IPV6:
            raise
        return False
    return True


async def answer_for_all(session: Session, tun: str) -> None:
    """Add the routes and rules.

    Raises:
        LinkError: the kernel refuses; EEXIST if another stack has added them. Nothing is added.
    """
    try:
        await _add(session, tun)
    except BaseException as error:
        if not isinstance(error, LinkError) or error.errno != errno.EEXIST:
            await undo(session, tun)
        raise


async def _add(session: Session, tun: str) -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    # This request must come first: it fails if another stack intercepts in this namespace.
    await session.rule("add", four, 1, _LOCAL, suppress_prefixlen=0)
    await session.rule("add", four, 2, _LOCAL, iifname=tun)
    await session.add_local_default(four, _LOCAL)
    await session.rule("del", four, 0, _LOCAL)
    try:
        await session.rule("add", six, _RULE_IPV6, _OURS, iifname=tun)
        await session.add_local_default(six, _OURS)
    except (LinkError, NotPermittedError) as error:
        if error.errno not in _NO_IPV6:
            raise


async def undo(session: Session, tun: str) -> None:
    """Remove the routes and rules; ignore those that don't exist."""
    four, six = socket.AF_INET, socket.AF_INET6
    await _attempt(session.rule("add", four, 0, _LOCAL))
    await _attempt(session.remove_local_default(four, _LOCAL))
    await _attempt(session.rule("del", four, 2, _LOCAL, iifname=tun))
    await _attempt(session.rule("del", four, 1, _LOCAL, suppress_prefixlen=0))
    await _attempt(session.remove_local_default(six, _OURS))
    await _attempt(session.rule("del", six, _RULE_IPV6, _OURS, iifname=tun))


async def _attempt(request: Awaitable[None]) -> None:
    with contextlib.suppress(AiotunError):
        await request
