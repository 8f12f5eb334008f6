"""The host's name servers, as /etc/resolv.conf names them now.

Source: resolv.conf(5).
"""

import contextlib
import ipaddress
import os
from pathlib import Path

__all__ = ["Resolvers"]

_PATH = Path("/etc/resolv.conf")
_KEPT = ("search", "domain", "options", "sortlist")


class Resolvers:
    """The name servers outside. The file is read again when it has changed (a new network)."""

    def __init__(self, path: Path = _PATH) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._servers: list[str] = []
        self._kept: list[str] = []

    @property
    def servers(self) -> list[str]:
        """Their addresses, in the file's order; never empty."""
        self._read()
        return self._servers

    def text(self, *servers: str) -> str:
        """Return a file for a program inside: other name servers, the host's other settings."""
        self._read()
        return "".join(f"{each}\n" for each in (*(f"nameserver {s}" for s in servers), *self._kept))

    def _read(self) -> None:
        seen, text = None, ""
        with contextlib.suppress(OSError):
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen == self._seen:
                return
            text = self._path.read_text(errors="replace")
        self._seen = seen
        self._servers, self._kept = [], []
        for line in text.splitlines():
            word, *rest = line.partition("#")[0].partition(";")[0].split() or [""]
            if word == "nameserver" and rest and _is_address(rest[0]):
                self._servers.append(rest[0])
            elif word in _KEPT:
                self._kept.append(" ".join([word, *rest]))
        # Without a name server a program asks this machine.
        self._servers = self._servers or ["127.0.0.1"]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
