"""Short-lived threads and their results, also if no task waits for them any more."""

import asyncio
import contextlib
import errno
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from aiotun._kernel import namespaces, threads
from aiotun.errors import LinkError, NotPermittedError, ResourceLimitError

from . import _isolation
from .helpers import wait_until


def inode() -> int:
    """The inode of the calling thread's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def join_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "aiotun":
            thread.join(5)
            assert not thread.is_alive()


@pytest.fixture
def elsewhere(netns: int) -> Iterator[int]:
    """The fd of a network namespace that no thread is in."""
    _isolation.unshare_netns()
    try:
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        _isolation.setns(netns)
    try:
        yield fd
    finally:
        os.close(fd)


class Gate:
    """A function that waits in its thread until the test releases it."""

    def __init__(self) -> None:
        self.entered, self.going_on = threading.Event(), threading.Event()
        self.undone: list[str] = []
        self.told = 0

    def __call__(self) -> str:
        self.entered.set()
        assert self.going_on.wait(5)
        return "value"

    def fail(self) -> str:
        self()
        raise KeyError("in the thread")

    def tell(self) -> None:
        self.told += 1

    def undo(self, value: str) -> None:
        assert threading.current_thread().name == "aiotun"
        self.undone.append(value)

    async def task(
        self, function: Callable[[], str] | None = None, netns: int | None = None
    ) -> asyncio.Task[str]:
        """Start a task that waits for the function; returns when the function runs."""
        run = threads.run(function or self, netns, on_cancel=self.tell, undo=self.undo)
        task = asyncio.create_task(run)
        await wait_until(self.entered.is_set)
        return task


class TestRun:
    async def test_run_returns_the_result_of_another_thread(self) -> None:
        assert await threads.run(lambda: 7) == 7
        assert await threads.run(threading.get_ident) != threading.get_ident()

    async def test_run_raises_the_threads_error_with_its_traceback(self) -> None:
        def fail() -> None:
            raise KeyError("in the thread")

        with pytest.raises(KeyError, match="in the thread") as caught:
            await threads.run(fail)
        assert caught.traceback[-1].name == "fail"

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
    async def test_an_error_that_would_end_a_thread(self, kind: type[BaseException]) -> None:
        """It is raised here, like any other error; the thread prints nothing."""

        def fail() -> None:
            raise kind

        caught = None
        try:
            await threads.run(fail)
        except BaseException as error:  # noqa: BLE001 - pytest would take it for its own
            caught = error
        assert type(caught) is kind

    async def test_an_error_goes_with_its_last_user(self) -> None:
        """The error and its frames must not form a cycle that waits for the garbage collector."""

        class Held:
            def __del__(self) -> None:
                gone.append(True)

        gone: list[bool] = []

        def fail(held: Held) -> None:
            raise KeyError

        held = Held()
        with contextlib.suppress(KeyError):
            await threads.run(lambda held=held: fail(held))  # type: ignore[misc]
        del held
        join_threads()  # an ending thread still refers to its function
        assert gone == [True]

    async def test_the_loop_goes_on_meanwhile(self) -> None:
        gate = Gate()
        task = await gate.task()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        gate.going_on.set()
        assert await task == "value"
        assert (gate.told, gate.undone) == (0, [])

    async def test_many_threads_run_at_once(self) -> None:
        barrier = threading.Barrier(20)
        results = await asyncio.gather(
            *(threads.run(lambda n=n: (barrier.wait(5), n)[1]) for n in range(20))  # type: ignore[misc]
        )
        assert results == list(range(20))


class TestCancelling:
    async def test_cancelling_waits_for_the_thread_and_undoes(self) -> None:
        gate = Gate()
        task = await gate.task()
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert (task.done(), gate.told, gate.undone) == (False, 1, [])
        gate.going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (gate.told, gate.undone) == (1, ["value"])

    async def test_the_last_message_comes_through(self) -> None:
        gate = Gate()
        task = await gate.task()
        task.cancel("because")
        gate.going_on.set()
        with pytest.raises(asyncio.CancelledError, match="because"):
            await task

    async def test_cancelling_again_still_waits_for_the_thread(self) -> None:
        gate = Gate()
        task = await gate.task()
        for number in range(1, 4):
            task.cancel()
            await wait_until(lambda number=number: gate.told == number)  # type: ignore[misc]
            assert not task.done()
        gate.going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.undone == ["value"]

    async def test_cancelling_while_it_undoes_finishes_the_undoing(self) -> None:
        """It runs exactly once."""
        undoing, going_on = threading.Event(), threading.Event()
        undone = []

        def undo(value: str) -> None:
            undoing.set()
            assert going_on.wait(5)
            undone.append(value)

        gate = Gate()
        task = asyncio.create_task(threads.run(gate, undo=undo))
        await wait_until(gate.entered.is_set)
        task.cancel()
        gate.going_on.set()
        await wait_until(undoing.is_set)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert undone == ["value"]

    async def test_after_an_error_there_is_nothing_to_undo(self) -> None:
        gate = Gate()
        task = await gate.task(gate.fail)
        task.cancel()
        await wait_until(lambda: gate.told == 1)
        gate.going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.undone == []

    async def test_with_the_result_in_the_same_turn(self) -> None:
        """The cancellation comes after the thread's report, before the task sees it."""
        gate = Gate()
        task = await gate.task()
        gate.going_on.set()
        # Don't let the loop turn: the report is queued in it.
        join_threads()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.undone == ["value"]

    async def test_cancelling_without_undo_drops_the_result(self) -> None:
        gate = Gate()
        task = asyncio.create_task(threads.run(gate))
        await wait_until(gate.entered.is_set)
        task.cancel()
        gate.going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_undoing_is_in_the_same_namespace(self, elsewhere: int) -> None:
        gate = Gate()
        where = []
        task = asyncio.create_task(
            threads.run(gate, elsewhere, undo=lambda _: where.append(inode()))
        )
        await wait_until(gate.entered.is_set)
        task.cancel()
        gate.going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert where == [os.fstat(elsewhere).st_ino]

    async def test_a_timeout_waits_for_the_thread_and_undoes(self) -> None:
        gate = Gate()
        asyncio.get_running_loop().call_later(0.05, gate.going_on.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await threads.run(gate, undo=gate.undo)
        assert gate.undone == ["value"]


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.mark.parametrize("kind", LOOPS)
class TestLoopClosed:
    @contextlib.contextmanager
    def abandoned(self, kind: str, gate: Gate, *, cancel: bool = False) -> Iterator[None]:
        """Run until the function is running. The loop is closed at the end of the block."""
        loop = LOOPS[kind]()
        # The loop reports a pending task that was destroyed; here that is on purpose.
        loop.set_exception_handler(lambda _, __: None)
        try:
            task = loop.run_until_complete(gate.task())
            if cancel:
                task.cancel()
                loop.run_until_complete(asyncio.sleep(0))
            yield
        finally:
            loop.close()
        assert not task.done()

    @pytest.mark.parametrize("cancel", [False, True])
    def test_before_the_thread_is_done(self, kind: str, cancel: bool) -> None:
        gate = Gate()
        with self.abandoned(kind, gate, cancel=cancel):
            pass
        gate.going_on.set()
        join_threads()
        assert gate.undone == ["value"]

    @pytest.mark.parametrize("cancel", [False, True])
    def test_after_the_thread_is_done(self, kind: str, cancel: bool) -> None:
        """It has told the loop, which never ran again, so no task has the value."""
        gate = Gate()
        with self.abandoned(kind, gate, cancel=cancel):
            gate.going_on.set()
            join_threads()
        gc.collect()
        join_threads()
        assert gate.undone == ["value"]

    def test_an_error_after_the_loop_closed_is_dropped(self, kind: str) -> None:
        gate = Gate()
        loop = LOOPS[kind]()
        loop.set_exception_handler(lambda _, __: None)
        try:
            loop.run_until_complete(gate.task(gate.fail))
        finally:
            loop.close()
        gate.going_on.set()
        join_threads()
        assert gate.undone == []


class TestRunIn:
    async def test_in_a_namespace_as_users_name_one(self, elsewhere: int) -> None:
        here = inode()
        assert await threads.run_in(None, inode) == here
        path = f"/proc/self/fd/{elsewhere}"
        for netns in (elsewhere, path, Path(path)):
            assert await threads.run_in(netns, inode) == os.fstat(elsewhere).st_ino
        assert inode() == here

    @pytest.mark.parametrize("told", [False, True])
    @pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
    def test_undoing_after_the_loop_closed_is_there_too(
        self, kind: str, told: bool, elsewhere: int
    ) -> None:
        """Whether the thread has told the loop or not. The namespace is held open until then."""
        gate, where = Gate(), []

        async def begin() -> asyncio.Task[str]:
            running = threads.run_in(elsewhere, gate, undo=lambda _: where.append(inode()))
            task = asyncio.create_task(running)
            await wait_until(gate.entered.is_set)
            return task

        loop = LOOPS[kind]()
        loop.set_exception_handler(lambda _, __: None)
        try:
            task = loop.run_until_complete(begin())
            if told:
                gate.going_on.set()
                join_threads()
        finally:
            loop.close()
        assert not task.done()
        del task
        gc.collect()
        gate.going_on.set()
        join_threads()
        assert where == [os.fstat(elsewhere).st_ino]


class TestNamespace:
    async def test_only_the_thread_enters(self, elsewhere: int) -> None:
        here = inode()
        assert await threads.run(inode, elsewhere) == os.fstat(elsewhere).st_ino != here
        assert inode() == here
        assert await threads.run(inode) == here

    async def test_this_thread_stays_while_it_runs(self, elsewhere: int) -> None:
        here, gate = inode(), Gate()
        task = await gate.task(netns=elsewhere)
        assert inode() == here
        gate.going_on.set()
        await task

    def test_run_blocking_enters_the_namespace_and_this_thread_stays(self, elsewhere: int) -> None:
        here = inode()
        assert threads.run_blocking(inode, elsewhere) == os.fstat(elsewhere).st_ino
        assert inode() == here

    @pytest.mark.parametrize("name", ["missing", "/missing/path", Path("/missing/path")])
    def test_a_missing_namespace_names_ip_netns_add(self, name: str | Path) -> None:
        with pytest.raises(LinkError, match="ip netns add") as caught:
            namespaces.open_netns(name)
        path = "/run/netns/missing" if name == "missing" else "/missing/path"
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, path)

    @pytest.mark.parametrize("path", ["/", "/dev/null", "/proc/self/status", "/proc/self/fd"])
    def test_a_path_that_is_no_namespace_is_refused_when_it_is_opened(self, path: str) -> None:
        with pytest.raises(LinkError, match=f"^.*{path} is not a network namespace") as caught:
            namespaces.open_netns(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, path)

    async def test_an_fd_that_is_no_namespace_is_refused(self) -> None:
        with open("/dev/null") as file:  # noqa: ASYNC230 - never blocks
            with pytest.raises(LinkError, match="not a network namespace"):
                await threads.run(inode, file.fileno())
            with pytest.raises(LinkError, match="not a network namespace"):
                threads.run_blocking(inode, file.fileno())

    async def test_a_namespace_of_another_kind(self) -> None:
        fd = os.open("/proc/thread-self/ns/uts", os.O_RDONLY)
        try:
            with pytest.raises((LinkError, NotPermittedError)):
                await threads.run(inode, fd)
        finally:
            os.close(fd)

    def test_an_fd_is_duplicated(self, elsewhere: int) -> None:
        namespace = namespaces.NamespaceFd(namespaces.open_netns(elsewhere))
        assert namespace.fd != elsewhere
        assert not os.get_inheritable(namespace.fd)
        assert os.fstat(namespace.fd).st_ino == os.fstat(elsewhere).st_ino
        fd = namespace.fd
        del namespace
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        os.fstat(elsewhere)

    def test_open_netns_without_a_name_opens_the_own_namespace(self) -> None:
        namespace = namespaces.NamespaceFd(namespaces.open_netns(None))
        assert os.fstat(namespace.fd).st_ino == inode()


