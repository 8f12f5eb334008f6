"""The kernel's IPv6 autoconfiguration of a link: a link-local address and router solicitations.

One netlink attribute (IFLA_INET6_ADDR_GEN_MODE) switches both off: a link without a link-local
address has no source address for a router solicitation. Netlink needs no /proc/sys, which is
read-only in containers. The sysctl router_solicitations is set too, for a link that is given a
link-local address while it is up.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from .._kernel import places
from .info import Autoconf

if TYPE_CHECKING:
    from .info import LinkInfo
    from .session import Session

__all__ = ["apply", "switched"]

# if_link.h: enum in6_addr_gen_mode. On a TUN device, which has no MAC, the kernel changes EUI64 to
# IN6_ADDR_GEN_MODE_RANDOM when the link comes up.
_EUI64, _NONE = 0, 1


def switched(now: Autoconf, on: bool) -> Autoconf:
    """Return the settings with autoconfiguration on or off; settings that fit are kept."""
    if not on:
        return Autoconf(_NONE, 0)
    return Autoconf(_EUI64 if now.mode == _NONE else now.mode, now.solicitations or -1)


async def apply(session: Session, info: LinkInfo, now: Autoconf, wanted: Autoconf) -> None:
    """Change the settings that differ. Call this in a thread that is in the link's namespace.

    Raises:
        LinkError, NotPermittedError: the kernel refused.
    """
    if wanted.mode != now.mode:
        word = "off" if wanted.mode == _NONE else "on"
        what = f"switch the kernel's IPv6 autoconfiguration {word}"
        mode = ("IFLA_INET6_ADDR_GEN_MODE", wanted.mode)
        spec = {"attrs": [("AF_INET6", {"attrs": [mode]})]}
        await session.set(info, what, "it came with Linux 3.17", af_spec=spec)
    if wanted.solicitations != now.solicitations:
        # /proc/sys is read-only in containers and for ordinary users. Setting the mode is enough
        # to keep the promise.
        with contextlib.suppress(OSError):
            _write(info.name, wanted.solicitations)


def _write(name: str, solicitations: int) -> None:
    # /proc/sys/net shows the settings of the namespace of the thread that opens the file.
    path = f"/proc/sys/net/ipv6/conf/{name}/router_solicitations"
    with open(places.open_file(path, os.O_WRONLY | os.O_CLOEXEC), "w") as file:
        file.write(str(solicitations))
