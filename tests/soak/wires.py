"""Two devices in two namespaces, and a program that forwards traffic between them."""

import asyncio
import contextlib
import socket
from typing import Any

import aiotun
from aiotun import LinkDownError
from aiotun._kernel.words import Offload

from .ledger import Flow
from .network import allow_ipv6, dropped_by, family_of, feed, inside, listening, udp_socket
from .stage import HANG, Scene, Stage, pause, settled, stats_of

__all__ = ["wire"]


class Wire:
    """Two devices in two namespaces, and the tasks that forward packets between them."""

    def __init__(self, stage: Stage, near: aiotun.Device, far: aiotun.Device, name: str) -> None:
        self.stage, self.ends, self.name = stage, (near, far), name
        self.received = {near: 0, far: 0}
        self.sent = {near: 0, far: 0}
        self.refused = {near: 0, far: 0}

    async def carry(self, source: aiotun.Device, target: aiotun.Device) -> None:
        async for batch in source.batches():
            self.received[source] += len(batch)
            waiting = batch
            while waiting:
                try:
                    self.sent[target] += await target.send_many(waiting)
                    break
                except (LinkDownError, aiotun.PacketError) as error:
                    self.sent[target] += error.sent
                    self.refused[target] += 1
                    self.stage.ledger.packets["refused"] += 1
                    waiting = error.unsent[1:]

    async def flap(self, flows: list[Flow]) -> None:
        """Take the links down and up and change their MTU and carrier, at random times."""
        stage, chance = self.stage, self.stage.chance
        while not stage.stop.is_set():
            await pause(stage, chance.uniform(0.5, 3.0))
            end = chance.choice(self.ends)
            way = chance.choice(["down", "mtu", "carrier"])
            if way == "mtu":
                await end.link.set_mtu(chance.choice([1280, 1400, 1500]))
                stage.count("MTU changes")
                continue
            self._uncertain(flows, True)
            try:
                await self._through(flows)
                if way == "down":
                    await end.link.down()
                    await asyncio.sleep(chance.uniform(0.0, 0.3))
                    await end.link.up()
                else:
                    end.set_carrier(False)
                    await asyncio.sleep(chance.uniform(0.0, 0.3))
                    end.set_carrier(True)
                    await asyncio.sleep(1.2)  # the kernel acts on it up to a second later
            finally:
                await self._through(flows)
                self._uncertain(flows, False)
            stage.count("flaps")

    async def begin(self, flows: list[Flow]) -> None:
        """Wait until ARP has been answered; packets sent before that are uncertain."""
        self._uncertain(flows, True)
        await self._through(flows)
        self._uncertain(flows, False)

    async def _through(self, flows: list[Flow]) -> None:
        """Wait until a packet that is sent now arrives: all earlier ones have then passed.

        While datagrams wait for ARP's answer, the kernel drops them if their link goes down or if
        there are too many, and no counter that we can read shows it.
        """
        marks = [flow.made for flow in flows]
        for _ in range(100):
            if all(flow.newest > mark for flow, mark in zip(flows, marks, strict=True)):
                break
            await pause(self.stage, 0.03)

    def _uncertain(self, flows: list[Flow], value: bool) -> None:
        for flow in flows:
            flow.uncertain = value

    async def watch(self) -> None:
        async for _ in self.ends[0].link.events():
            self.stage.count("link events")

    async def check(self) -> int:
        """Compare our counts with the kernel's; return how many packets were dropped by either."""
        dropped = 0
        for end in self.ends:
            stats = await stats_of(end, lambda: (*self.received.values(), *self.sent.values()))
            mine = f"{self.name}, {end.name}"
            if end.offload != "split":  # with "split", our packets are not the kernel's
                self.stage.ledger.equal(f"{mine}: received", self.received[end], stats.tx_packets)
                self.stage.ledger.equal(f"{mine}: sent", self.sent[end], stats.rx_packets)
            ours = end.stats
            if ours.truncated or ours.undecodable or ours.segments_dropped:
                self.stage.ledger.problem(f"{mine}: {ours}")
            self.stage.ledger.events["split fallbacks"] += ours.split_fallbacks
            dropped += stats.tx_dropped + stats.rx_dropped + stats.rx_errors + self.refused[end]
        carried = sum(self.received.values())
        gone = sum(self.sent.values()) + sum(self.refused.values())
        if carried != gone:
            self.stage.ledger.problem(f"{self.name}: took {carried} packets and passed {gone} on")
        return dropped


