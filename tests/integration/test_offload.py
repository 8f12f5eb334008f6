"""Offload with the real kernel: TCP and UDP through a forwarder arrive intact."""

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import aiotun
from aiotun import Device, Offloads, PacketError, PacketStats
from aiotun.offload import GsoType, VnetHeader, merge, split

from ..helpers import SLOWER, checksum, ip
from ..test_gso import A4, A6, B4, B6, Packet, run_of, written
from .kernel import another_namespace
from .rig import OURS, PORT, THEIRS, needs_uso, number, rig, udp

MODES = ["off", "split", "raw"]
PAIRS = list(itertools.product(MODES, MODES))

NEAR = {4: "10.9.0.1", 6: "fd00::1"}
FAR = {4: "10.9.0.2", 6: "fd00::2"}

# Receives this many bytes, and prints their digest.
TCP_SERVER = """
    import hashlib, socket, sys
    address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server:
        print("ready", flush=True)
        sock, _ = server.accept()
    digest, got = hashlib.blake2b(), 0
    buffer = bytearray(1 << 20)
    with sock:
        while count := sock.recv_into(buffer):
            digest.update(memoryview(buffer)[:count])
            got += count
        print(got, digest.hexdigest())
"""

TCP_CLIENT = """
    import hashlib, random, socket, sys
    address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    block = random.Random(1).randbytes(1 << 20)
    digest, sent = hashlib.blake2b(), 0
    with socket.create_connection((address, port), timeout=20) as sock:
        while sent < size:
            # Not all alike, nor all of one length.
            part = block[sent % 1000 :][: min(size - sent, 1_000_000 + sent % 7)]
            sock.sendall(part)
            digest.update(part)
            sent += len(part)
        sock.shutdown(socket.SHUT_WR)
    print(sent, digest.hexdigest())
"""

UDP_SERVER = """
    import hashlib, socket, sys
    address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    digest, got = hashlib.blake2b(), 0
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        sock.settimeout(20)
        print("ready", flush=True)
        while got < size:
            data, sender = sock.recvfrom(65535)
            digest.update(data)
            got += len(data)
            sock.sendto(got.to_bytes(8, "big"), sender)
        print(got, digest.hexdigest())
"""

UDP_CLIENT = """
    import errno, hashlib, random, socket, sys
    address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    block = random.Random(1).randbytes(60_000)
    digest, sent = hashlib.blake2b(), 0
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, port))
        sock.settimeout(20)
        sock.setsockopt(socket.IPPROTO_UDP, 103, 1200)  # UDP_SEGMENT
        while sent < size:
            part = block[sent % 1000 :][: min(size - sent, 40_000 + sent % 7)]
            try:
                sock.send(part)
            except OSError as error:
                if error.errno != errno.EIO:  # before Linux 6.2, with "off"
                    raise
                sock.setsockopt(socket.IPPROTO_UDP, 103, 0)
                for at in range(0, len(part), 1200):
                    sock.send(part[at : at + 1200])
            digest.update(part)
            sent += len(part)
            while int.from_bytes(sock.recv(8), "big") < sent:
                pass
    print(sent, digest.hexdigest())
"""


async def forward(source: Device, target: Device) -> None:
    """Forward packets as a user would, for each pair of modes."""
    convert: Callable[[list[bytes]], list[bytes]] = list
    frame = source.mode == "tap"
    if source.offload == "raw" and target.offload != "raw":
        convert = lambda batch: list(  # noqa: E731 - one of three
            itertools.chain(*(split(each, frame=frame) for each in batch))
        )
    elif source.offload != "raw" and target.offload == "raw":
        convert = lambda batch: merge(batch, frame=frame)  # noqa: E731 - one of three
    async for batch in source.batches():
        await target.send_many(convert(batch))


@contextlib.asynccontextmanager
async def path(pair: tuple[str, str], mode: str = "tun", **options: Any) -> AsyncIterator[str]:
    """Two devices in two namespaces with a forwarder; yields the far namespace's path."""
    near: Any = {"addresses": [f"{NEAR[4]}/24", f"{NEAR[6]}/64"], "offload": pair[0]}
    far: Any = {"addresses": [f"{FAR[4]}/24", f"{FAR[6]}/64"], "offload": pair[1]}
    opener: Any = aiotun.open_tun if mode == "tun" else aiotun.open_tap
    options.setdefault("txqueuelen", 2000)
    with another_namespace() as there:
        async with (
            opener("near0", **near, **options) as one,
            opener("far0", netns=there, **far, **options) as other,
        ):
            tasks = [
                asyncio.create_task(forward(one, other)),
                asyncio.create_task(forward(other, one)),
            ]
            yield there
            for task in tasks:
                assert not task.done(), task.result()
                task.cancel()
            await asyncio.wait(tasks)
            for each in (one, other):
                # Before Linux 6.2, super-packets of UDP are sent as packets.
                old = each.offload != "off" and Offloads.USO not in each.offloads
                fallbacks = each.stats.split_fallbacks if old else 0
                assert each.stats == PacketStats(split_fallbacks=fallbacks)


