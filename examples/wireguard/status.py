"""The status of an interface: as text like `wg show`, and for wg's own request."""

import base64
from collections import Counter
from collections.abc import Iterator

from .cookies import Endpoint
from .interface import Interface
from .peer import Peer

__all__ = ["text", "uapi"]


def text(name: str, port: int, interface: Interface, lost: Counter[str], now: float) -> str:
    """Show an interface in the form of `wg show`, and the dropped messages by reason."""
    lines = [f"interface: {name}", f"  public key: {_base64(interface.identity.public)}"]
    lines += ["  private key: (hidden)", f"  listening port: {port}"]
    lines += _dropped("  dropped", interface.dropped)
    lines += _dropped("  lost", lost)
    for peer in interface.peers.values():
        lines += ["", *_peer(peer, now)]
    return "\n".join(lines) + "\n"


def _peer(peer: Peer, now: float) -> Iterator[str]:
    config = peer.config
    yield f"peer: {_base64(config.public_key)}"
    if any(config.preshared_key):
        yield "  preshared key: (hidden)"
    if peer.endpoint is not None:
        yield f"  endpoint: {show_endpoint(peer.endpoint)}"
    yield f"  allowed ips: {', '.join(map(str, config.allowed_ips)) or '(none)'}"
    if peer.last_handshake is not None:
        yield f"  latest handshake: {now - peer.last_handshake:.0f} seconds ago"
    if peer.received_bytes or peer.sent_bytes:
        received, sent = _amount(peer.received_bytes), _amount(peer.sent_bytes)
        yield f"  transfer: {received} received, {sent} sent"
    if config.keepalive:
        yield f"  persistent keepalive: every {config.keepalive} seconds"
    yield from _dropped("  dropped", peer.dropped)


def _dropped(title: str, counts: Counter[str]) -> list[str]:
    shown = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()) if count)
    return [f"{title}: {shown}"] if shown else []


def show_endpoint(endpoint: Endpoint) -> str:
    host, port = endpoint[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _base64(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _amount(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def uapi(port: int, mark: int, interface: Interface) -> str:
    """Answer "get=1" (https://www.wireguard.com/xplatform/), including the private key."""
    lines = [f"private_key={interface.identity.private.hex()}", f"listen_port={port}"]
    if mark:
        lines.append(f"fwmark={mark}")
    for peer in interface.peers.values():
        config = peer.config
        lines.append(f"public_key={config.public_key.hex()}")
        lines.append(f"preshared_key={config.preshared_key.hex()}")
        lines.append("protocol_version=1")
        if peer.endpoint is not None:
            lines.append(f"endpoint={show_endpoint(peer.endpoint)}")
        if peer.last_handshake is not None:
            seconds = interface.epoch() + peer.last_handshake
            lines.append(f"last_handshake_time_sec={int(seconds)}")
            lines.append(f"last_handshake_time_nsec={int(seconds % 1 * 1e9)}")
        lines.append(f"tx_bytes={peer.sent_bytes}")
        lines.append(f"rx_bytes={peer.received_bytes}")
        lines.append(f"persistent_keepalive_interval={config.keepalive}")
        lines += [f"allowed_ip={network}" for network in config.allowed_ips]
    return "\n".join(lines) + "\nerrno=0\n\n"
