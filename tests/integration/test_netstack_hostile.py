"""What a hostile client can send to a stack's device: nothing raises, and service goes on."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

import aiotun

from ..helpers import checksum, wait_until
from .stacks import client_of, force_mechanism

SYN, RST = 0x02, 0x04

OWN = {4: "10.77.0.1", 6: "fd77::1"}
TARGET = {4: "192.0.2.1", 6: "2001:db8::1"}
CLIENT = {4: "10.77.0.2", 6: "fd77::2"}


@pytest.fixture(params=[("tproxy", "off"), ("listeners", "raw")], ids="-".join)
async def stack(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[aiotun.Netstack]:
    mechanism, offload = request.param
    force_mechanism(monkeypatch, mechanism)
    async with aiotun.open_netstack(
        intercept=True, addresses=[f"{OWN[4]}/24", f"{OWN[6]}/64"], offload=offload
    ) as opened:
        yield opened


def packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def ip_packet(src: str, dst: str, proto: int, payload: bytes, *, place: int = 0) -> bytes:
    """An IP packet; `place` is IPv4's field of flags and fragment offset."""
    ends = packed(src) + packed(dst)
    if ":" in src:
        return struct.pack("!IHBB", 6 << 28, len(payload), proto, 64) + ends + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 9, place, 64, proto, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def segment(
    src: str,
    dst: str,
    flags: int,
    *,
    sport: int = 1234,
    dport: int = 80,
    options: bytes = b"",
    offset: int | None = None,
    extensions: bytes = b"",
) -> bytes:
    """A TCP segment.

    Args:
        offset: the length of its header that it states, in units of 4 bytes.
        extensions: IPv6's, the last of which says that TCP follows.
    """
    size = 5 + len(options) // 4 if offset is None else offset
    head = struct.pack("!HHIIBBHHH", sport, dport, 7, 0, size << 4, flags, 1000, 0, 0)
    tcp = head + options
    ends = packed(src) + packed(dst)
    value = checksum(ends + struct.pack("!II", len(tcp), 6) + tcp)
    tcp = tcp[:16] + struct.pack("!H", value) + tcp[18:]
    if extensions:
        return ip_packet(src, dst, extensions[0], extensions[1:] + tcp)
    return ip_packet(src, dst, 6, tcp)


def extension(kind: int, following: int, *, units: int = 0, body: bytes = bytes(6)) -> bytes:
    """One extension header, with its own number in front: for `segment`."""
    return bytes((kind, following, units)) + body


def cut_short(version: int) -> Iterable[bytes]:
    """A SYN of every length, by its IP header as well."""
    src, dst = CLIENT[version], TARGET[version]
    whole = segment(src, dst, SYN, options=b"\2\4\5\xb4")
    start = 20 if version == 4 else 40
    for length in range(len(whole)):
        yield whole[:length]  # the IP header says more
        if length >= start:
            yield ip_packet(src, dst, 6, whole[start:length])  # it says so


def strange(version: int) -> Iterable[bytes]:
    """Segments that no honest client sends."""
    src, dst, own = CLIENT[version], TARGET[version], OWN[version]
    for flags in range(256):
        yield segment(src, dst, flags, sport=2000 + flags)
    for offset in range(16):
        yield segment(src, dst, SYN, sport=3000 + offset, offset=offset)
    for options in (b"\2\0\0\0", b"\2\1\0\0", b"\2\xff\0\0", b"\xff" * 40, b"\2\4", b"\3"):
        yield segment(src, dst, SYN, sport=3100 + len(options), options=options)
    yield segment(dst, dst, SYN, sport=80)  # "land"
    yield segment(own, own, SYN, sport=80)
    yield segment(own, dst, SYN, sport=80)
    yield segment(src, dst, SYN, sport=0)
    yield segment(src, dst, SYN, dport=0)


def of_nobody(version: int) -> Iterable[bytes]:
    """SYNs from addresses that no client can have."""
    sources = {
        4: ["0.0.0.0", "224.0.0.1", "255.255.255.255", "127.0.0.1", OWN[4]],
        6: ["::", "::1", "ff02::1", "::ffff:10.0.0.1", OWN[6]],
    }
    for number, src in enumerate(sources[version]):
        yield segment(src, TARGET[version], SYN, sport=4000 + number)


