"""The events of a link, reported by the real kernel."""

import asyncio
import contextlib
import dataclasses
import errno
import gc
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import aiotun
from aiotun import Link, LinkError, LinkEvent
from aiotun._link import hub, messages, session
from aiotun._link import monitor as link_monitor
from aiotun._link.events import LinkEvents
from aiotun._link.state import BACKLOG, state_of
from aiotun._link.watcher import Watcher

from ..helpers import REAL_ROOT, ip, wait_until
from .kernel import another_namespace, child, inside, make, ordinary_child


def batch(*lines: str) -> None:
    """Run many iproute2 commands fast."""
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(["ip", "-batch", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def named_namespaces() -> list[str]:
    return os.listdir("/run/netns") if os.path.isdir("/run/netns") else []


def watching() -> list[threading.Thread]:
    """The threads that listen."""
    return [thread for thread in threading.enumerate() if thread.name == "aiotun-events"]


def short(event: LinkEvent) -> str:
    """Describe an event in a word or two."""
    told = {
        "mtu": event.info.mtu,
        "renamed": event.info.name,
        "carrier": "on" if event.info.carrier else "off",
        "address_added": event.address,
        "address_removed": event.address,
    }
    return f"{event.kind} {told[event.kind]}" if event.kind in told else event.kind


async def following(events: LinkEvents, count: int) -> list[str]:
    """Return the next events, which must come within seconds."""
    async with asyncio.timeout(10):
        return [short(await anext(events)) for _ in range(count)]


async def all_that_come(events: LinkEvents, found: list[str]) -> None:
    """Append all events to `found` until the iterator ends, which must be within seconds."""
    async with asyncio.timeout(10):
        async for event in events:
            found.append(short(event))  # noqa: PERF401 - kept also where it raises


async def all_ended() -> None:
    """Wait until the last watcher's thread has ended."""
    await wait_until(lambda: not watching())


async def has_begun(events: LinkEvents) -> None:
    await wait_until(lambda: events._watcher is not None and events._watcher._backlog is not None)


@pytest.fixture
def tap() -> str:
    make("e0", "tap")
    return "e0"


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with another_namespace("ip tuntap add e0 mode tap") as path:
        yield path


class TestKinds:
    async def test_events_come_in_the_kernels_order(self, tap: str) -> None:
        async with Link(tap).events() as events, asyncio.timeout(10):
            batch(
                "link set e0 mtu 1400",
                "link set e0 up",
                "addr add 10.0.0.1/24 dev e0",
                "addr add fd00::1/64 dev e0 nodad",
            )
            # The kernel announces an IPv6 address from a work queue, some time later.
            found = [await anext(events) for _ in range(4)]
            batch(
                "addr add 10.1.0.1 peer 10.1.0.2/32 dev e0",
                "addr del 10.0.0.1/24 dev e0",
                "link set e0 down",
                "link set e0 name e1",
                "link del e1",
            )
            found += [event async for event in events]
            assert [short(event) for event in found] == [
                "mtu 1400",
                "up",
                "address_added 10.0.0.1/24",
                "address_added fd00::1/64",
                "address_added 10.1.0.1 peer 10.1.0.2/32",
                "address_removed 10.0.0.1/24",
                "down",
                "address_removed fd00::1/64",
                "renamed e1",
                "address_removed 10.1.0.1 peer 10.1.0.2/32",
                "deleted",
            ]
            assert [event.info.up for event in found[:7]] == [False, *[True] * 5, False]
            assert (found[-1].info.name, found[-1].info.mtu) == ("e1", 1400)
            assert {event.info.index for event in found} == {found[0].info.index}
            # The iterator stays at its end.
            assert [event async for event in events] == []
            await all_ended()

    async def test_carrier_changes_are_told(self) -> None:
        async with aiotun.open_tap("e0") as device, device.link.events() as events:
            device.set_carrier(False)
            assert await following(events, 1) == ["carrier off"]
            device.set_carrier(True)
            assert await following(events, 1) == ["carrier on"]

    async def test_info_is_what_info_gives(self, tap: str) -> None:
        ip("link", "add", "br0", "type", "bridge")
        link = Link(tap)
        async with link.events() as events:
            ip("link", "set", tap, "master", "br0", "alias", "text", "txqueuelen", "7")
            ip("link", "set", tap, "mtu", "1400")
            async with asyncio.timeout(10):
                event = await anext(events)
            assert event == LinkEvent("mtu", await link.info())
            assert (event.info.master, event.info.alias, event.info.txqueuelen) == (
                "br0",
                "text",
                7,
            )
            assert event.info.tuntap is not None

    async def test_leaving_a_bridge_is_no_deletion(self, tap: str) -> None:
        """The bridge reports that with an RTM_DELLINK message."""
        ip("link", "add", "br0", "type", "bridge")
        ip("link", "set", tap, "master", "br0")
        async with Link(tap).events() as events:
            ip("link", "set", tap, "nomaster")
            ip("link", "set", tap, "mtu", "1400")
            assert await following(events, 1) == ["mtu 1400"]

    async def test_other_links_are_not_heard(
        self, tap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They cost almost nothing beyond reading the message."""
        make("e9", "tap")
        read, change = [], messages.change

        def reading(message: Any, master: str | None) -> Any:
            read.append(message["index"])
            return change(message, master)

        monkeypatch.setattr(messages, "change", reading)
        async with Link(tap).events() as events:
            ip("link", "set", "e9", "up", "mtu", "1300")
            ip("addr", "add", "10.0.0.1/24", "dev", "e9")
            ip("link", "del", "e9")
            ip("link", "set", tap, "mtu", "1400")
            assert await following(events, 1) == ["mtu 1400"]
        assert set(read) == {socket.if_nametoindex(tap)}


class TestBeginning:
    async def test_earlier_changes_are_no_events(self, tap: str) -> None:
        """Not even if the thread listens already and has not read that change yet."""
        async with Link(tap).events():
            for number in range(30):
                batch(*(f"link set {tap} mtu {1000 + number} up", f"link set {tap} down") * 3)
                async with Link(tap).events() as events:
                    ip("link", "set", tap, "mtu", str(2000 + number))
                    assert await following(events, 1) == [f"mtu {2000 + number}"]

    @pytest.mark.parametrize("drained", [True, False])
    async def test_not_even_changes_while_the_thread_turns(
        self, tap: str, drained: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that were made after the thread has read its socket, before the iterator began."""
        receive, read, resume = hub.Hub._receive, threading.Event(), threading.Event()

        def held(self: hub.Hub, monitor: link_monitor.Monitor) -> bool:
            found = receive(self, monitor)
            if not read.is_set():
                read.set()
                assert resume.wait(20)
            return found and drained

        async with Link(tap).events():
            monkeypatch.setattr(hub.Hub, "_receive", held)
            ip("link", "set", tap, "mtu", "1400")
            await wait_until(read.is_set)
            batch(f"link set {tap} up", f"link set {tap} down")
            events = Link(tap).events()
            beginning = asyncio.ensure_future(events.__aenter__())
            await wait_until(lambda: events._watcher is not None)
            drained = True  # from the next turn on
            resume.set()
            await beginning
            ip("link", "set", tap, "mtu", "1300")
            assert await following(events, 1) == ["mtu 1300"]
            await events.aclose()

    async def test_without_a_block_it_is_the_first_step(self, tap: str) -> None:
        events = Link(tap).events()
        ip("link", "set", tap, "mtu", "1400")
        assert watching() == []
        task = asyncio.ensure_future(anext(events))
        await has_begun(events)
        ip("link", "set", tap, "mtu", "1300")
        assert short(await task) == "mtu 1300"
        await events.aclose()

    async def test_a_cancelled_first_step_has_begun(self, tap: str) -> None:
        events = Link(tap).events()
        task = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await has_begun(events)
        ip("link", "set", tap, "mtu", "1300")
        assert await following(events, 1) == ["mtu 1300"]
        await events.aclose()

    async def test_a_cancelled_entry_leaves_nothing(self, tap: str) -> None:
        events = Link(tap).events()  # kept, so that it is not garbage-collected

        async def enter() -> None:
            async with events:
                raise AssertionError("not reached")

        task = asyncio.ensure_future(enter())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await all_ended()

    async def test_events_of_a_missing_interface_raise_link_error(self) -> None:
        events = Link("nowhere0").events()
        with pytest.raises(LinkError, match="no interface nowhere0"):
            await anext(events)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        with pytest.raises(LinkError, match="ip link") as caught:
            async with Link("nowhere0").events():
                pass
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "nowhere0")
        await all_ended()

    async def test_one_is_missing_beside_one_that_is_not(self, tap: str) -> None:
        async with Link(tap).events() as events:
            with pytest.raises(LinkError):
                await anext(Link("nowhere0").events())
            ip("link", "set", tap, "mtu", "1400")
            assert await following(events, 1) == ["mtu 1400"]

    async def test_events_in_a_missing_namespace_raise_link_error(self) -> None:
        with pytest.raises(LinkError, match="ip netns add") as caught:
            await anext(Link("lo", netns="nowhere").events())
        assert caught.value.errno == errno.ENOENT
        assert "nowhere" not in named_namespaces()
        assert watching() == []

    def test_who_may_not_enter_the_namespace(self) -> None:
        with another_namespace() as path:
            fd = os.open(path, os.O_RDONLY)
            try:
                said = ordinary_child(
                    f"""
                    async def main():
                        try:
                            await anext(aiotun.Link("lo", netns={fd}).events())
                        except aiotun.NotPermittedError as error:
                            print(json.dumps([error.errno, error.strerror]))
                    asyncio.run(main())
                    """,
                    fds=[fd],
                )
            finally:
                os.close(fd)
        assert said[0] == errno.EPERM
        assert "CAP_SYS_ADMIN" in said[1]

    def test_events_in_ones_own_namespace_need_no_privilege(self, tap: str) -> None:
        """Not even for events of changes that root makes."""
        ip("link", "set", tap, "up")
        assert ordinary_child(
            """
            async def main():
                async with aiotun.Link("e0").events() as events:
                    # A queue of ours: its coming is a change that an ordinary user can make.
                    async with aiotun.open_tap("e0"):
                        async with asyncio.timeout(10):
                            event = await anext(events)
                print(json.dumps([event.kind, event.info.carrier]))
            asyncio.run(main())
            """
        ) == ["carrier", True]


class TestNamespaces:
    @pytest.mark.parametrize("how", ["path", "fd"])
    async def test_events_of_a_link_in_another_namespace_are_told(
        self, elsewhere: str, how: str
    ) -> None:
        here = os.stat("/proc/thread-self/ns/net").st_ino
        fd = os.open(elsewhere, os.O_RDONLY)
        link = Link("e0", netns=fd if how == "fd" else elsewhere)
        os.close(fd)
        async with link.events() as events:
            inside(elsewhere, "ip", "link", "set", "e0", "mtu", "1400")
            assert await following(events, 1) == ["mtu 1400"]
            assert os.stat("/proc/thread-self/ns/net").st_ino == here
            assert os.stat("/proc/self/ns/net").st_ino != os.stat(elsewhere).st_ino

    async def test_events_go_on_after_the_namespaces_name_is_deleted(self) -> None:
        if not REAL_ROOT:
            pytest.skip("'ip netns add' does not work in a user namespace")
        ip("netns", "add", "blue")
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(ip, "netns", "del", "blue")
            opener = aiotun.open_tun("e0", netns="blue", up=False)
            async with opener as tun, tun.link.events() as events:
                cleanup.close()  # the device and its events continue
                await tun.link.set_mtu(1400)
                assert await following(events, 1) == ["mtu 1400"]

    async def test_one_thread_listens_in_each_namespace(self, tap: str, elsewhere: str) -> None:
        make("e1", "tap")
        links = [Link(tap), Link(tap), Link("e1"), Link("e0", elsewhere), Link("e0", elsewhere)]
        async with contextlib.AsyncExitStack() as stack:
            every = [await stack.enter_async_context(link.events()) for link in links]
            assert len(watching()) == 2
            ip("link", "set", tap, "mtu", "1400")
            ip("link", "set", "e1", "mtu", "1401")
            inside(elsewhere, "ip", "link", "set", "e0", "mtu", "1402")
            found = [await following(events, 1) for events in every]
            assert [int(only.split()[1]) for (only,) in found] == [1400, 1400, 1401, 1402, 1402]
            # One iterator's end does not end the others.
            await every[0].aclose()
            ip("link", "set", tap, "mtu", "1300")
            assert await following(every[1], 1) == ["mtu 1300"]
            await every[3].aclose()
            await every[4].aclose()
            await wait_until(lambda: len(watching()) == 1)
        await all_ended()

    async def test_a_move_is_a_deletion(self, tap: str, elsewhere: str) -> None:
        inside(elsewhere, "ip", "link", "del", "e0")
        link = Link(tap)
        async with link.events() as events:
            await link.move_to_netns(elsewhere)
            assert await following(events, 1) == ["deleted"]
        async with link.events() as events:
            await link.set_mtu(1400)
            assert await following(events, 1) == ["mtu 1400"]


class TestFollowing:
    async def test_name_and_mtu_of_a_device(self) -> None:
        async with aiotun.open_tun("e0", addresses=["10.0.0.1/24"]) as tun:
            async with tun.link.events() as events:
                ip("link", "set", "e0", "mtu", "1400")
                assert await following(events, 1) == ["mtu 1400"]
                assert tun.mtu == 1400
                ip("link", "set", "e0", "down")
                ip("link", "set", "e0", "name", "e1")
                assert await following(events, 2) == ["down", "renamed e1"]
                assert (tun.name, tun.link.name, tun.queues[0].name) == ("e1", "e1", "e1")
                ip("link", "del", "e1")
                assert (await following(events, 2))[-1] == "deleted"
            assert (tun.name, tun.mtu) == ("e1", 1400)

    async def test_a_device_is_found_whatever_its_name(self) -> None:
        async with aiotun.open_tun("e0", up=False) as tun:
            ip("link", "set", "e0", "name", "e1")
            async with tun.link.events() as events:
                assert tun.name == "e1"
                ip("link", "set", "e1", "mtu", "1400")
                assert await following(events, 1) == ["mtu 1400"]

    async def test_nobody_needs_to_take_the_events(self) -> None:
        async with aiotun.open_tun("e0") as tun, tun.link.events():
            ip("link", "set", "e0", "mtu", "1400")
            await wait_until(lambda: tun.mtu == 1400)

    async def test_a_name_is_followed(self, tap: str) -> None:
        """The link is known by its index: another link that gets the old name is ignored."""
        link = Link(tap)
        async with link.events() as events:
            ip("link", "set", tap, "name", "e1")
            make(tap, "tap")
            ip("link", "set", tap, "mtu", "1400")
            ip("link", "set", "e1", "mtu", "1300")
            assert await following(events, 2) == ["renamed e1", "mtu 1300"]
            assert (await link.info()).name == link.name == "e1"

    async def test_what_is_heard_late_is_not_written_down(self) -> None:
        """The device takes the kernel's present state, not the late event's."""
        async with aiotun.open_tun("e0", mtu=1400) as tun:
            info = await tun.link.info()
            watcher = Watcher(asyncio.get_running_loop(), tun._interface)
            watcher.begin(state_of(dataclasses.replace(info, mtu=1300), []))
            assert tun.mtu == 1400
            ip("link", "set", "e0", "mtu", "1200")
            watcher.update(state_of(dataclasses.replace(info, mtu=1300), []))
            assert tun.mtu == 1200

    async def test_what_a_request_changed_is_not_taken_back(self) -> None:
        """The thread reads old events after a request has already stored newer values."""
        async with aiotun.open_tun("e0") as tun, tun.link.events():
            for mtu in range(1000, 1100):
                ip("link", "set", "e0", "mtu", str(mtu))
                await tun.link.set_mtu(mtu + 1000)
                assert tun.mtu == mtu + 1000


class TestReading:
    async def test_cancelling_loses_nothing(self, tap: str) -> None:
        """A step is cancelled before, while and after its event comes."""
        found: list[str] = []
        async with Link(tap).events() as events:
            batch(*(f"link set {tap} mtu {mtu}" for mtu in range(1000, 1100)))
            attempts = 0
            while len(found) < 200:
                if attempts == 100:
                    batch(*(f"link set {tap} mtu {mtu}" for mtu in range(1100, 1200)))
                attempts += 1
                task = asyncio.ensure_future(anext(events))
                for _ in range(attempts % 4):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    found.append(short(await task))
        assert found == [f"mtu {mtu}" for mtu in range(1000, 1200)]

    async def test_a_step_cancelled_as_its_event_comes_loses_nothing(self, tap: str) -> None:
        async with Link(tap).events() as events:
            watcher = events._watcher
            assert watcher is not None
            backlog = watcher._backlog
            assert backlog is not None
            for mtu in range(1000, 1040):
                task = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0)
                ip("link", "set", tap, "mtu", str(mtu))
                # Don't let the loop turn: its wake-up is pending.
                deadline = time.monotonic() + 5
                while not backlog._changes:
                    assert time.monotonic() < deadline
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await following(events, 1) == [f"mtu {mtu}"]

    async def test_cancelled_steps_leave_nothing(self, tap: str) -> None:
        async with Link(tap).events() as events:
            for _ in range(100):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(events), 0.0001)
            assert events._watcher is not None
            assert not events._watcher._waiters

    async def test_each_event_goes_to_one_of_several(self, tap: str) -> None:
        async with Link(tap).events() as events, asyncio.timeout(10):
            tasks = [asyncio.ensure_future(anext(events)) for _ in range(5)]
            await asyncio.sleep(0)
            batch(*(f"link set {tap} mtu {mtu}" for mtu in range(1000, 1005)))
            found = sorted(short(event) for event in await asyncio.gather(*tasks))
            assert found == [f"mtu {mtu}" for mtu in range(1000, 1005)]

    async def test_closing_ends_the_waiting(self, tap: str) -> None:
        events = Link(tap).events()
        tasks = [asyncio.ensure_future(anext(events)) for _ in range(2)]
        await has_begun(events)
        await events.aclose()
        assert events._watcher is not None
        assert events._watcher.over
        for task in tasks:
            with pytest.raises(StopAsyncIteration):
                await task
        await all_ended()
        await events.aclose()
        assert [event async for event in events] == []
        with pytest.raises(RuntimeError, match="were closed"):
            async with events:
                pass

    async def test_events_closed_before_they_began_are_empty(self, tap: str) -> None:
        events = Link(tap).events()
        await events.aclose()
        assert [event async for event in events] == []
        assert watching() == []

    async def test_events_not_taken_are_dropped_by_closing(self, tap: str) -> None:
        async with Link(tap).events() as events:
            ip("link", "set", tap, "mtu", "1400")
            watcher = events._watcher
            assert watcher is not None
            await wait_until(lambda: bool(watcher._backlog and watcher._backlog._changes))
        assert [event async for event in events] == []

    async def test_reading_in_another_loop_raises_runtime_error(self, tap: str) -> None:
        async with Link(tap).events() as events:

            def other() -> str:
                async def step() -> None:
                    await anext(events)

                with pytest.raises(RuntimeError, match="another event loop") as caught:
                    asyncio.run(step())
                return str(caught.value)

            assert "call link.events() here" in await asyncio.to_thread(other)

    async def test_loops_in_several_threads(self, tap: str) -> None:
        ready = threading.Barrier(4)

        def program() -> list[str]:
            async def main() -> list[str]:
                async with Link(tap).events() as events:
                    await asyncio.to_thread(ready.wait, 10)
                    return await following(events, 20)

            return asyncio.run(main())

        tasks = [asyncio.ensure_future(asyncio.to_thread(program)) for _ in range(3)]
        await asyncio.to_thread(ready.wait, 10)
        assert len(watching()) == 1
        batch(*(f"link set {tap} mtu {mtu}" for mtu in range(1000, 1020)))
        for found in await asyncio.gather(*tasks):
            assert found == [f"mtu {mtu}" for mtu in range(1000, 1020)]
        await all_ended()


