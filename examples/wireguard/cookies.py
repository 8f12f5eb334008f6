"""Sections 5.3, 5.4.4 and 5.4.7: mac1, mac2, and protection against floods of handshakes.

A valid mac1 shows that the sender knows our public key. Under load, when there are too many
handshakes to compute, mac2 must also show that the sender receives at its source address, and each
address gets a limited share.
"""

import hmac
import os
from ipaddress import ip_address

from .crypto import LABEL_COOKIE, LABEL_MAC1, Forged, hash_, mac, xaead_open, xaead_seal
from .messages import MACS_BYTES, CookieReply

__all__ = ["Checker", "Endpoint", "Stamper"]

Endpoint = tuple[str, int] | tuple[str, int, int, int]
"""An IPv4 or IPv6 address in the form of the socket module."""

_COOKIE_SECONDS = 120  # section 5.4.4; a secret is kept as long (5.4.7)
_NONE = bytes(16)

# The share of an address under load, as in other implementations.
_SHARE_PER_SECOND, _SHARE_AT_ONCE = 20, 5
_ADDRESSES = 4096


class Stamper:
    """Appends the macs to messages for a peer; each peer has its own."""

    def __init__(self, public: bytes) -> None:
        self._mac1_key = hash_(LABEL_MAC1 + public)
        self._cookie_key = hash_(LABEL_COOKIE + public)
        self._cookie: bytes | None = None
        self._cookie_time = 0.0
        self._last_mac1: bytes | None = None

    def stamp(self, message: bytes, now: float) -> bytes:
        """Section 5.4.4: append both macs."""
        self._last_mac1 = mac(self._mac1_key, message)
        message += self._last_mac1
        if self._cookie is not None and now - self._cookie_time < _COOKIE_SECONDS:
            return message + mac(self._cookie, message)
        return message + _NONE

    def take(self, reply: CookieReply, now: float) -> None:
        """Section 5.4.7: keep the cookie for the next messages; raises `Forged`."""
        if self._last_mac1 is None:
            raise Forged("a cookie for nothing that was sent")
        self._cookie = xaead_open(self._cookie_key, reply.nonce, reply.cookie, self._last_mac1)
        self._cookie_time = now
        self._last_mac1 = None  # a message gets one cookie


class Checker:
    """Checks the macs of messages to us; an interface has one.

    Args:
        limit: how many handshakes a second need no cookie.
    """

    def __init__(self, public: bytes, limit: int) -> None:
        self._mac1_key = hash_(LABEL_MAC1 + public)
        self._cookie_key = hash_(LABEL_COOKIE + public)
        self._limit = limit
        self._recent = 0.0  # handshakes, leaking away at `limit` a second
        self._recent_time = 0.0
        self._loaded_until = 0.0
        self._secret, self._secret_time = os.urandom(32), float("-inf")
        self._shares: dict[bytes, tuple[float, float]] = {}

    def mac1_fits(self, data: bytes) -> bool:
        expected = mac(self._mac1_key, data[:-MACS_BYTES])
        return hmac.compare_digest(expected, data[-MACS_BYTES:-16])

    def mac2_fits(self, data: bytes, source: Endpoint, now: float) -> bool:
        expected = mac(self._cookie(source, now), data[:-16])
        return hmac.compare_digest(expected, data[-16:])

    def under_load(self, now: float) -> bool:
        """Count a handshake, and return whether there are too many (section 5.3)."""
        leaked = (now - self._recent_time) * self._limit
        self._recent = max(0.0, self._recent - leaked) + 1
        self._recent_time = now
        if self._recent > self._limit:
            self._recent = float(self._limit)
            self._loaded_until = now + 1
        return now < self._loaded_until

    def grants(self, source: Endpoint, now: float) -> bool:
        """Whether this address may have another handshake; IPv6 counts by /64 networks."""
        key = ip_address(source[0].partition("%")[0]).packed[:8]
        if len(self._shares) >= _ADDRESSES and key not in self._shares:
            self._shares.clear()
        left, before = self._shares.get(key, (float(_SHARE_AT_ONCE), now))
        left = min(_SHARE_AT_ONCE, left + (now - before) * _SHARE_PER_SECOND)
        self._shares[key] = (max(0.0, left - 1), now)
        return left >= 1

    def reply(self, sender: bytes, data: bytes, source: Endpoint, now: float) -> bytes:
        """Section 5.4.7: make the message that sends a cookie to its sender."""
        nonce = os.urandom(24)
        cookie = self._cookie(source, now)
        sealed = xaead_seal(self._cookie_key, nonce, cookie, data[-MACS_BYTES:-16])
        return CookieReply(sender, nonce, sealed).pack()

    def _cookie(self, source: Endpoint, now: float) -> bytes:
        if now - self._secret_time >= _COOKIE_SECONDS:
            self._secret, self._secret_time = os.urandom(32), now
        address = ip_address(source[0].partition("%")[0]).packed
        return mac(self._secret, address + source[1].to_bytes(2, "big"))
