"""The kernel accepts what encode writes. It drops packets with a wrong length or checksum."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from dpkt.ethernet import Ethernet, VLANtag8021Q
from dpkt.icmp import ICMP
from dpkt.icmp6 import ICMP6
from dpkt.ip import IP
from dpkt.ip6 import IP6, IP6DstOptsHeader, IP6FragmentHeader, IP6HopOptsHeader
from dpkt.tcp import TCP
from dpkt.udp import UDP

import aiotun
from aiotun import encode

from ..helpers import ip

OURS = {4: "10.0.0.1", 6: "fd00::1"}
THEIRS = {4: "10.0.0.2", 6: "fd00::2"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
SOL_PACKET, PACKET_AUXDATA, ETH_P_ALL = 263, 8, 3  # linux/socket.h, if_packet.h, if_ether.h
OUR_MAC, THEIR_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


@dataclass
class Peer:
    """A host behind a device that exchanges dpkt packets with the kernel."""

    device: aiotun.Device
    version: int

    def packet(self, data: Any, **fields: Any) -> Any:
        addresses = {"src": packed(THEIRS[self.version]), "dst": packed(OURS[self.version])}
        if self.version == 4:
            return IP(**addresses, data=data, **fields)
        return IP6(**addresses, hlim=64, data=data, **fields)

    async def send(self, data: Any, **fields: Any) -> None:
        await self.send_packet(self.packet(data, **fields))

    async def send_packet(self, packet: Any, **frame: Any) -> None:
        if self.device.mode == "tap":
            packet = Ethernet(dst=mac(OUR_MAC), src=mac(THEIR_MAC), data=packet, **frame)
        await self.device.send(encode(packet))

    async def answer(self, kind: Callable[[Any], bool]) -> Any:
        """The next packet from the kernel that is of this kind."""
        async with asyncio.timeout(5):
            async for packet in self.device.decoded():
                found = packet.data if self.device.mode == "tap" else packet
                if isinstance(found, IP | IP6) and kind(found.data):
                    return found.data
        raise AssertionError("closed")


@contextlib.asynccontextmanager
async def peer(mode: str, version: int) -> AsyncIterator[Peer]:
    addresses = ["10.0.0.1/24", "fd00::1/64"]
    if mode == "tun":
        async with aiotun.open_tun("enc0", addresses=addresses) as tun:
            yield Peer(tun, version)
        return
    async with aiotun.open_tap("enc0", addresses=addresses, mac=OUR_MAC) as tap:
        for theirs in THEIRS.values():
            ip("neigh", "add", theirs, "lladdr", THEIR_MAC, "dev", "enc0")
        yield Peer(tap, version)


@contextlib.contextmanager
def _closing(sock: socket.socket, version: int) -> Any:
    with sock:
        sock.settimeout(5)
        sock.bind((OURS[version], 0))
        yield sock


def udp_socket(version: int) -> Any:
    return _closing(socket.socket(FAMILY[version], socket.SOCK_DGRAM), version)


each_mode = pytest.mark.parametrize("mode", ["tun", "tap"])
each_version = pytest.mark.parametrize("version", [4, 6])


@each_mode
@each_version
async def test_the_kernel_accepts_encoded_udp(mode: str, version: int) -> None:
    async with peer(mode, version) as other:
        with udp_socket(version) as sock:
            port = sock.getsockname()[1]
            for data in (b"", b"odd", b"even", b"\xff" * 1001):
                await other.send(UDP(sport=7, dport=port, data=data))
                received, sender = sock.recvfrom(2000)
                assert (received, sender[:2]) == (data, (THEIRS[version], 7))
            datagram = UDP(sport=7, dport=port, data=b"before")
            packet = other.packet(datagram)
            packet.p = packet.nxt = 17
            await other.send_packet(packet)
            bytes(packet)  # stores lengths and checksums, which become stale
            datagram.data = b"afterwards"
            await other.send_packet(packet)
            assert [sock.recv(2000) for _ in range(2)] == [b"before", b"afterwards"]


@each_mode
@each_version
async def test_the_kernel_drops_packets_with_wrong_checksums(mode: str, version: int) -> None:
    """Otherwise the other tests would prove nothing."""
    async with peer(mode, version) as other:
        with udp_socket(version) as sock:
            datagram = UDP(sport=7, dport=sock.getsockname()[1], data=b"payload")
            right = other.packet(datagram)
            whole = encode(right)
            wrong = whole[:-1] + b"?"
            if mode == "tap":
                start = mac(OUR_MAC) + mac(THEIR_MAC)
                start += b"\x08\x00" if version == 4 else b"\x86\xdd"
                wrong = start + wrong
            await other.device.send(wrong)
            await other.send_packet(right)
            assert sock.recv(100) == b"payload"
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(100)


@each_mode
@each_version
async def test_a_udp_checksum_of_zero_is_sent_as_ffff(mode: str, version: int) -> None:
    async with peer(mode, version) as other:
        with udp_socket(version) as sock:
            datagram = UDP(sport=7, dport=sock.getsockname()[1], data=b"\0\0")
            datagram.data = encode(other.packet(datagram))[-4:-2]
            assert encode(other.packet(datagram))[-4:-2] == b"\xff\xff"
            await other.send(datagram)
            assert sock.recv(100) == datagram.data


@each_mode
@each_version
async def test_the_kernel_accepts_ip_options_and_extension_headers(mode: str, version: int) -> None:
    async with peer(mode, version) as other:
        with udp_socket(version) as sock:
            datagram = UDP(sport=7, dport=sock.getsockname()[1], data=b"payload")
            if version == 4:
                await other.send(datagram, opts=b"\1\1\1")
            else:
                padding = b"\1\4" + bytes(4)
                headers = [IP6HopOptsHeader(data=padding), IP6DstOptsHeader(data=padding)]
                await other.send(datagram, all_extension_headers=headers)
            assert sock.recv(100) == b"payload"


@each_mode
@each_version
async def test_the_kernel_reassembles_encoded_fragments(mode: str, version: int) -> None:
    """The first fragment is a dpkt object with the length and checksum of the whole datagram."""
    async with peer(mode, version) as other:
        with udp_socket(version) as sock:
            payload = bytes(range(200))
            datagram = UDP(sport=7, dport=sock.getsockname()[1], data=payload)
            whole = UDP(encode(other.packet(datagram))[20 if version == 4 else 40 :])
            whole.data = payload[:88]  # with the header a multiple of 8
            for more, offset, part in ((1, 0, whole), (0, 12, payload[88:])):
                if version == 4:
                    await other.send(part, p=17, id=5, mf=more, offset=offset)
                else:
                    head = IP6FragmentHeader(nxt=17, id=5, m_flag=more, frag_off=offset)
                    await other.send(part, all_extension_headers=[head])
            assert sock.recv(1000) == payload


@each_mode
@each_version
async def test_the_kernel_accepts_an_encoded_tcp_connection(mode: str, version: int) -> None:
    """A complete handshake with options, and data after it."""
    async with peer(mode, version) as other:
        sock = socket.socket(FAMILY[version], socket.SOCK_STREAM)
        with _closing(sock, version) as listener:
            listener.listen()
            ports = {"sport": 4242, "dport": listener.getsockname()[1]}
            opts = b"\2\4\5\xb4\1\3\3\0\4\2"  # MSS, window scale, SACK permitted: not padded
            await other.send(TCP(**ports, seq=1000, flags=0x02, opts=opts))
            answer = await other.answer(lambda data: isinstance(data, TCP))
            assert (answer.flags, answer.ack) == (0x12, 1001)
            segment = TCP(**ports, seq=1001, ack=answer.seq + 1, flags=0x10)
            packet = other.packet(segment)
            await other.send_packet(packet)
            packet.p = packet.nxt = 6
            bytes(packet)  # stores lengths and checksums, which become stale
            segment.flags, segment.data = 0x18, b"hello, kernel"
            await other.send_packet(packet)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                assert connection.recv(100) == b"hello, kernel"


@each_mode
@each_version
async def test_the_kernel_answers_encoded_echo_requests(mode: str, version: int) -> None:
    async with peer(mode, version) as other:
        echo = (ICMP if version == 4 else ICMP6).Echo(id=3, seq=4, data=b"payload")
        message: Any = ICMP(data=echo) if version == 4 else ICMP6(type=128, data=echo)
        packet = other.packet(message)
        for text in (b"payload", b"longer payload", b""):
            echo.data = text
            await other.send_packet(packet)
            answer = await other.answer(
                lambda data: isinstance(data, ICMP | ICMP6) and data.type in (0, 129)
            )
            assert (answer.data.id, answer.data.seq, answer.data.data) == (3, 4, text)
            packet.p = packet.nxt = 1 if version == 4 else 58
            bytes(packet)


@each_version
async def test_the_kernel_takes_the_vlan_tag_off_an_encoded_frame(version: int) -> None:
    """Read from a packet socket, because not every kernel has VLAN devices."""
    async with peer("tap", version) as other:
        ethertype = 0x0800 if version == 4 else 0x86DD
        # A packet socket for all protocols sees the tag before the kernel drops the frame for
        # lack of a VLAN device.
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
            sock.settimeout(5)
            sock.bind(("enc0", ETH_P_ALL))
            sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            packet = other.packet(UDP(sport=7, dport=9, data=b"tagged"))
            await other.send_packet(packet, vlan_tags=[VLANtag8021Q(id=5, pri=6)])
            data = b""
            while data[6:12] != mac(THEIR_MAC):
                data, ((_, _, aux),), _, _ = sock.recvmsg(2000, 100)
            assert struct.unpack_from("=IIIHHHH", aux)[5:] == (6 << 13 | 5, 0x8100)
            assert data[12:14] == ethertype.to_bytes(2, "big")
            assert data[14:] == encode(packet)