class TestEnding:
    async def test_a_loop_that_is_left(self, tap: str) -> None:
        ip("link", "set", tap, "up")
        task = asyncio.ensure_future(self.leave(tap))
        await wait_until(lambda: bool(watching()) or task.done())
        while not task.done():
            ip("link", "set", tap, "mtu", "1400")
            ip("link", "set", tap, "mtu", "1300")
            await asyncio.sleep(0)
        await task
        await all_ended()

    @staticmethod
    async def leave(name: str) -> None:
        async for _ in Link(name).events():
            break

    async def test_an_iterator_that_nobody_holds_is_freed(self, tap: str) -> None:
        """Without the garbage collector: no live object may refer to a dropped iterator."""
        gc.disable()
        try:
            events = Link(tap).events()
            await events.__aenter__()
            assert len(watching()) == 1
            del events
            await all_ended()
        finally:
            gc.enable()

    def test_the_loop_is_closed(self, tap: str) -> None:
        """The iterator is still held, by a task that waits for an event."""
        held: list[LinkEvents] = []

        async def main() -> None:
            events = Link(tap).events()
            held.append(events)
            await events.__aenter__()

        asyncio.run(main())
        (thread,) = watching()
        thread.join(5)
        assert not thread.is_alive()
        assert held[0]._watcher is not None
        assert held[0]._watcher.over

    def test_the_loop_is_closed_under_a_waiting_task(self, tap: str) -> None:
        loop = asyncio.SelectorEventLoop()
        loop.set_exception_handler(lambda *_: None)  # asyncio reports the pending task later
        events = Link(tap).events()
        task = loop.create_task(anext(events))
        loop.run_until_complete(has_begun(events))
        loop.close()
        ip("link", "set", tap, "mtu", "1400")
        for thread in watching():
            thread.join(5)
        assert watching() == []
        assert not task.done()
        del task, events
        gc.collect()

    @pytest.mark.parametrize("closing", ["loop.close()", "warnings.simplefilter('ignore')"])
    def test_the_program_ends(self, tap: str, closing: str) -> None:
        """The interpreter's end does not wait for an open iterator or an open loop."""
        said = child(
            f"""
            import warnings
            events = aiotun.Link({tap!r}).events()
            loop = asyncio.SelectorEventLoop()
            loop.run_until_complete(events.__aenter__())
            {closing}
            print(json.dumps("ended"))
            """
        )
        assert said == "ended"

    async def test_starting_and_ending_many_times_leaks_no_fd(self, tap: str) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(50):
            async with Link(tap).events() as events, Link(tap).events():
                ip("link", "set", tap, "mtu", str(1000 + number))
                assert await following(events, 1) == [f"mtu {1000 + number}"]
            await all_ended()
        assert len(os.listdir("/proc/self/fd")) <= before + 1

    def test_after_a_fork(self, tap: str) -> None:
        """A forked child has none of the threads, and starts its own."""
        said = child(
            f"""
            import warnings
            async def main():
                async with aiotun.Link({tap!r}).events():
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        pid = os.fork()
                    if pid == 0:
                        os._exit(int(grandchild() != 3))
                    _, status = os.waitpid(pid, 0)
                    print(json.dumps(os.waitstatus_to_exitcode(status)))

            def grandchild():
                import threading
                result = []
                async def watch():
                    async with aiotun.Link({tap!r}).events():
                        result.append(3)
                thread = threading.Thread(target=lambda: asyncio.run(watch()))
                thread.start()
                thread.join(10)
                return result[0] if result else None

            asyncio.run(main())
            """
        )
        assert said == 0


