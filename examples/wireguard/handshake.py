"""Sections 5.4.2, 5.4.3 and 5.4.5: Noise_IKpsk2, as the initiator and as the responder.

The names are the paper's: `C` is the chaining key, `H` the hash of the whole conversation, E and S
are ephemeral and static keys, i and r stand for initiator and responder.
"""

# ruff: noqa: N806 - the names are the paper's

import os
from dataclasses import dataclass

from .crypto import CONSTRUCTION, IDENTIFIER, aead_open, aead_seal, dh, hash_, kdf, public_key
from .messages import Initiation, Response

__all__ = ["Identity", "Keys", "Noise", "Opened", "initiate", "open_initiation", "open_response"]
__all__ += ["respond"]

_C = hash_(CONSTRUCTION)
_H = hash_(_C + IDENTIFIER)


@dataclass(frozen=True)
class Identity:
    """Our own keys: S_priv and S_pub."""

    private: bytes
    public: bytes


@dataclass(frozen=True)
class Keys:
    """Section 5.4.5: the keys that a handshake produces."""

    send: bytes
    receive: bytes


@dataclass(frozen=True)
class Noise:
    """The state of a handshake between its two messages."""

    ephemeral: bytes  # the initiator: E_i private; the responder: E_i public
    C: bytes
    H: bytes


@dataclass(frozen=True)
class Opened:
    """The contents of a genuine initiation."""

    static: bytes
    timestamp: bytes
    noise: Noise


def initiate(
    us: Identity, static_r: bytes, static_static: bytes, sender: bytes, timestamp: bytes
) -> tuple[Initiation, Noise]:
    """Section 5.4.2, the initiator's side.

    Args:
        static_r: S_r public.
        static_static: DH(S_i, S_r), which is the same every time.
    """
    H = hash_(_H + static_r)
    E_i = os.urandom(32)
    E_i_pub = public_key(E_i)
    (C,) = kdf(1, _C, E_i_pub)
    H = hash_(H + E_i_pub)
    C, key = kdf(2, C, dh(E_i, static_r))
    static = aead_seal(key, us.public, H)
    H = hash_(H + static)
    C, key = kdf(2, C, static_static)
    sealed = aead_seal(key, timestamp, H)
    H = hash_(H + sealed)
    return Initiation(sender, E_i_pub, static, sealed), Noise(E_i, C, H)


def open_initiation(us: Identity, message: Initiation) -> Opened:
    """Section 5.4.2, the responder's side; raises `Forged`."""
    H = hash_(_H + us.public)
    (C,) = kdf(1, _C, message.ephemeral)
    H = hash_(H + message.ephemeral)
    C, key = kdf(2, C, dh(us.private, message.ephemeral))
    static_i = aead_open(key, message.static, H)
    H = hash_(H + message.static)
    C, key = kdf(2, C, dh(us.private, static_i))
    timestamp = aead_open(key, message.timestamp, H)
    H = hash_(H + message.timestamp)
    return Opened(static_i, timestamp, Noise(message.ephemeral, C, H))


def respond(
    opened: Opened, preshared: bytes, sender: bytes, receiver: bytes
) -> tuple[Response, Keys]:
    """Section 5.4.3, the responder's side, and section 5.4.5."""
    C, H = opened.noise.C, opened.noise.H
    E_r = os.urandom(32)
    E_r_pub = public_key(E_r)
    (C,) = kdf(1, C, E_r_pub)
    H = hash_(H + E_r_pub)
    (C,) = kdf(1, C, dh(E_r, opened.noise.ephemeral))
    (C,) = kdf(1, C, dh(E_r, opened.static))
    C, tau, key = kdf(3, C, preshared)
    H = hash_(H + tau)
    empty = aead_seal(key, b"", H)
    receive, send = kdf(2, C, b"")
    return Response(sender, receiver, E_r_pub, empty), Keys(send, receive)


def open_response(us: Identity, noise: Noise, preshared: bytes, message: Response) -> Keys:
    """Section 5.4.3, the initiator's side, and section 5.4.5; raises `Forged`."""
    C, H = noise.C, noise.H
    (C,) = kdf(1, C, message.ephemeral)
    H = hash_(H + message.ephemeral)
    (C,) = kdf(1, C, dh(noise.ephemeral, message.ephemeral))
    (C,) = kdf(1, C, dh(us.private, message.ephemeral))
    C, tau, key = kdf(3, C, preshared)
    H = hash_(H + tau)
    aead_open(key, message.empty, H)
    send, receive = kdf(2, C, b"")
    return Keys(send, receive)