def wire(kind: str, offload: Offload, queues: int, flapping: bool, version: int = 4) -> Scene:
    name = f"wire {kind} {offload}" + (" IPv6" if version == 6 else "")

    async def scene(stage: Stage) -> None:
        opener = aiotun.open_tun if kind == "tun" else aiotun.open_tap
        net, bits = (
            (f"fd{stage.number:02x}::", 64) if version == 6 else (f"10.{stage.number}.0.", 24)
        )
        hosts = [f"{net}1", f"{net}2"]
        options: Any = {"queues": queues, "offload": offload, "txqueuelen": 300}
        async with contextlib.AsyncExitStack() as stack:
            ends: list[aiotun.Device] = []
            for host, ns in zip(hosts, (None, stage.peer), strict=True):
                opening = opener(f"w{stage.number}", netns=ns, **options)
                end = await stack.enter_async_context(opening)
                if version == 6:
                    allow_ipv6(end.name, ns)
                await end.link.add_address(f"{host}/{bits}")
                ends.append(end)
            stage.count("openings", 2)
            await carry_traffic(stage, Wire(stage, ends[0], ends[1], name), hosts, flapping)

    return scene


async def carry_traffic(stage: Stage, wire: Wire, hosts: list[str], flapping: bool) -> None:
    near, far = wire.ends
    make = asyncio.create_task
    carriers = [make(wire.carry(near, far)), make(wire.carry(far, near))]
    watcher = make(wire.watch())
    async with contextlib.AsyncExitStack() as stack:
        one = stack.enter_context(udp_socket(None, hosts[0], 7))
        two = stack.enter_context(udp_socket(stage.peer, hosts[1], 7))
        one.connect((hosts[1], 7))
        two.connect((hosts[0], 7))
        out, back = stage.flow(f"{wire.name}, out"), stage.flow(f"{wire.name}, back")
        await stack.enter_async_context(listening(two, out.arrive))
        await stack.enter_async_context(listening(one, back.arrive))
        tasks = [
            make(feed(out, one, stage.stop, stage.rate, stage.chance)),
            make(feed(back, two, stage.stop, stage.rate, stage.chance)),
            make(stream(stage, hosts[1]), name=f"{wire.name}, TCP"),
        ]
        await wire.begin([out, back])
        if flapping:
            tasks.append(make(wire.flap([out, back])))
        await stage.stop.wait()
        await stage.finish(*tasks)
        await settled(lambda: sum(wire.received.values()) + out.delivered + back.delivered)
        dropped = await wire.check()
        dropped += dropped_by(one, two)
        # One sum for both flows: no counter tells whose packets were dropped, or whether they were
        # TCP's.
        stage.ledger.settle(wire.name, out, back, dropped=dropped)
    near.close()
    far.close()
    await stage.finish(*carriers, watcher)


async def stream(stage: Stage, host: str) -> None:
    """TCP from one kernel to the other: every byte in its place."""
    received = 0
    over = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        pattern = bytes(range(251)) * 600
        while data := await reader.read(65536):
            at = received % 251
            if data != pattern[at : at + len(data)]:
                stage.ledger.problem(f"TCP to {host}: wrong bytes at {received}")
            received += len(data)
        writer.close()
        over.set()

    def listen() -> socket.socket:
        return socket.create_server((host, 9), family=family_of(host))

    server = await asyncio.start_server(take, sock=inside(stage.peer, listen))
    sent = 0
    pattern = bytes(range(251)) * 400
    async with server:
        connecting = asyncio.open_connection(host, 9)
        try:
            _, writer = await asyncio.wait_for(connecting, 5)
        except (OSError, TimeoutError):  # down just now
            stage.count("TCP connections that failed")
            return
        while not stage.stop.is_set():
            at, length = sent % 251, stage.chance.randrange(1, 60_000)
            writer.write(pattern[at : at + length])
            sent += length
            await pause(stage, length / 1e6)  # 1 MB/s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(writer.drain(), 1)
        writer.close()
        # After a link was down, TCP may wait for seconds before it sends again.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), HANG - 2)
        if not over.is_set():
            # If it has been closed meanwhile, asyncio's own transport has no loop any more.
            with contextlib.suppress(AttributeError):
                writer.transport.abort()
    if over.is_set() and received != sent:
        stage.ledger.problem(f"TCP to {host}: {sent} bytes sent, {received} received")
    stage.count("TCP bytes" if over.is_set() else "TCP bytes, cut off by the round's end", sent)