class Gate:
    """Blocks the listening thread, so that messages pile up in its socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.overruns = 0
        receive = link_monitor.Monitor.receive

        def held(monitor: link_monitor.Monitor, wanted: Any) -> Any:
            self.open.wait(20)
            try:
                return receive(monitor, wanted)
            except OSError as error:
                self.overruns += error.errno == errno.ENOBUFS
                raise

        monkeypatch.setattr(link_monitor.Monitor, "receive", held)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


class TestOverrun:
    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> Gate:
        monkeypatch.setattr(link_monitor, "_RECEIVE_BUFFER_BYTES", 16_384)
        return Gate(monkeypatch)

    @pytest.mark.parametrize("at_once", [500, 3])
    async def test_after_an_overrun_the_state_is_complete(
        self, tap: str, gate: Gate, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if reading the messages that fitted into the buffer takes several turns."""
        monkeypatch.setattr(hub, "_DATAGRAMS_AT_ONCE", at_once)
        make("e1", "tap")
        ip("addr", "add", "10.0.0.1/24", "dev", tap)
        lines = [f"link set {tap} mtu {1000 + number}" for number in range(200)]
        async with Link(tap).events() as events, Link("e1").events() as others:
            with gate.closed():
                batch(
                    *lines,
                    f"addr del 10.0.0.1/24 dev {tap}",
                    f"addr add 10.0.0.2/24 dev {tap}",
                    f"link set {tap} name e2",
                    "link set e2 up",
                    "addr add 10.0.0.3/24 dev e2",
                    "link set e1 mtu 1400",
                )
            found: list[str] = []
            while not found or found[-1] != "address_added 10.0.0.3/24":
                found += await following(events, 1)
            assert gate.overruns == 1
            # Messages that fitted are reported one by one, then the rest as one difference.
            told = [f"mtu {1000 + number}" for number in range(200)]
            whole = found.index("renamed e2")
            assert 1 < whole < 100
            assert found[:whole] == told[:whole]
            assert found[whole:] == [
                "renamed e2",
                "mtu 1199",
                "up",
                "address_removed 10.0.0.1/24",
                "address_added 10.0.0.2/24",
                "address_added 10.0.0.3/24",
            ]
            assert await following(others, 1) == ["mtu 1400"]
            # Events continue.
            ip("link", "set", "e2", "mtu", "1300")
            ip("link", "set", "e1", "mtu", "1301")
            assert await following(events, 1) == ["mtu 1300"]
            assert await following(others, 1) == ["mtu 1301"]
            assert len(watching()) == 1

    async def test_repeated_overruns_are_survived(self, tap: str, gate: Gate) -> None:
        async with Link(tap).events() as events:
            for turn in range(5):
                first = 1000 + 200 * turn
                with gate.closed():
                    batch(*(f"link set {tap} mtu {first + number}" for number in range(200)))
                while await following(events, 1) != [f"mtu {first + 199}"]:
                    pass
            assert gate.overruns == 5

    async def test_a_deletion_is_not_overlooked(self, tap: str, gate: Gate) -> None:
        async with Link(tap).events() as events:
            with gate.closed():
                batch(*(f"link set {tap} mtu {1000 + number}" for number in range(200)))
                ip("link", "del", tap)
            async with asyncio.timeout(10):
                found = [short(event) async for event in events]
            assert gate.overruns == 1
            assert found[-1] == "deleted"
        await all_ended()

    async def test_an_overrun_by_another_link_loses_no_event(self, tap: str, gate: Gate) -> None:
        make("e1", "tap")
        async with Link(tap).events() as events:
            with gate.closed():
                batch(*(f"link set e1 mtu {1000 + number}" for number in range(200)))
            ip("link", "set", tap, "mtu", "1400")
            assert await following(events, 1) == ["mtu 1400"]
            assert gate.overruns == 1

    async def test_what_can_not_be_looked_up_is_tried_again(
        self, tap: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        look_up, failures = hub._look_up, [1, 2]

        def fail(links: Any) -> Any:
            if failures:
                failures.pop()
                raise LinkError(errno.EMFILE, "too few file descriptors")
            return look_up(links)

        async with Link(tap).events() as events:
            monkeypatch.setattr(hub, "_look_up", fail)
            with gate.closed():
                batch(*(f"link set {tap} mtu {1000 + number}" for number in range(200)))
            while await following(events, 1) != ["mtu 1199"]:
                pass
            assert failures == []


class TestSlowReaders:
    async def test_the_backlog_of_a_slow_reader_is_bounded(self, tap: str) -> None:
        """A slow reader gets fewer events, in order, and ends with the true state."""
        make("e1", "tap")
        async with Link(tap).events() as slow, Link(tap).events() as fast:
            for turn in range(4):
                first = 1000 + 200 * turn
                batch(*(f"link set {tap} mtu {first + number}" for number in range(200)))
                assert (await following(fast, 200))[-1] == f"mtu {first + 199}"
            watcher = slow._watcher
            assert watcher is not None
            assert watcher._backlog is not None
            await wait_until(lambda: watcher._backlog is not None and watcher._backlog._folded)
            assert len(watcher._backlog._changes) <= BACKLOG
            assert await following(slow, 1) == ["mtu 1799"]
            ip("link", "del", tap)
            assert (await following(slow, 1))[-1] == "deleted"


class TestFailure:
    async def test_the_thread_fails(self, tap: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every watcher raises it once, after earlier events; new watchers start a new thread."""

        def fail(monitor: object, wanted: object) -> None:
            raise OSError(errno.ENOMEM, "out of memory")

        async with Link(tap).events() as events, Link(tap).events() as others:
            ip("link", "set", tap, "mtu", "1400")
            assert await following(others, 1) == ["mtu 1400"]
            with monkeypatch.context() as patch:
                patch.setattr(link_monitor.Monitor, "receive", fail)
                ip("link", "set", tap, "mtu", "1300")
                with pytest.raises(OSError, match="out of memory"):
                    await all_that_come(others, [])
            found: list[str] = []
            with pytest.raises(OSError, match="out of memory"):
                await all_that_come(events, found)
            # The second event comes if the thread was just reading.
            assert found in (["mtu 1400"], ["mtu 1400", "mtu 1300"])
            assert [event async for event in events] == []
            async with Link(tap).events() as again:
                ip("link", "set", tap, "mtu", "1200")
                assert await following(again, 1) == ["mtu 1200"]

    async def test_netlink_can_not_be_opened(
        self, tap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(monitor: object) -> None:
            with session.opening():
                raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(link_monitor.Monitor, "__init__", fail)
            with pytest.raises(aiotun.ResourceLimitError, match="could not open netlink"):
                async with Link(tap).events():
                    pass
        async with Link(tap).events():
            pass

    async def test_events_without_a_new_thread_raise_resource_limit_error(
        self, tap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(thread: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(aiotun.ResourceLimitError, match="no new thread"):
                await anext(Link(tap).events())
        async with Link(tap).events():
            pass
