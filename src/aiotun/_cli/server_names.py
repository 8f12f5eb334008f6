"""Finds the name of the server that a client asks for, in the first bytes that it sends.

Sources: RFC 8446, 4.1.2 (ClientHello); RFC 6066, 3 (server_name); RFC 9112, 3.2 (Host).
"""

import re

__all__ = ["server_name"]

_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0
_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
_REQUEST = re.compile(rb"[A-Z]{3,16} [^\r\n]* HTTP/1\.[01]\r\n")


def server_name(data: bytes) -> str | None:
    """Return the name in a TLS ClientHello or in the head of an HTTP request; None without one.

    Args:
        data: the first bytes of the client's stream. Where they end inside the ClientHello or the
            head, what they hold is searched.
    """
    try:
        found = _in_client_hello(data) if data[:1] == b"\x16" else _in_request(data)
    except IndexError:  # the data ends before the name does
        return None
    text = found.decode("ascii", "replace").removesuffix(".")
    return text if text and text.isprintable() and " " not in text else None


def _in_request(data: bytes) -> bytes:
    if _REQUEST.match(data) and (found := _HOST.search(data)):
        return found[1]
    return b""


class _Fields:
    """Reads the fields of a TLS message in turn."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise IndexError
        found = self._data[self._at : end]
        self._at = end
        return found

    def vector(self, size: int) -> bytes:
        """Take a field whose length, of `size` bytes, stands before it."""
        return self.take(self.number(size))


def _in_client_hello(data: bytes) -> bytes:
    message = _Fields(_handshake(data))
    if message.number(1) != _CLIENT_HELLO:
        return b""
    message.take(3 + 2 + 32)  # length, version, random
    for size in (1, 2, 1):  # session identifier, cipher suites, compression methods
        message.vector(size)
    length = message.number(2)
    while length > 0:
        kind, size = message.number(2), message.number(2)
        content = _Fields(message.take(size))
        length -= 4 + size
        if kind == _SERVER_NAME:
            content.number(2)  # the length of the list; clients send one name
            return content.vector(2) if content.number(1) == _HOST_NAME else b""
    return b""


def _handshake(data: bytes) -> bytes:
    """Join the handshake's bytes, which may be spread over several records."""
    records = _Fields(data)
    found = b""
    try:
        while records.number(1) == _HANDSHAKE:
            records.take(2)  # version
            size = records.number(2)
            found += records.take(size)
    except IndexError:
        # The last record has not come whole. The name stands near the beginning as a rule.
        found += data[5:] if not found else b""
    return found
