"""What each kind of step does, and how a run ends."""

import asyncio
import os
import time
from collections.abc import Awaitable
from typing import Any

import aiotun

from . import actors, kernel, nuisances
from .captures import Recording
from .packets import Fault
from .steps import Step
from .world import Target, World

__all__ = ["Steps"]


class Steps:
    """What each kind of step does."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def take(self, step: Step) -> None:
        kind, *numbers = step
        done = getattr(self, f"do_{kind}")(*numbers)
        if done is not None:
            await done

    async def bind(self) -> None:
        """Have every target belong to this loop."""
        for target in self.world.targets:
            actor = actors.receive(self.world, target, "recv", 1, 1, "plain", 0, 0)
            await asyncio.sleep(0)
            actors.cancel(actor, 1)
            await asyncio.sleep(0)

    # Packets

    def do_feed(self, flow: int, count: int, together: int) -> None:
        self.world.feed(self.world.flows[flow], count, together)

    def _running(self) -> list[actors.Actor]:
        return [a for a in self.world.actors if a.task is not None and not a.task.done()]

    def do_receive(self, target: int, *numbers: Any) -> None:
        world = self.world
        if len(self._running()) < world.config.most:
            actors.receive(world, world.target(target), *numbers)

    def do_nowait(self, target: int) -> None:
        self.world.nowait(self.world.target(target))

    def do_send(self, target: int, how: str, flow: int, *numbers: Any) -> None:
        world = self.world
        if len(self._running()) < world.config.most:
            actors.send(world, world.target(target), how, world.flows[flow], *numbers)

    async def do_bad_buffer(self, target: int, which: int) -> None:
        await nuisances.bad_buffer(self.world, self.world.target(target), which)

    def do_cancel(self, which: int, times: int) -> None:
        """Cancel one of the tasks; -1 is the newest, -2 all of them."""
        running = self._running()
        if running and which >= -1:
            running = [running[which if which < 0 else which % len(running)]]
        for actor in running:
            actors.cancel(actor, times)

    async def do_turn(self, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    async def do_pass(self, milliseconds: int) -> None:
        """Let time pass, for those with a time limit."""
        await asyncio.sleep(milliseconds / 1000)

    async def do_settle(self) -> None:
        await self.world.settle()

    async def do_drain(self) -> None:
        """Cancel whoever waits, and take all that is there."""
        world = self.world
        for actor in world.actors:
            actors.cancel(actor, 1)
        await world.settle()
        deadline = time.monotonic() + world.patience
        while not world.lost and (there := world.into.there):
            took = [world.nowait(target) for target in world.targets if not target.closed]
            if not any(took):
                if time.monotonic() > deadline:
                    raise Fault(
                        "lost",
                        f"{len(there)} packets are gone: {list(there)[:5]}...; {world.told()}",
                    )
                await asyncio.sleep(0.001)

    # Capturing

    def do_capture(self) -> None:
        world = self.world
        if world.base is not None and not world.closed and len(world.recordings) < 4:
            world.recordings.append(Recording(world.base, world.went_out()))

    def do_uncapture(self, which: int) -> None:
        active = [each for each in self.world.recordings if each.active]
        if active:
            active[which % len(active)].stop(self.world.went_out())

    # Ends

    def do_close(self, target: int) -> None:
        world = self.world
        end = world.target(target)
        self._before_end(end.rings)
        io = end.io
        for ring in list(end.rings):
            world.close_ring(ring)
        end.closed = True
        io.close()

    def do_detach(self, ring: int, adopt: int) -> None:
        world = self.world
        rings = sorted(world.fds)
        if not rings or world.lost or (world.base is None and world.config.linked):
            return
        ring = rings[ring % len(rings)]
        fd = world.fds[ring]
        (owner,) = [
            t for t in world.targets if t.io.__class__ and ring in t.rings and t.rings == {ring}
        ][-1:]
        if not isinstance(owner.io, aiotun.Queue):
            return
        self._before_end({ring})
        # What stays in the kernel's ring. A super-packet that was begun does not: its rest goes
        # with the queue. It may have been begun by a packet that was taken without being seen.
        begun = {p.group for p in world.into.packets.values() if p.state in ("done", "doubtful")}
        there = [
            p for p in world.into.there.values() if p.ring in (ring, None) and p.group not in begun
        ]
        enabled = ring not in world.disabled
        world.close_ring(ring)
        given = owner.io.detach()
        if given != fd:
            raise Fault("detach", f"gave fd {given}, and it was {fd}")
        if not adopt or world.config.mode == "memory":
            os.close(given)
            return
        self._adopt(ring, given, there if enabled else [])

    def _adopt(self, ring: int, fd: int, there: list[Any]) -> None:
        """Go on with a queue made of the fd: what is in the kernel's ring is still there."""
        world = self.world
        config = world.config
        offload: Any = "split" if config.split else "raw" if config.raw else "off"
        queue = aiotun.Queue.from_fd(fd, offload)
        world.fds[ring] = fd
        target = Target(f"adopted {ring}", queue, {ring}, captured=False)
        world.targets.append(target)
        for packet in there:
            if packet.ring == ring:
                world.into.mark(packet, "there")

    def _before_end(self, rings: set[int]) -> None:
        """Look at what can't be seen later: how much was sent while captures were active."""
        if rings >= self.world.fds.keys():
            out = self.world.went_out()
            for recording in self.world.recordings:
                recording.stop(out)

    # The kernel's queues and the link

    def do_disable(self, ring: int) -> None:
        self._enable(ring, False)

    def do_enable(self, ring: int) -> None:
        self._enable(ring, True)

    def _enable(self, ring: int, on: bool) -> None:
        world = self.world
        if world.base is None or world.lost:
            return
        ring %= len(world.base.queues)
        queue = world.base.queues[ring]
        if queue.closed or queue.disabled != on:
            return
        world.forget(ring)
        if on:
            queue.enable()
            world.disabled.discard(ring)
        else:
            queue.disable()
            world.disabled.add(ring)

    def _linked(self) -> bool:
        world = self.world
        return world.config.linked and bool(world.fds) and not world.lost

    async def do_down(self, politely: int) -> None:
        world = self.world
        if not self._linked() or world.moved:
            return
        world.collect()
        world.down = True
        for op in world.sending:
            op.saw_down = True
        if politely and not world.closed:
            await self._ask(world.base.link.down())
        else:
            kernel.flags_up(world.name, False)

    async def do_up(self, politely: int) -> None:
        world = self.world
        if not self._linked() or world.moved:
            return
        if politely and not world.closed:
            await self._ask(world.base.link.up())
        else:
            kernel.flags_up(world.name, True)
        world.down = False
        if world.config.version == 6:
            # Until then the kernel drops what comes for its address, without a count of ours.
            deadline = time.monotonic() + world.patience
            while not kernel.ipv6_usable(world.name) and time.monotonic() < deadline:  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.001)

    async def _ask(self, request: Awaitable[Any]) -> None:
        try:
            await asyncio.wait_for(request, 5)
        except (aiotun.AiotunError, TimeoutError) as error:
            raise Fault("link", f"{error!r}; {self.world.told()}") from error

    def do_delete(self) -> None:
        world = self.world
        if not world.fds or world.lost or world.moved:
            return
        world.collect()
        self._before_end(set(world.fds))
        world.lost = True
        world.into.doubt()
        if world.config.linked:
            kernel.delete(world.index)
        else:
            world.line.close()

    async def do_rename(self, politely: int) -> None:
        world = self.world
        if not self._linked() or world.moved or world.closed:
            return
        new = f"{world.name}r"[-15:]
        if politely:
            await self._ask(world.base.link.rename(new))
            if world.base.name != new:
                raise Fault("link", f"renamed to {new}, and name says {world.base.name}")
        else:
            kernel.rename(world.name, new)
        world.name = new

    async def do_move(self, politely: int) -> None:
        world = self.world
        if not self._linked() or world.moved or world.closed or world.config.frame:
            return
        world.collect()
        self._before_end(set(world.fds))
        world.moved = True
        for op in world.sending:
            op.saw_down = True
        world.into.doubt()
        # Kept until the end of the run: a device that was moved in dies with its namespace.
        netns = world.keep.enter_context(nuisances.another_namespace())
        if politely:
            await self._ask(world.base.link.move_to_netns(netns))
        else:
            kernel.move(world.index, netns)

    # Nuisances

    def do_fork(self, how: int) -> None:
        nuisances.fork(self.world, how)

    def do_wrong_loop(self, target: int, how: int) -> None:
        nuisances.wrong_loop(self.world, self.world.target(target), how)

    async def do_crowd(self, target: int, count: int) -> None:
        await self.do_drain()
        await nuisances.crowd(self.world, self.world.target(target), count)

    async def do_flood(self, flow: int) -> None:
        await self.do_drain()
        await nuisances.flood(self.world, self.world.flows[flow])

    async def do_opening(self, turns: int, failing: int) -> None:
        if not self.world.config.frame:
            await nuisances.opening(self.world, turns, failing)

    # The end

    async def finish(self, how: int) -> Any:
        """Settle the account, and close; gives the device where another loop is to do so again."""
        world = self.world
        await world.settle()
        await self.do_drain()
        await self._all_sent()
        self._compare()
        out = world.went_out() if not world.lost else None
        for recording in world.recordings:
            recording.stop(out)
            recording.compare()
        world.recordings.clear()
        for target in world.targets:
            target.closed = True
        if how == 0:
            world.device.close()
        await self._close(how)
        return world.device if how == 3 else None

    async def _close(self, how: int) -> None:
        device = self.world.device
        if how == 3:
            for target in self.world.targets[1:] + self.world.targets[:1]:
                target.io.close()
            self.world.closed_late = True
            return

        async def leave() -> None:
            async with device:
                pass

        try:
            await asyncio.wait_for(leave() if how == 2 else device.aclose(), 5)
        except TimeoutError:
            raise Fault("closing", "aclose() does not return") from None

    async def _all_sent(self) -> None:
        world = self.world
        deadline = time.monotonic() + world.patience
        while True:
            world.collect()
            there = world.out.there
            if not there or world.lost or world.moved:
                return
            if time.monotonic() > deadline:
                raise Fault(
                    "lost", f"{len(there)} packets were sent and never came: {list(there)[:5]}..."
                )
            await asyncio.sleep(0.001)

    def _compare(self) -> None:
        world = self.world
        adopted = [target.io for target in world.targets if not target.captured]
        found = sum(io.stats.truncated for io in (world.device, *adopted))
        if found != world.truncated:
            raise Fault("stats", f"truncated={found}, and {world.truncated} were")
