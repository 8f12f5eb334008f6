"""Devices as transports: what their protocol is told."""

import asyncio
import time
from typing import Any

import aiotun

from .packets import OUT, Fault, make, payload, waiting_frame
from .stepping import Steps
from .world import Op, World

__all__ = ["Receiver", "TransportSteps"]


class Receiver(aiotun.PacketProtocol):
    """A protocol that counts what it is told."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.transport: Any = None
        self.errors = self.lost = 0
        self.paused = False
        self.inside = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def packet_received(self, data: bytes) -> None:
        world = self.world
        assert world is not None
        if self.inside:
            world.fault("nested", "packet_received within a callback")
        if self.paused or self.lost:
            world.fault("paused", "packet_received while reading is paused, or after the end")
        self.inside = True
        try:
            world.received(Op("packet_received", world.targets[0], 0), [data])
        except Fault as fault:
            world.faults.append(fault)
        finally:
            self.inside = False

    def error_received(self, exc: OSError) -> None:
        if self.inside:
            assert self.world is not None
            self.world.fault("nested", "error_received within packet_received")
        self.errors += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1


class TransportSteps(Steps):
    """The steps of a transport; whoever waits is the protocol."""

    def __init__(self, world: World, receiver: Receiver) -> None:
        super().__init__(world)
        receiver.world = world
        self._receiver = receiver
        self._transport = receiver.transport
        self._over = False
        self._given = 0
        world.more_unfinished = self._unfinished

    def _unfinished(self) -> list[str]:
        world, receiver = self.world, self._receiver
        found = []
        over = self._over or world.closed or world.lost
        if over and not receiver.lost:
            found.append("connection_lost has not been called")
        if receiver.lost > 1:
            found.append("connection_lost was called twice")
        if not over and not receiver.paused and world.into.there:
            found.append("packets are there, and packet_received is not called")
        if self._transport.get_write_buffer_size() < 0:
            found.append("the write buffer's size is below zero")
        return found

    def do_sendto(self, flow: int, count: int, kind: int) -> None:
        world, config = self.world, self.world.config
        world.epoch += 1  # the kernel may send the flow to another queue from now on
        for _ in range(count):
            packet = world.out.add(flow, 0, "doubtful")
            body = payload(OUT, flow, packet.number, config.size)
            data: Any = make(world.flows[flow], [body], config.frame)
            if config.frame:
                data = waiting_frame(data)
            if kind == 1:
                data = bytearray(data)
            elif kind == 2:
                data = memoryview(data).cast("I" if len(data) % 4 == 0 else "H")
            self._given += 1
            self._transport.sendto(data)
            if kind == 1:
                data[:] = bytes(len(data))  # it may be changed now
        self.world.collect()

    def do_pause(self) -> None:
        self._transport.pause_reading()
        self._receiver.paused = True

    def do_resume(self) -> None:
        self._receiver.paused = False
        self._transport.resume_reading()

    def do_transport_close(self, abort: int) -> None:
        self._before_end(set(self.world.fds))
        self._over = True
        self.world.into.doubt()
        if abort:
            self._transport.abort()
        else:
            self._transport.close()

    def do_close(self, target: int) -> None:
        super().do_close(0)

    def do_delete(self) -> None:
        if not self._over:  # else it is going by itself
            super().do_delete()

    async def do_down(self, politely: int) -> None:
        if not self._over:
            await super().do_down(0)

    async def do_up(self, politely: int) -> None:
        if not self._over:
            await super().do_up(0)

    async def do_drain(self) -> None:
        if not (self._over or self.world.closed):
            self.do_resume()
        await self.world.settle()

    async def finish(self, how: int) -> Any:
        world = self.world
        await world.settle()
        await self.do_drain()
        deadline = time.monotonic() + world.patience
        while True:  # none is left: each came, was refused with an error, or is counted
            world.collect()
            came = world.out.done
            told = self._receiver.errors + self._transport.dropped
            if came + told == self._given or world.lost:
                break
            if time.monotonic() > deadline:
                raise Fault("lost", f"{self._given} given to sendto, {came} came, {told} told")
            await asyncio.sleep(0.001)
        out = world.went_out() if not world.lost else None
        for recording in world.recordings:
            recording.stop(out)
            recording.compare()
        world.recordings.clear()
        self._over = True
        self._transport.close()
        await world.settle()
        if self._transport.get_write_buffer_size() != 0:
            raise Fault(
                "buffer",
                f"the write buffer's size is {self._transport.get_write_buffer_size()} at the end",
            )
        world.targets[0].closed = True
        await self._close(1)
        return None
