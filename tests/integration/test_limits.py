"""When threads or file descriptors run out: the error says so, and nothing is left behind."""

import asyncio
import contextlib
import errno
import gc
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun import Link, Queue, ResourceLimitError
from aiotun._cli.listen import Listener, ListenError
from aiotun._kernel import threads
from aiotun._link import hub
from aiotun.capture import PcapWriter

from .. import _isolation
from ..helpers import ip, ordinary_python, wait_until
from .kernel import another_namespace, changes, child, make, names, ordinary_child
from .test_undoing import EVERYTHING, bridges, old_device, open_files


def join_threads() -> None:
    """Wait for all threads, including those that watch links, which hold descriptors."""
    for thread in threading.enumerate():
        if thread.name.startswith("aiotun"):
            thread.join(5)
            assert not thread.is_alive()


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """No thread can be started, as at RLIMIT_NPROC."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


@contextlib.contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """Only this many file descriptors can be opened."""
    numbers = [os.dup(0) for _ in range(free + 1)]
    for number in numbers:
        os.close(number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (numbers[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """Enter another network namespace with this thread during the block."""
    here, there = (os.open(each, os.O_RDONLY) for each in ("/proc/thread-self/ns/net", path))
    try:
        _isolation.setns(there)
        yield
    finally:
        _isolation.setns(here)
        os.close(here)
        os.close(there)


def inode() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


async def watch() -> None:
    async with Link("lo").events():
        pass


async def adopt() -> None:
    fd = aiotun.Queue.detach((await aiotun.open_tun("new1")).queues[0])
    try:
        device = aiotun.TunDevice.from_fd(fd)
    except BaseException:
        os.close(fd)
        raise
    await device.aclose()


async def adopt_queue() -> None:
    fd = (await aiotun.open_tun("new1")).queues[0].detach()
    try:
        queue = aiotun.Queue.from_fd(fd)
    except BaseException:
        os.close(fd)
        raise
    await queue.aclose()


ADOPTING = {"adopting": adopt, "adopting a queue": adopt_queue}


async def open_it() -> None:
    await (await aiotun.open_tun("new0", addresses=["10.9.0.1/24"])).aclose()


async def transport() -> None:
    made, _ = await aiotun.create_tun_endpoint(aiotun.PacketProtocol, "new0")
    made.abort()
    await made.get_extra_info("device").aclose()


async def move() -> None:
    """Move the link to its own namespace, which the kernel accepts."""
    await Link("old0").move_to_netns("/proc/thread-self/ns/net")


CALLS: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
    "opening": open_it,
    "a transport": transport,
    "a link's request": lambda: Link("lo").info(),
    "a link in a namespace": lambda: Link("lo", "/proc/self/ns/net").addresses(),
    "moving": move,
    "events": watch,
    "a persistent device": lambda: aiotun.create_persistent("new0"),
    "a bridge": lambda: aiotun.create_bridge("new0"),
    "the list": aiotun.list_devices,
}


def clean_up() -> None:
    if "new0" in names():
        ip("link", "del", "new0")


class TestNoThread:
    @pytest.mark.parametrize("what", CALLS)
    async def test_calls_that_need_a_thread_raise_resource_limit_error(self, what: str) -> None:
        make("old0")
        with no_threads(), pytest.raises(ResourceLimitError, match="no new thread") as caught:
            await CALLS[what]()
        assert caught.value.errno == errno.EAGAIN
        assert "ulimit -u" in str(caught.value)
        assert "pids.max" in str(caught.value)
        assert isinstance(caught.value, aiotun.AiotunError)
        assert names() == ["old0"]
        await CALLS[what]()
        clean_up()

    @pytest.mark.parametrize("what", ["deleting", "a bridge"])
    async def test_deleting_says_so(self, what: str) -> None:
        make("old0")
        ip("link", "add", "br0", "type", "bridge")
        with no_threads(), pytest.raises(ResourceLimitError, match="no new thread"):
            await (
                aiotun.delete_bridge("br0") if what == "a bridge"
                else aiotun.delete_persistent("old0")
            )  # fmt: skip
        assert names() == ["br0", "old0"]

    async def test_adopting_says_so(self) -> None:
        device = await aiotun.open_tun("new0")
        fd = device.queues[0].detach()
        with no_threads(), pytest.raises(ResourceLimitError, match="no new thread"):
            aiotun.TunDevice.from_fd(fd)
        async with aiotun.TunDevice.from_fd(fd):  # the fd still belongs to the caller
            pass

    def test_a_capture_file_says_so(self, tmp_path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        with no_threads(), pytest.raises(ResourceLimitError, match="no new thread"):
            PcapWriter(tmp_path / "file.pcap")
        assert os.listdir("/proc/self/fd") == before

    async def test_closing_needs_none(self) -> None:
        device = await aiotun.open_tun("new0", queues=2)
        waiting = asyncio.create_task(device.recv())
        await asyncio.sleep(0)
        with no_threads():
            await device.aclose()
            assert names() == []
        with pytest.raises(aiotun.DeviceClosedError):
            await waiting

    async def test_what_holds_on_to_the_error_holds_no_descriptor(self) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        gc.disable()
        try:
            with no_threads(), pytest.raises(ResourceLimitError) as caught:
                await aiotun.list_devices("/proc/self/ns/net")
            assert sorted(os.listdir("/proc/self/fd")) == before
            assert caught.value.errno == errno.EAGAIN
        finally:
            gc.enable()

    def test_at_rlimit_nproc_opening_raises_resource_limit_error(self) -> None:
        """An ordinary user at RLIMIT_NPROC, which does not bind root."""
        said = ordinary_child(
            """
            import resource
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
            attempt(aiotun.open_tun())
            """
        )
        assert (said["class"], said["errno"]) == ("ResourceLimitError", errno.EAGAIN)
        assert "ulimit -u" in said["strerror"]


async def cancelled_when_done(opener: Any) -> asyncio.Task[Any]:
    """Let an opening succeed, and cancel it before its task has the device."""

    async def await_it() -> Any:
        return await opener

    task = asyncio.create_task(await_it())
    await asyncio.sleep(0)
    join_threads()  # don't let the loop turn: the thread's report is queued in it
    task.cancel("because")
    return task


class TestCancelledWithoutAThread:
    """A cancelled opening is undone even if no thread can be started."""

    @pytest.mark.parametrize("persist", [None, True])
    async def test_a_created_device_is_deleted(self, persist: bool | None) -> None:
        bridges()
        options = {**EVERYTHING, "persist": persist}
        task = await cancelled_when_done(aiotun.open_tap("new0", **options))
        assert "new0" in names()
        with no_threads(), pytest.raises(asyncio.CancelledError, match="because"):
            await task
        assert names() == ["br0", "br1"]
        async with aiotun.open_tap("new0", **options):
            pass
        if persist:
            ip("link", "del", "new0")

    async def test_an_existing_device_is_restored(self) -> None:
        """Undoing uses netlink, in an event loop inside the event loop."""
        bridges()
        before = old_device()
        task = await cancelled_when_done(aiotun.open_tap("old0", **EVERYTHING))
        assert changes("old0", before) != []
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        with no_threads(), pytest.raises(asyncio.CancelledError):
            await task
        assert changes("old0", before) == []
        assert (asyncio.get_running_loop(), asyncio.current_task()) == (loop, current)
        async with aiotun.open_tap("old0"):  # it has one queue, and no program holds it
            pass

    @pytest.mark.parametrize("exists", [False, True])
    async def test_undoing_in_another_namespace_comes_back(self, exists: bool) -> None:
        """The event loop's thread enters the namespace and comes back."""
        here = inode()
        with another_namespace() as path:
            with inside(path):
                _isolation.prepare_netns()
                bridges()
                before = old_device() if exists else {}
            name = "old0" if exists else "new0"
            task = await cancelled_when_done(aiotun.open_tap(name, netns=path, **EVERYTHING))
            with no_threads(), pytest.raises(asyncio.CancelledError):
                await task
            assert inode() == here
            with inside(path):
                assert names() == (["br0", "br1", "old0"] if exists else ["br0", "br1"])
                if exists:
                    assert changes("old0", before) == []

    async def test_from_where_there_is_no_way_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """This thread does not enter it. The queues are closed; the rest is reported."""
        here, told = inode(), []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        with another_namespace() as path:
            with inside(path):
                bridges()
                old_device()
            task = await cancelled_when_done(aiotun.open_tap("old0", netns=path, mtu=1300))

            def refuse(fd: int) -> None:
                raise PermissionError(errno.EPERM, "Operation not permitted")

            with no_threads(), monkeypatch.context() as patch:
                patch.setattr(threads, "setns_always", refuse)
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert inode() == here
            assert [type(error) for error in told] == [aiotun.NotPermittedError]
            await (await aiotun.open_tap("old0", netns=path)).aclose()  # no program holds its queue

    async def test_creating_a_persistent_device(self) -> None:
        task = await cancelled_when_done(aiotun.create_persistent("new0"))
        with no_threads(), pytest.raises(asyncio.CancelledError):
            await task
        assert names() == []

    async def test_creating_a_bridge(self) -> None:
        task = await cancelled_when_done(aiotun.create_bridge("new0"))
        with no_threads(), pytest.raises(asyncio.CancelledError):
            await task
        assert names() == []

    def test_an_opening_whose_loop_was_closed_is_undone(self) -> None:
        """No task can receive the result, so the garbage collector undoes the opening."""
        loop = asyncio.SelectorEventLoop()
        loop.set_exception_handler(lambda _, __: None)

        async def begin() -> Any:
            task = asyncio.ensure_future(aiotun.open_tun("new0")._open())
            await asyncio.sleep(0)
            return task

        task = loop.run_until_complete(begin())
        join_threads()
        loop.close()
        assert names() == ["new0"]
        with no_threads():
            del task
            gc.collect()
        assert names() == []

    def test_at_rlimit_nproc_a_cancelled_opening_is_undone(self) -> None:
        """An ordinary user in a namespace of their own, at RLIMIT_NPROC."""
        python, env = ordinary_python()
        command = [*python[:-1], "unshare", "-rn", "--", python[-1], "-W", "error", "-c"]
        done = subprocess.run(
            [*command, PROGRAM], env=env, cwd="/", capture_output=True, text=True, timeout=30
        )
        assert done.stdout.splitlines() == ["cancelled", "['lo']", "True", "11"], done.stderr
        assert done.stderr == ""