async def program(code: str, *args: str, netns: str | None = None) -> asyncio.subprocess.Process:
    prefix = [] if netns is None else ["nsenter", f"--net={netns}"]
    return await asyncio.create_subprocess_exec(
        *prefix, sys.executable, "-c", textwrap.dedent(code), *args, stdout=subprocess.PIPE
    )


async def transfer(there: str, server_code: str, client_code: str, version: int, size: int) -> None:
    size //= SLOWER
    args = (FAR[version], "5000", str(size))
    server = await program(server_code, *args, netns=there)
    assert server.stdout is not None
    assert await server.stdout.readline() == b"ready\n"
    client = await program(client_code, *args)
    async with asyncio.timeout(45 * SLOWER):
        (sent, _), (got, _) = await asyncio.gather(client.communicate(), server.communicate())
    assert sent == got
    assert got.split()[0] == str(size).encode()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_100_mb_of_tcp(pair: tuple[str, str], version: int) -> None:
    async with path(pair) as there:
        await transfer(there, TCP_SERVER, TCP_CLIENT, version, 100_000_000)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_udp_with_segmentation_offload_arrives_whole(
    pair: tuple[str, str], version: int
) -> None:
    async with path(pair) as there:
        await transfer(there, UDP_SERVER, UDP_CLIENT, version, 5_000_000)


@pytest.mark.parametrize(
    "pair", [("split", "split"), ("raw", "split"), ("raw", "raw")], ids="-".join
)
async def test_tcp_and_udp_pass_between_tap_devices_with_offload(pair: tuple[str, str]) -> None:
    async with path(pair, "tap") as there:
        for version in (4, 6):
            await transfer(there, TCP_SERVER, TCP_CLIENT, version, 20_000_000)
            await transfer(there, UDP_SERVER, UDP_CLIENT, version, 1_000_000)


@pytest.mark.parametrize("pair", [("split", "split"), ("raw", "raw")], ids="-".join)
async def test_tcp_and_udp_pass_between_multi_queue_devices(pair: tuple[str, str]) -> None:
    async with path(pair, queues=3) as there:
        await transfer(there, TCP_SERVER, TCP_CLIENT, 4, 20_000_000)
        await transfer(there, UDP_SERVER, UDP_CLIENT, 6, 1_000_000)


# Only for "split"


async def test_split_packets_have_full_checksums_and_fit_the_mtu() -> None:
    """Full checksums, and no packet larger than the MTU."""
    async with rig("split") as r:
        await r.tun.link.set_mtu(1000)
        r.sock.setsockopt(socket.IPPROTO_UDP, 103, 900)
        r.sock.send(bytes(range(250)) * 16)
        batch = await r.tun.recv_many(100)
        assert [len(packet) for packet in batch] == [928] * 4 + [428]
        for packet in batch:
            assert _checksums(packet) == (0, 0)
        r.sock.setsockopt(socket.IPPROTO_UDP, 103, 0)
        r.sock.send(b"alone")
        assert _checksums(await r.tun.recv()) == (0, 0)


def _checksums(packet: bytes) -> tuple[int, int]:
    pseudo = packet[12:20] + struct.pack("!II", len(packet) - 20, packet[9])
    return checksum(packet[:20]), checksum(pseudo + packet[20:])


@pytest.mark.parametrize("how", ["close", "detach"])
async def test_a_rest_that_nobody_took_is_counted(how: str) -> None:
    async with rig("split") as r:
        needs_uso(r.tun)
        r.inject(20)
        for place in range(3):
            assert number(await r.tun.recv()) == place
        assert r.tun.stats.segments_dropped == 0
        if how == "close":
            await r.tun.aclose()
        else:
            os.close(r.tun.queues[0].detach())
        assert r.tun.stats == PacketStats(segments_dropped=17)


async def test_a_limit_counts_segments() -> None:
    async with rig("split") as r:
        r.inject(50)
        sizes = [len(await r.tun.recv_many(8)) for _ in range(6)]
        assert sizes == [8] * 6
        assert [number(packet) for packet in await r.tun.recv_many(8)] == [48, 49]