class TestBlocking:
    def test_run_blocking_returns_the_result_of_another_thread(self) -> None:
        assert threads.run_blocking(lambda: 7) == 7
        assert threads.run_blocking(threading.get_ident) != threading.get_ident()

    def test_run_blocking_raises_the_threads_error(self) -> None:
        def fail() -> None:
            raise KeyError("in the thread")

        with pytest.raises(KeyError, match="in the thread"):
            threads.run_blocking(fail)

    def test_run_blocking_needs_and_makes_no_loop(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            with pytest.raises(RuntimeError):
                threads.run_blocking(asyncio.get_running_loop)


class TestStart:
    def test_one_after_the_other_in_one_thread(self) -> None:
        seen: list[tuple[str, int]] = []
        threads.start(
            lambda: seen.append(("first", threading.get_ident())),
            lambda: seen.append(("then", threading.get_ident())),
        )
        join_threads()
        assert [name for name, _ in seen] == ["first", "then"]
        assert len({ident for _, ident in seen}) == 1
        assert seen[0][1] != threading.get_ident()

    def test_start_does_not_wait(self) -> None:
        gate, done = Gate(), threading.Event()

        def first() -> None:
            gate()

        threads.start(first, done.set)
        assert gate.entered.wait(5)
        assert not done.is_set()
        gate.going_on.set()
        assert done.wait(5)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_then_comes_also_after_an_error(self) -> None:
        done = threading.Event()

        def fail() -> None:
            raise KeyError

        threads.start(fail, done.set)
        assert done.wait(5)
        join_threads()

    def test_the_interpreter_waits_for_it(self) -> None:
        gate = Gate()

        def first() -> None:
            gate()

        threads.start(first, lambda: None)
        (thread,) = (each for each in threading.enumerate() if each.name == "aiotun")
        assert not thread.daemon
        gate.going_on.set()
        join_threads()

    def test_where_no_thread_can_be_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        seen: list[str] = []
        threads.start(lambda: seen.append("first"), lambda: seen.append("then"))
        assert seen == ["first", "then"]


async def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task gets the error and does not wait for ever."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceLimitError, match="no new thread can be started"):
            await asyncio.wait_for(threads.run(lambda: 7), 5)
