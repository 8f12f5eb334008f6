"""Scenes: programs that answer, tasks that are cancelled, and a faulty line."""

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import struct
from ipaddress import IPv4Address

import dpkt

import aiotun
from aiotun import PacketIO, reply
from aiotun.testing import FaultCounts, FaultInjector, memory_pair

from ..integration.rig import RECEIVE, udp
from .network import dropped_by, feed, listening, udp_socket
from .stage import Scene, Stage, settled, stats_of

__all__ = ["faults", "receivers", "responder", "senders"]


# --- Programs that answer ------------------------------------------------------------------------


def responder(kind: str) -> Scene:
    async def scene(stage: Stage) -> None:
        net, mac = f"10.{stage.number}.0", b"\2\0\0\0\0\x77"
        opener = aiotun.open_tun if kind == "tun" else aiotun.open_tap
        answered = taken = others = 0

        def answer(data: bytes) -> bytes | None:
            if kind == "tun":
                return reply.icmp_echo(data)
            if data[12:14] == b"\x08\x06":
                return reply.arp(data, mac, [IPv4Address(f"{net}.7")])
            echo = reply.icmp_echo(data[14:])
            return None if echo is None else data[6:12] + mac + data[12:14] + echo

        async with opener(f"r{stage.number}", addresses=[f"{net}.1/24"]) as device:
            stage.count("openings")

            async def serve() -> None:
                nonlocal taken, answered, others
                async for data in device:
                    taken += 1
                    back = answer(data)
                    if back is None:
                        others += 1
                    else:
                        await device.send(back)
                        answered += 1

            server = asyncio.create_task(serve())
            with socket.socket(
                socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP
            ) as sock:
                sock.bind((f"{net}.1", 0))
                sock.connect((f"{net}.7", 0))
                flow = stage.flow(f"responder {kind}")

                def arrive(packet: bytes) -> None:
                    if packet[20] == 0:  # an echo reply
                        flow.arrive(packet[28:])

                async with listening(sock, arrive):
                    while not stage.stop.is_set():
                        body = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + flow.make()
                        value = aiotun.offload.checksum(body)
                        sock.send(body[:2] + value.to_bytes(2, "big") + body[4:])
                        flow.count_sent()
                        await asyncio.sleep(1 / stage.rate)
                    await settled(lambda: flow.delivered)
                    stats = await stats_of(device, lambda: (taken, answered))
                    stage.ledger.settle(
                        flow.name, flow, dropped=stats.tx_dropped + dropped_by(sock)
                    )
            stage.ledger.equal(f"responder {kind}: received", taken, stats.tx_packets)
            stage.ledger.equal(f"responder {kind}: sent", answered, stats.rx_packets)
            device.close()
            await stage.finish(server)

    return scene


# --- Cancellation --------------------------------------------------------------------------------


async def receivers(stage: Stage) -> None:
    """Every way to receive, on a device with several queues; tasks are cancelled all the time."""
    net = f"10.{stage.number}.0"
    async with aiotun.open_tun(
        f"c{stage.number}", addresses=[f"{net}.1/24"], queues=3, txqueuelen=200
    ) as tun:
        stage.count("openings")
        flow, taken = stage.flow("receivers"), 0
        over = asyncio.Event()

        async def receive(io: PacketIO) -> None:
            nonlocal taken
            ways = itertools.cycle(RECEIVE.values())
            while not over.is_set():
                task = asyncio.create_task(next(ways)(io))
                await asyncio.wait({task}, timeout=stage.chance.uniform(0, 0.02))
                stage.count("cancelled receivers", task.cancel())
                (outcome,) = await asyncio.gather(task, return_exceptions=True)
                if isinstance(outcome, bytes):
                    taken += 1
                    flow.arrive(outcome[28:])
                elif not isinstance(outcome, asyncio.CancelledError):
                    raise outcome

        tasks = [asyncio.create_task(receive(io)) for io in (tun, tun, *tun.queues)]
        with udp_socket(None, f"{net}.1") as sock:
            sock.connect((f"{net}.2", 7))
            await feed(flow, sock, stage.stop, stage.rate, stage.chance)
            await settled(lambda: taken)
            over.set()
            await stage.finish(*tasks)
            with contextlib.suppress(BlockingIOError):
                while True:
                    flow.arrive(tun.recv_nowait()[28:])
                    taken += 1
            stats = await stats_of(tun, lambda: taken)
            stage.ledger.equal("receivers: received", taken, stats.tx_packets)
            stage.ledger.settle(flow.name, flow, dropped=stats.tx_dropped)