async def test_send_many_writes_one_super_packet() -> None:
    """The kernel counts one packet, and the socket receives all datagrams."""
    async with rig("split", queues=1) as r:
        needs_uso(r.tun)
        port = r.sock.getsockname()[1]
        packets = [udp(THEIRS, PORT, OURS, port, struct.pack("!I", place)) for place in range(40)]
        packets = [sealed(packet) for packet in packets]
        before = (await r.tun.link.stats()).rx_packets
        assert await r.tun.send_many(iter(packets)) == 40
        assert (await r.tun.link.stats()).rx_packets == before + 1
        r.sock.settimeout(5)
        assert [r.sock.recv(100) for _ in packets] == [packet[28:] for packet in packets]


@contextlib.contextmanager
def receivers(count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((OURS, 0))
            sock.setblocking(False)
            socks.append(sock)
        yield socks


def for_each(socks: list[socket.socket], count: int) -> list[bytes]:
    """Numbered packets for all sockets in turn."""
    return [
        sealed(udp(THEIRS, PORT, OURS, sock.getsockname()[1], struct.pack("!I", place)))
        for place in range(count)
        for sock in socks
    ]


def arrived(sock: socket.socket) -> list[int]:
    numbers: list[int] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            numbers += struct.unpack("!I", sock.recv(100))
    return numbers


@pytest.mark.parametrize("queues", [1, 4])
async def test_interleaved_flows_are_merged_each_by_itself(queues: int) -> None:
    """The kernel counts a packet for each flow, and each socket receives its own, in order.

    Before Linux 6.2 nothing is merged, because the kernel takes no super-packets of UDP.
    """
    async with rig("split", queues=queues) as r:
        with receivers(8) as socks:
            expected = 8 if Offloads.USO in r.tun.offloads else 240
            before = (await r.tun.link.stats()).rx_packets
            assert await r.tun.send_many(for_each(socks, 30)) == 240
            assert (await r.tun.link.stats()).rx_packets == before + expected
            assert [arrived(sock) for sock in socks] == [list(range(30))] * 8


def sealed(packet: bytes) -> bytes:
    """Set the DF bit and the checksums of a UDP packet."""
    header = VnetHeader(1, GsoType.UDP_L4, 0, 60_000)
    (whole,) = split(header.pack() + packet[:6] + b"\x40\0" + packet[8:])
    return whole


@pytest.mark.parametrize("version", [4, 6])
async def test_a_kernel_that_refuses_super_packets(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels refuse valid super-packets. This one doesn't, so the test makes writing fail."""
    written_ones: list[int] = []

    def write(fd: int, data: bytes) -> int:
        written_ones.append(data[1])
        if data[1] in (GsoType.TCPV4, GsoType.TCPV6):
            raise OSError(22, "Invalid argument")
        return os.write(fd, data)

    def write_merged(fd: int, packets: list[bytes], frame: bool, *rest: int) -> range:
        done = 0
        with contextlib.suppress(OSError):
            for whole in merge(packets, frame=frame):
                write(fd, whole)
                done += len(split(whole, frame=frame))
        return range(done, len(packets))

    monkeypatch.setattr("aiotun._queue.splitport._write", write)
    monkeypatch.setattr("aiotun._queue.splitport._write_merged", write_merged)
    async with rig("split") as r:
        needs_uso(r.tun)
        packets = written(run_of(Packet(version=version), [100] * 10))
        datagrams = written(run_of(Packet(version=version, protocol="udp"), [100] * 10))
        assert await r.tun.send_many(packets + datagrams) == 20
        kind = GsoType.TCPV4 if version == 4 else GsoType.TCPV6
        assert written_ones == [kind, kind] + [0] * 10 + [GsoType.UDP_L4]
        assert r.tun.stats == PacketStats(split_fallbacks=1)
        written_ones.clear()
        assert await r.tun.send_many(packets) == 10
        assert written_ones == [0] * 10
        assert r.tun.stats == PacketStats(split_fallbacks=1)


async def test_a_packet_that_any_kernel_refuses() -> None:
    async with rig("split") as r:
        good = written(run_of(Packet(), [100] * 3))
        with pytest.raises(PacketError) as caught:
            await r.tun.send_many([*good, b"\0 is no IP version", *good])
        assert getattr(caught.value, "sent", None) == 3
        assert r.tun.stats == PacketStats(refused=1)


BAD = {"empty": b"", "another version": b"\0" * 40, "long": b"\x45" * (8 << 20), "a number": 7}


@pytest.mark.parametrize("queues", [1, 3])
@pytest.mark.parametrize("bad", BAD)
async def test_an_invalid_packet_stops_interleaved_flows(bad: str, queues: int) -> None:
    """All packets before it are written, whatever their flow, and none after it."""
    async with rig("split", queues=queues) as r:
        with receivers(5) as socks:
            packets: list[Any] = for_each(socks, 8)
            packets.insert(17, BAD[bad])
            with pytest.raises((PacketError, TypeError)) as caught:
                await r.tun.send_many(packets)
            assert getattr(caught.value, "sent", None) == 17
            found = [arrived(sock) for sock in socks]
            assert found == [[0, 1, 2, 3]] * 2 + [[0, 1, 2]] * 3


async def test_send_many_in_the_middle_of_a_failure() -> None:
    """Packets that the iterable yielded before it raised are sent and counted."""

    def broken() -> Any:
        yield from written(run_of(Packet(), [100] * 300))
        raise KeyError("no more")

    async with rig("split") as r:
        with pytest.raises(KeyError) as caught:
            await r.tun.send_many(broken())
        assert getattr(caught.value, "sent", None) == 300


async def test_the_offload_mask_is_set_at_every_attach() -> None:
    """A persistent device may remember another mask."""
    ip("tuntap", "add", "rig0", "mode", "tun", "vnet_hdr")
    opener = aiotun.open_tun("rig0", offload="raw", addresses=[f"{OURS}/24"])
    async with opener as tun:
        needs_uso(tun)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_UDP, 103, 1000)
            sock.sendto(bytes(5000), (THEIRS, PORT))
        packet = await tun.recv()
        header = VnetHeader.unpack(packet)
        assert (header.gso_type, header.gso_size) == (GsoType.UDP_L4, 1000)
        assert len(packet) == 10 + 28 + 5000
    async with aiotun.open_tun("rig0", offload="split") as tun:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_UDP, 103, 1000)
            sock.sendto(bytes(5000), (THEIRS, PORT))
        assert [len(packet) for packet in await tun.recv_many()] == [1028] * 5