def extended() -> Iterable[bytes]:
    src, dst = CLIENT[6], TARGET[6]
    for number, kind in enumerate((0, 43, 60, 51, 44, 135, 59, 50)):
        for units in (0, 1, 255):
            yield segment(
                src, dst, SYN, sport=5000 + number, extensions=extension(kind, 6, units=units)
            )
    many = b"".join(bytes((60, 0)) + bytes(6) for _ in range(30)) + bytes((6, 0)) + bytes(6)
    yield segment(src, dst, SYN, sport=5100, extensions=bytes((60,)) + many)


def noise(seed: int) -> Iterable[bytes]:
    """Random bytes, and honest packets with a few bytes changed."""
    chance = random.Random(seed)
    honest = [
        *(segment(CLIENT[version], TARGET[version], SYN) for version in (4, 6)),
        *(
            ip_packet(CLIENT[version], TARGET[version], proto, chance.randbytes(40))
            for version in (4, 6)
            for proto in (1, 6, 17, 44, 58)
        ),
    ]
    for _ in range(1500):
        first = chance.choice((0x45, 0x46, 0x4F, 0x60, chance.randrange(256)))
        yield bytes((first,)) + chance.randbytes(chance.randrange(1, 120))
        packet = bytearray(chance.choice(honest))
        for _ in range(chance.randrange(1, 5)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        yield bytes(packet)


def in_fragments(version: int) -> Iterable[bytes]:
    """Fragments of every protocol: tiny, overlapping, without an end, beyond the largest packet."""
    src, dst = CLIENT[version], TARGET[version]
    for proto in (6, 17, 1 if version == 4 else 58):
        for offset, more, size in (
            (0, 1, 8), (0, 1, 16), (8, 0, 8), (8, 0, 7), (4, 1, 64), (0, 1, 64),
            (65528, 0, 200), (65528, 1, 8), (0, 0, 0), (8, 0, 0), (16, 1, 3),
        ):  # fmt: skip
            body = bytes((0, 80, 0, 80)) + bytes(size) if size > 4 else bytes(size)
            body = body[:size]
            if version == 4:
                yield ip_packet(src, dst, proto, body, place=more << 13 | offset >> 3)
            else:
                head = struct.pack("!BBHI", proto, 0, (offset & 0xFFF8) | more, 77)
                yield ip_packet(src, dst, 44, head + body)


KINDS: dict[str, Any] = {
    "cut short": lambda: [*cut_short(4), *cut_short(6)],
    "strange": lambda: [*strange(4), *strange(6)],
    "of nobody": lambda: [*of_nobody(4), *of_nobody(6)],
    "extended": lambda: [*extended()],
    "fragments": lambda: [*in_fragments(4), *in_fragments(6)],
    "noise": lambda: [*noise(7)],
}


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    writer.close()


async def answer(flow: Any) -> None:
    async for data in flow:
        await flow.send(data)


def admits(kind: str) -> Any:
    if kind == "none":
        return None

    async def later(local: Any, peer: Any) -> bool:
        await asyncio.sleep(0)
        return bool(local[1] == 4321)

    return {
        "refuses": lambda local, peer: local[1] == 4321,
        "refuses later": later,
        "unreachable": lambda local, peer: local[1] == 4321 or aiotun.netstack.Refusal.HOST,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("admit", ["none", "refuses", "refuses later", "unreachable"])
async def test_hostile_packets_raise_nothing_and_service_goes_on(
    stack: aiotun.Netstack, kind: str, admit: str
) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    await stack.intercept_tcp(echo, admit=admits(admit))
    await stack.intercept_udp(answer, admit=admits(admit))
    await stack.intercept_ping(lambda ping: True)
    head = bytes(stack.tun._header_bytes) if stack.tun.offload == "raw" else b""
    for packet in KINDS[kind]():
        # The kernel takes neither another IP version nor an empty packet.
        with contextlib.suppress(aiotun.PacketError):
            await stack.tun.send(head + packet)
    async with client_of(stack) as client:
        for host in TARGET.values():
            reader, writer = await client.open_connection(host, 4321)
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            writer.close()
    await wait_until(lambda: stack.stats.connections_open == 0)
    await stack.aclose()
    assert reported == []


async def test_nobody_is_asked_about_or_answered_who_can_not_be_a_client(
    stack: aiotun.Netstack,
) -> None:
    asked: list[Any] = []

    def admit(local: Any, peer: Any) -> bool:
        asked.append((local, peer))
        return False

    await stack.intercept_tcp(echo, admit=admit)
    head = bytes(stack.tun._header_bytes) if stack.tun.offload == "raw" else b""
    packets = [*of_nobody(4), *of_nobody(6)]
    await stack.tun.send_many([head + packet for packet in packets])
    assert asked == []
    assert stack.stats.packets_refused == len(packets)
    assert stack.stats.connections_refused == 0


@pytest.mark.parametrize("version", [4, 6])
async def test_an_invalid_syn_is_neither_asked_about_nor_answered(
    stack: aiotun.Netstack, version: int
) -> None:
    asked = 0

    def admit(local: Any, peer: Any) -> bool:
        nonlocal asked
        asked += 1
        return False

    await stack.intercept_tcp(echo, admit=admit)
    head = bytes(stack.tun._header_bytes) if stack.tun.offload == "raw" else b""
    invalid = [each for each in cut_short(version) if len(each) >= 20]
    invalid += [
        segment(CLIENT[version], TARGET[version], SYN, sport=3000 + offset, offset=offset)
        for offset in range(16)
        if offset != 5
    ]
    whole = ip_packet(
        CLIENT[version],
        TARGET[version],
        6,
        segment(CLIENT[version], TARGET[version], SYN)[20 if version == 4 else 40 :],
    )
    await stack.tun.send_many([head + packet for packet in invalid])
    assert asked == 0
    await stack.tun.send(head + whole)
    assert asked == stack.stats.connections_refused == 1


def damaged(packet: bytes, place: int) -> bytes:
    return packet[:place] + bytes((packet[place] ^ 1,)) + packet[place + 1 :]


@pytest.mark.parametrize("version", [4, 6])
async def test_a_packet_with_a_wrong_checksum_decides_nothing(
    stack: aiotun.Netstack, version: int
) -> None:
    asked: list[Any] = []

    def admit(local: Any, peer: Any) -> Any:
        asked.append((local, peer))
        return asyncio.Event().wait() if len(asked) > 1 else False

    await stack.intercept_tcp(echo, admit=admit)
    head = bytes(stack.tun._header_bytes) if stack.tun.offload == "raw" else b""
    ends = (CLIENT[version], TARGET[version])
    tcp = 20 if version == 4 else 40
    syn = segment(*ends, SYN)
    wrong = [damaged(syn, tcp + 16), damaged(syn, tcp + 4), damaged(syn, tcp)]
    if version == 4:
        wrong.append(damaged(syn, 10))
    await stack.tun.send_many([head + each for each in wrong])
    assert (asked, stack.stats.packets_refused) == ([], len(wrong))
    with pytest.raises(BlockingIOError):  # no answer
        stack.tun.recv_nowait()
    if head:
        # Known to be right, or partial: there is nothing to check.
        for flags in (1, 2):
            before = stack.stats.connections_refused
            marked = bytes((flags,)) + head[1:]
            await stack.tun.send(marked + damaged(segment(*ends, SYN, sport=flags), tcp + 16))
            assert stack.stats.connections_refused == before + 1
            asked.clear()
    await stack.tun.send(head + syn)
    assert len(asked) == 1
    # A reset ends a connection that waits, unless it is damaged.
    await stack.tun.send(head + segment(*ends, SYN, sport=77))
    reset = segment(*ends, RST, sport=77)
    await stack.tun.send(head + damaged(reset, tcp + 16))
    assert stack.stats.connections_expired == 0
    await stack.tun.send(head + reset)
    assert stack.stats.connections_expired == 1