async def senders(stage: Stage) -> None:
    """Senders wait for room and are cancelled: a cancelled send must not have sent its packet."""
    left, right = memory_pair()
    flow, taken = stage.flow("senders"), 0

    async def send() -> None:
        while not stage.stop.is_set():
            task = asyncio.create_task(left.send(udp("10.0.0.1", 7, "10.0.0.2", 7, flow.make())))
            await asyncio.wait({task}, timeout=stage.chance.uniform(0, 0.03))
            stage.count("cancelled senders", task.cancel())
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if outcome is None:
                flow.count_sent()
            elif not isinstance(outcome, asyncio.CancelledError):
                raise outcome
            await asyncio.sleep(0.002)

    async def take() -> None:
        nonlocal taken
        async for batch in right.batches(8):  # slower than the senders
            for packet in batch:
                taken += 1
                flow.arrive(packet[28:])
            await asyncio.sleep(0.005 if not stage.stop.is_set() else 0)

    taker = asyncio.create_task(take())
    tasks = [asyncio.create_task(send()) for _ in range(20)]
    await stage.stop.wait()
    await stage.finish(*tasks)
    await settled(lambda: taken)
    stage.ledger.settle(flow.name, flow, dropped=0)
    right.close()
    left.close()
    await stage.finish(taker)
    await asyncio.gather(left.aclose(), right.aclose())


# --- Faults --------------------------------------------------------------------------------------

_KINDS = ("drop", "delay", "duplicate", "corrupt", "reorder")


async def faults(stage: Stage) -> None:
    """A faulty line before a device; its counts must agree with the kernel's and with ours."""
    net = f"10.{stage.number}.0"
    tun = await aiotun.open_tun(f"f{stage.number}", addresses=[f"{net}.1/24"])
    stage.count("openings")
    rates = {kind: stage.chance.uniform(0.01, 0.1) for kind in _KINDS}
    bad = FaultInjector(tun, seed=stage.chance.randrange(1 << 30), **rates)
    near, far = socket.inet_aton(f"{net}.1"), socket.inet_aton(f"{net}.2")
    taken = 0

    async def echo() -> None:
        nonlocal taken
        async for packet in bad:
            taken += 1
            # Compute the checksums again. If the line flips one bit each way, the second flip may
            # hide the first from the old checksum; then the port may be wrong and the kernel
            # answers with a packet of its own.
            data = dpkt.udp.UDP(sport=7, dport=7, data=packet[28:])
            data.ulen = len(data)
            await bad.send(aiotun.encode(dpkt.ip.IP(src=far, dst=near, p=17, data=data)))

    echoing = asyncio.create_task(echo())
    with udp_socket(None, f"{net}.1", 7) as sock:
        sock.connect((f"{net}.2", 7))
        flow = stage.flow("faults")
        async with listening(sock, lambda _: None):  # some have a flipped bit
            await feed(flow, sock, stage.stop, stage.rate, stage.chance)
            await settled(lambda: taken)
            stats = await stats_of(tun, lambda: taken)
    ledger = stage.ledger
    ledger.equal("faults: received", bad.received.packets, stats.tx_packets)
    ledger.equal("faults: taken", taken, _passed(bad.received))
    ledger.equal("faults: answered", taken, bad.sent.packets)
    ledger.equal("faults: sent", _passed(bad.sent), stats.rx_packets)
    ledger.equal("faults: on the way", flow.sent, stats.tx_packets + stats.tx_dropped)
    ledger.packets["sent"] += flow.sent
    ledger.packets["delivered"] += taken
    ledger.packets["dropped"] += stats.tx_dropped
    for counts in (bad.received, bad.sent):
        for kind, number in dataclasses.asdict(counts).items():
            if kind != "packets":
                stage.count("faults injected", number)
    bad.close()
    await stage.finish(echoing)
    await bad.aclose()


def _passed(counts: FaultCounts) -> int:
    return counts.packets - counts.dropped + counts.duplicated - counts.lost
