"""The parsers of the VPN examples: WireGuard's messages, udp_vpn's datagrams, TCP's MSS option.

Two ends talk over a simulated network. The input decides which datagrams the network drops,
repeats, reorders, damages or invents. Keys and nonces are the same in every run.
"""

import random
from collections import Counter
from ipaddress import ip_network
from typing import Any
from unittest import mock

import _mss
import udp_vpn
from wireguard import crypto
from wireguard.config import PeerConfig
from wireguard.interface import Interface

from ._target import Choices, Target

__all__ = ["TARGETS"]

_A, _B, _ELSEWHERE = ("192.0.2.1", 1001), ("192.0.2.2", 1002), ("198.51.100.1", 1)
_PACKETS = {
    _A: [b"E" + bytes(11) + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + b"from a %d" % n for n in range(3)],
    _B: [b"E" + bytes(11) + bytes([10, 0, 0, 2, 10, 0, 0, 1]) + b"from b %d" % n for n in range(3)],
}
_SECRETS = random.Random(0).randbytes(32), random.Random(1).randbytes(32)


def _steady() -> Any:
    """Make os.urandom return the same bytes for each input."""
    return mock.patch("os.urandom", random.Random(2).randbytes)


def _meddled(choices: Choices, datagram: bytes) -> list[bytes]:
    """Return what the network delivers instead of a datagram."""
    way = choices.randrange(8)
    if way == 1:
        return []
    if way == 2:
        return [datagram, datagram]
    if way == 3:
        return [datagram[: choices.randrange(len(datagram) + 1)]]
    if way == 4:
        changed = bytearray(datagram)
        for _ in range(choices.randrange(1, 4)):
            changed[choices.randrange(len(changed))] ^= choices.randrange(1, 256)
        return [bytes(changed), datagram]
    if way == 5:
        return [choices.rest(200), datagram]
    if way == 6:
        return [datagram[:4] + choices.rest(150), datagram]
    if way == 7:
        return [datagram + choices.rest(20), datagram]
    return [datagram]


def _check_genuine(got: list[bytes], sent: list[bytes]) -> None:
    for packet in got:
        # WireGuard pads packets with zeros.
        assert packet.rstrip(b"\0") in {each.rstrip(b"\0") for each in sent}, packet
    assert len(got) <= len(sent), "a packet was delivered twice"


def wireguard(data: bytes) -> None:
    choices = Choices(data)
    with _steady():
        keys = dict(zip((_A, _B), _SECRETS, strict=True))
        ends: dict[Any, Interface] = {}
        for own, far, network in ((_A, _B, "10.0.0.2/32"), (_B, _A, "10.0.0.1/32")):
            peer = PeerConfig(
                crypto.public_key(keys[far]), allowed_ips=[ip_network(network)], endpoint=far
            )
            ends[own] = Interface(keys[own], [peer], epoch=lambda: 1.7e9)
        got: dict[Any, list[bytes]] = {_A: [], _B: []}
        now = 1000.0
        ends[_A].send([_PACKETS[_A][0]], now)
        sent = {_A: [_PACKETS[_A][0]], _B: []}
        for turn in range(8):
            now += choices.choice((0.1, 6.0, 0.1, 130.0))
            for own, far in ((_A, _B), (_B, _A)):
                outgoing, ends[own].outgoing = ends[own].outgoing, []
                datagrams = [
                    each
                    for _, messages in outgoing
                    for message in messages
                    for each in _meddled(choices, message)
                ]
                source = _ELSEWHERE if choices.randrange(8) == 7 else own
                got[far] += ends[far].receive(datagrams, source, now) if datagrams else []
            if turn in (2, 4):
                for own in (_A, _B):
                    sent[own].append(_PACKETS[own][turn // 2])
                    ends[own].send([_PACKETS[own][turn // 2]], now)
            for end in ends.values():
                end.tick(now)
    _check_genuine([each for each in got[_B] if each], sent[_A])
    _check_genuine([each for each in got[_A] if each], sent[_B])


class _Socket:
    """Records what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_many_nowait(self, datagrams: list[bytes], address: Any) -> int:
        self.sent += datagrams
        return len(datagrams)

    async def send(self, datagram: bytes, address: Any) -> None:
        self.sent.append(datagram)

    async def send_many(self, datagrams: list[bytes], address: Any) -> int:
        return self.send_many_nowait(datagrams, address)


def _now(coroutine: Any) -> None:
    """Run a coroutine that must not wait."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("the coroutine waits")


def udp_vpn_(data: bytes) -> None:
    choices = Choices(data)
    key = _SECRETS[0]
    near, far = _Socket(), _Socket()
    socks: Any = (near, far)
    dropped: Counter[str] = Counter()
    address = bytes([10, 0, 0, 1])
    with _steady():
        cipher = "aes-256-gcm"
        client = udp_vpn.OneServer(
            udp_vpn.Client("a", [address], key), cipher, socks[0], _B, 5.0, dropped
        )
        server = udp_vpn.Server([udp_vpn.Client("a", [address], key)], cipher, dropped)
        got: dict[str, list[bytes]] = {"client": [], "server": []}
        sent: dict[str, list[bytes]] = {"client": [], "server": []}
        now = 1000.0
        for turn in range(6):
            now += choices.choice((0.5, 2.0, 0.5, 700.0))
            client.tick(now)
            server.tick(now)
            for name, sock, receive, source in (
                ("server", near, server.receive, _A),
                ("client", far, client.receive, _B),
            ):
                datagrams, sock.sent = sock.sent, []
                arrived = [each for one in datagrams for each in _meddled(choices, one)]
                before = sum(map(len, far.sent))
                for run in udp_vpn.runs_of_one_session(arrived, dropped):
                    got[name] += receive(socks[name == "server"], run, source, now)
                if name == "server":  # else the server could be abused to flood others
                    assert sum(map(len, far.sent)) - before <= sum(map(len, arrived))
            if turn >= 2:
                packet = _PACKETS[_A][turn % 3] + bytes([turn])
                sent["client"].append(packet)
                _now(client.send([packet], now))
                packet = _PACKETS[_B][turn % 3] + bytes([turn])
                sent["server"].append(packet)
                _now(server.send([packet], now))
    for packet in got["server"]:
        assert packet in sent["client"], packet
    for packet in got["client"]:
        assert packet in sent["server"], packet
    for packets in got.values():
        assert len(set(packets)) == len(packets), "a packet was delivered twice"


def mss(data: bytes) -> None:
    """The first byte chooses the MTU. Callers pass only packets with a whole IP header."""
    if len(data) < 2 or len(data) - 1 < (20 if data[1] < 0x60 else 40):
        return
    packet, mtu = data[1:], 576 + data[0] * 8
    (clamped,) = _mss.clamped([packet], mtu)
    assert len(clamped) == len(packet)
    different = [at for at in range(len(packet)) if packet[at] != clamped[at]]
    assert len(different) <= 4  # the option's value, and the checksum
    (again,) = _mss.clamped([clamped], mtu)
    assert again == clamped or packet.count(b"\2\4") > 1  # only the first option is looked at


TARGETS = [
    Target(
        "wireguard",
        wireguard,
        "raises nothing; each end delivers only packets of the other end, and each at most once",
    ),
    Target(
        "udp-vpn",
        udp_vpn_,
        "raises nothing; each end delivers only packets of the other end, and each at most once",
    ),
    Target(
        "mss",
        mss,
        "raises nothing; changes nothing in a packet but one MSS option and the checksum",
    ),
]
