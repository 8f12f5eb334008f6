"""Section 5.4: the functions of the protocol, each composed of `cryptography` and hashlib.

Python can't erase keys from memory: where the paper zeroes them, this drops the last reference.
"""

import hashlib
import hmac
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

__all__ = [
    "CONSTRUCTION",
    "IDENTIFIER",
    "LABEL_COOKIE",
    "LABEL_MAC1",
    "Forged",
    "aead_open",
    "aead_seal",
    "dh",
    "hash_",
    "kdf",
    "mac",
    "public_key",
    "tai64n",
    "xaead_open",
    "xaead_seal",
]

CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
LABEL_MAC1 = b"mac1----"
LABEL_COOKIE = b"cookie--"


class Forged(Exception):  # noqa: N818 - what it is, in the paper's words
    """The message was not made with the key."""


def public_key(private: bytes) -> bytes:
    """The public key of a private key, as in DH-GENERATE()."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def dh(private: bytes, public: bytes) -> bytes:
    """DH(private key, public key): Curve25519.

    Raises:
        Forged: the public key is a point of small order, so the result would not be secret.
    """
    try:
        own = X25519PrivateKey.from_private_bytes(private)
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Forged("a public key of small order") from None


def hash_(data: bytes) -> bytes:
    """HASH(input): BLAKE2s, 32 bytes."""
    return hashlib.blake2s(data).digest()


def mac(key: bytes, data: bytes) -> bytes:
    """MAC(key, input): keyed BLAKE2s, 16 bytes."""
    return hashlib.blake2s(data, key=key, digest_size=16).digest()


def kdf(count: int, key: bytes, data: bytes) -> tuple[bytes, ...]:
    """KDF_n(key, input): HKDF with HMAC-BLAKE2s, `count` outputs of 32 bytes."""
    secret = hmac.digest(key, data, "blake2s")
    outputs: list[bytes] = []
    last = b""
    for number in range(1, count + 1):
        last = hmac.digest(secret, last + bytes([number]), "blake2s")
        outputs.append(last)
    return tuple(outputs)


def aead_seal(key: bytes, plain: bytes, authenticated: bytes) -> bytes:
    """AEAD(key, 0, plain text, auth text): handshakes use a key once only, with the counter 0."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, authenticated)


def aead_open(key: bytes, sealed: bytes, authenticated: bytes) -> bytes:
    """Undo `aead_seal`; raises `Forged`."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, authenticated)
    except InvalidTag:
        raise Forged("an authentication tag that does not fit") from None


def xaead_seal(key: bytes, nonce: bytes, plain: bytes, authenticated: bytes) -> bytes:
    """XAEAD(key, nonce, plain text, auth text): XChaCha20Poly1305, with a nonce of 24 bytes."""
    subkey = _hchacha20(key, nonce[:16])
    return ChaCha20Poly1305(subkey).encrypt(bytes(4) + nonce[16:], plain, authenticated)


def xaead_open(key: bytes, nonce: bytes, sealed: bytes, authenticated: bytes) -> bytes:
    """Undo `xaead_seal`; raises `Forged`."""
    subkey = _hchacha20(key, nonce[:16])
    try:
        return ChaCha20Poly1305(subkey).decrypt(bytes(4) + nonce[16:], sealed, authenticated)
    except InvalidTag:
        raise Forged("an authentication tag that does not fit") from None


def _hchacha20(key: bytes, nonce: bytes) -> bytes:
    """HChaCha20 (draft-irtf-cfrg-xchacha, section 2.2), out of ChaCha20's key stream.

    It is the state after ChaCha20's rounds, words 0-3 and 12-15. A block of the key stream is that
    state plus the state before the rounds (RFC 8439, section 2.3). For those words the state before
    holds only the constants and the nonce, which are known, so it can be subtracted.
    """
    block = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))
    before = struct.unpack("<4I", b"expand 32-byte k") + struct.unpack("<4I", nonce)
    stream = struct.unpack("<16I", block)
    after = zip(stream[:4] + stream[12:], before, strict=True)
    return struct.pack("<8I", *((word - start) & 0xFFFFFFFF for word, start in after))


def tai64n(seconds: float) -> bytes:
    """TIMESTAMP(): 12 bytes that sort as the time does (https://cr.yp.to/libtai/tai64.html).

    Args:
        seconds: since 1970.
    """
    # Round to about a sixtieth of a second, as others do: an exact time would reveal what the
    # processor does.
    whole, nanoseconds = divmod(int(seconds * 1e9), 1_000_000_000)
    return struct.pack("!QI", 0x400000000000000A + whole, nanoseconds & ~0xFFFFFF)