# A source route: the header has the next hop, and the pseudo-header the final destination.
_LOOSE_ROUTE = bytes([1, 131, 7, 4]) + socket.inet_aton("10.0.0.9")
_SEGMENTS = bytes([0, 4, 4, 1, 1, 0, 0, 0]) + bytes(16)
_SEGMENTS += socket.inet_pton(socket.AF_INET6, "fd00::9")


@pytest.mark.parametrize("version", [4, 6])
async def test_checksums_behind_a_source_route(version: int) -> None:
    """TCP from a real socket to a simulated peer: each segment must have the right checksum."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    near, final = (B4, A4) if version == 4 else (B6, A6)
    pseudo = socket.inet_pton(family, near) + socket.inet_pton(family, final)

    def transport(packet: bytes) -> bytes:
        start = (packet[0] & 15) * 4 if version == 4 else 48 + packet[41] * 8
        body = packet[start:]
        assert checksum(pseudo + struct.pack("!II", len(body), 6) + body) == 0
        return body

    addresses = [f"{near}/{24 if version == 4 else 64}"]
    async with aiotun.open_tun("near0", addresses=addresses, offload="split") as tun:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                if version == 4:
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, _LOOSE_ROUTE)
                else:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RTHDR, _SEGMENTS)
            except OSError as error:
                pytest.skip(f"missing: source routes in this kernel ({error})")
            with contextlib.suppress(BlockingIOError):
                sock.connect((final, PORT))
            syn = await tun.recv()
            # The header's destination is the next hop.
            hop = socket.inet_pton(family, "10.0.0.9" if version == 4 else "fd00::9")
            assert syn[16:20] == hop or syn[24:40] == hop
            port, _, sequence = struct.unpack_from("!HHI", transport(syn))
            answer = Packet(
                version=version, ports=(PORT, port), acknowledged=sequence + 1, flags=0x12,
                window=60_000, tcp_options=b"\2\4\3\xe8",
            )  # fmt: skip
            await tun.send(bytes(answer))
            await asyncio.get_running_loop().sock_sendall(sock, bytes(range(250)) * 32)
            lengths: list[int] = []
            while sum(lengths) < 8000:
                lengths += [len(transport(packet)) - 20 for packet in await tun.recv_many()]
            assert sum(lengths) == 8000
            assert 8 <= len([length for length in lengths if length]) <= 10
        assert tun.stats == PacketStats()