PROGRAM = """
import asyncio, os, resource, socket, threading
import aiotun

def count():
    return len(os.listdir("/proc/self/fd"))

async def main():
    async with aiotun.open_tun("new0", addresses=["10.9.0.1/24"]):
        pass
    before = count()
    task = asyncio.ensure_future(aiotun.open_tun("new0")._open())
    await asyncio.sleep(0)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        print("cancelled")
    print([name for _, name in socket.if_nameindex()])
    print(count() == before)
    try:
        await aiotun.open_tun("new0")
    except aiotun.ResourceLimitError as error:
        print(error.errno)

asyncio.run(main())
"""


class TestNoDescriptor:
    @pytest.mark.parametrize("what", [*CALLS, *ADOPTING])
    async def test_opening_raises_resource_limit_error_and_leaves_nothing(self, what: str) -> None:
        """However few are left, down to none."""
        call = (CALLS | ADOPTING)[what]
        make("old0")
        await call()  # from here on everything is imported
        clean_up()
        join_threads()
        failures = 0
        for free in range(20):
            before = open_files()
            with few_descriptors(free):
                try:
                    await call()
                except ResourceLimitError as error:
                    assert error.errno == errno.EMFILE  # noqa: PT017 - it may also succeed
                    assert "ulimit -n" in str(error)  # noqa: PT017
                    failures += 1
                else:
                    break
            join_threads()
            await wait_until(lambda before=before: open_files() == before)  # type: ignore[misc]
            assert names() == ["old0"]
        clean_up()
        assert 0 < failures < 20

    @pytest.mark.parametrize("code", ["ENFILE", "ENOMEM"])
    async def test_enfile_and_enomem_raise_resource_limit_error(
        self, code: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        number = getattr(errno, code)

        def refuse(*args: Any, **options: Any) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(ResourceLimitError) as caught:
                await aiotun.open_tun("new0")
        assert caught.value.errno == number
        assert ("fs.file-max" if code == "ENFILE" else "memory.max") in str(caught.value)

    def test_running_out_of_descriptors_while_importing_is_reported(self) -> None:
        """Importing needs descriptors, too."""
        printed = child(
            """
            import resource

            list_devices = aiotun.list_devices

            async def main():
                found = set()
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                for free in range(20):
                    lowest = os.dup(0)
                    os.close(lowest)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
                    try:
                        await list_devices()
                        found.add("done")
                    except aiotun.ResourceLimitError as error:
                        found.add(error.errno)
                    finally:
                        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                print(json.dumps(sorted(map(str, found))))

            asyncio.run(main())
            """
        )
        assert printed == [str(int(errno.EMFILE)), "done"]

    def test_a_listener_says_that_no_descriptor_is_left(self) -> None:
        """For `aiotun dump`, which shows the text alone."""
        with few_descriptors(0), pytest.raises(ListenError, match="can't listen on lo: Too"):
            Listener("lo", print)

    async def test_a_queue_for_another_process(self) -> None:
        import multiprocessing.resource_sharer  # noqa: F401 - not where no descriptor is left
        from multiprocessing.reduction import ForkingPickler

        import aiotun._queue.handover

        async with aiotun.open_tun("new0") as device:
            with few_descriptors(0), pytest.raises(ResourceLimitError, match="another process"):
                ForkingPickler.dumps(device.queues[0])


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Set RLIMIT_NOFILE to 0, as a sandbox does: poll(2) fails with EINVAL."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestALimitOfNoDescriptors:
    async def test_packets_are_sent_and_received(self) -> None:
        reported: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        async with Queue.from_fd(near.detach()) as queue:
            got: list[bytes] = []

            async def receive() -> None:
                async for packet in queue:
                    got.append(packet)  # noqa: PERF401 - the test reads it meanwhile

            receiving = asyncio.create_task(receive())
            await asyncio.sleep(0)  # it waits, so the queue has all the descriptors that it needs
            with far, no_descriptors():
                for number in range(50):  # more than the wake-ups after which a queue polls
                    far.send(b"%d" % number)
                    await wait_until(lambda: len(got) > number)  # noqa: B023 - called at once
                await queue.send(b"answer")
                assert far.recv(10) == b"answer"
            with pytest.raises(aiotun.DeviceLostError):  # the other end was closed
                await receiving
        assert got == [b"%d" % number for number in range(50)]
        assert reported == []

    async def test_events_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        turns, is_over = 0, hub.Hub._is_over

        def count(self: hub.Hub) -> bool:
            nonlocal turns
            turns += 1
            return is_over(self)

        monkeypatch.setattr(hub, "_LOOK_AROUND", 0.01)
        async with aiotun.open_tun("new0") as device, device.link.events() as events:
            monkeypatch.setattr(hub.Hub, "_is_over", count)
            with no_descriptors():
                await wait_until(lambda: turns > 2)
            await device.link.set_mtu(1400)
            assert (await anext(events)).info.mtu == 1400
