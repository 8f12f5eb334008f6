"""Stacks whose helper is killed; stacks in programs that are killed, interrupted, forbidden."""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..helpers import wait_until
from .kernel import CLONE_NEWNET, CLONE_NEWUSER, child, children_of, limited, without_unshare
from .stacks import client_of, force_mechanism
from .test_namespace_programs import gone, program, programs_with, wait_ready


@pytest.fixture(params=["tproxy", "listeners"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force_mechanism(monkeypatch, request.param)
    name: str = request.param
    return name


@pytest.fixture
def marker(request: pytest.FixtureRequest) -> str:
    return f"aiotun-{os.getpid()}-{abs(hash(request.node.nodeid))}"


def children() -> set[int]:
    return children_of(os.getpid())


def network_namespaces(pids: Iterable[int]) -> set[str]:
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return found


@contextlib.contextmanager
def held_namespaces(pids: Iterable[int]) -> Iterator[set[str]]:
    """Give the processes' network namespaces, and keep their numbers from being given to others.

    The kernel gives a freed number to the next namespace, which another worker of the tests may
    make at once.
    """
    with contextlib.ExitStack() as held:
        files = [held.enter_context(open(f"/proc/{pid}/ns/net", "rb")) for pid in pids]
        yield {f"net:[{os.fstat(file.fileno()).st_ino}]" for file in files}


def processes_in(namespaces: set[str]) -> list[str]:
    """Give the processes whose network namespace is one of these."""
    found = []
    for pid in all_processes():
        if network_namespaces([pid]) & namespaces:
            with contextlib.suppress(OSError):  # it has ended
                found.append(f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}")
    return found


def all_processes() -> list[int]:
    return [int(each.name) for each in Path("/proc").glob("[0-9]*")]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def connect_to_ports(client: aiotun.Netstack, count: int) -> None:
    for port in range(1, 1 + count):
        _, writer = await client.open_connection("192.0.2.1", port)
        writer.close()


async def answer(flow: Any) -> None:
    async for data in flow:
        await flow.send(data)


# --- The helper killed ---------------------------------------------------------------------------


async def test_a_killed_helper_ends_nothing_that_is_open(mechanism: str) -> None:
    loop = asyncio.get_running_loop()
    before = children()
    async with aiotun.new_namespace(rootless=True) as ns:
        (helper,) = children() - before
        stack = await aiotun.open_netstack(namespace=ns, intercept=True)
        await stack.intercept_tcp(echo)
        await stack.intercept_udp(answer)
        async with client_of(stack) as client:
            udp = await client.socket(type=2)
            reader, writer = await client.open_connection("192.0.2.1", 80)
            udp.connect(("192.0.2.1", 5000))

            async def both_answer() -> None:
                async with asyncio.timeout(10):
                    writer.write(b"tcp")
                    assert await reader.readexactly(3) == b"tcp"
                    await loop.sock_sendall(udp, b"udp")
                    assert await loop.sock_recv(udp, 100) == b"udp"

            await both_answer()
            os.kill(helper, signal.SIGKILL)
            await asyncio.to_thread(os.waitid, os.P_PID, helper, os.WEXITED | os.WNOWAIT)
            await both_answer()
            # A port that has a socket gets new connections, too.
            second = await client.open_connection("192.0.2.9", 80)
            second[1].write(b"more")
            assert await second[0].readexactly(4) == b"more"
            assert stack.stats.flows_open == 1

            with pytest.raises(aiotun.LinkError, match=f"pid {helper}"):
                await stack.socket(3, 3)  # no pool has one of these
            # A program joins the namespace by itself.
            assert await (await stack.create_subprocess_exec("true")).wait() == 0
            with pytest.raises(aiotun.LinkError, match=f"pid {helper}"):
                await stack.tun.link.info()

            async with asyncio.timeout(5):
                await stack.aclose()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            with pytest.raises(ConnectionResetError):
                await second[0].read()
            writer.close()
            second[1].close()
            udp.close()
    assert children() == before


async def test_a_port_that_needs_a_socket_is_refused_when_the_helper_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_mechanism(monkeypatch, "listeners")
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    before = children()
    async with aiotun.new_namespace(rootless=True) as ns:
        (helper,) = children() - before
        async with aiotun.open_netstack(namespace=ns, intercept=True) as stack:
            await stack.intercept_tcp(echo)
            async with client_of(stack) as client:
                os.kill(helper, signal.SIGKILL)
                await asyncio.to_thread(os.waitid, os.P_PID, helper, os.WEXITED | os.WNOWAIT)
                async with asyncio.timeout(20):
                    with pytest.raises(ConnectionRefusedError):
                        await connect_to_ports(client, 500)  # a pool may have sockets left
            assert stack.stats.connections_refused >= 1
    assert [type(each["exception"]) for each in reported] == [aiotun.LinkError]
    assert f"pid {helper}" in str(reported[0]["exception"])


# --- The program killed --------------------------------------------------------------------------

_SERVES = """
async def handle(reader, writer):
    await reader.read()

async def main():
    async with (
        aiotun.new_namespace(rootless=True) as ns,
        aiotun.open_netstack(namespace=ns, intercept=True) as stack,
        aiotun.open_netstack(addresses=["10.77.0.2/24"]) as client,
    ):
        moving = asyncio.create_task(aiotun.relay(stack.tun, client.tun))
        await stack.intercept_tcp(handle)
        await stack.intercept_udp(handle)
        reader, writer = await client.open_connection("192.0.2.1", 80)
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_program_leaves_no_helper_and_no_namespace(
    marker: str, mechanism: str
) -> None:
    with program(_SERVES, marker) as process:
        await asyncio.to_thread(wait_ready, process)
        ours = network_namespaces([os.getpid()])
        pids = programs_with(marker)
        with held_namespaces(pids) as theirs:
            made = theirs - ours
            assert made
            process.kill()
            await asyncio.to_thread(process.wait)
            await gone(marker)
            # A process that is ending has no environment any more, but its namespace still.
            with contextlib.suppress(TimeoutError):
                await wait_until(lambda: processes_in(made) == [])
            assert processes_in(made) == []


# --- Interrupted ---------------------------------------------------------------------------------

_OPENS = """
async def handle(reader, writer):
    writer.write(await reader.read(100))
    writer.close()

async def main():
    print("ready", flush=True)
    while True:
        async with (
            aiotun.open_netstack(intercept=True) as stack,
            aiotun.open_netstack(addresses=["10.77.0.2/24"]) as client,
        ):
            moving = asyncio.create_task(aiotun.relay(stack.tun, client.tun))
            await stack.intercept_tcp(handle, admit=lambda local, peer: True)
            for port in range(20):
                reader, writer = await client.open_connection("192.0.2.1", 80 + port)
                writer.write(b"hello")
                assert await reader.read() == b"hello"
                writer.close()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("moment", range(10))
async def test_ctrl_c_at_any_moment_leaves_nothing(
    marker: str, moment: int, mechanism: str
) -> None:
    with program(_OPENS, marker) as process:
        await asyncio.to_thread(wait_ready, process)
        # The moment is what the test is about: opening, serving, closing, opening again.
        await asyncio.sleep(moment * 0.021)
        os.killpg(process.pid, signal.SIGINT)
        out, err = await asyncio.to_thread(process.communicate, None, 20)
        assert (out, err, process.returncode) == ("interrupted\n", "", 0)
        await gone(marker)


# --- Forbidden -----------------------------------------------------------------------------------

_WITHOUT_CAPABILITIES = ["setpriv", "--bounding-set=-sys_admin,-net_admin"]


@pytest.mark.parametrize(
    ("prefix", "code", "words"),
    [
        (limited("max_user_namespaces", 0), errno.ENOSPC, ["user.max_user_namespaces = 0"]),
        (limited("max_net_namespaces", 0), errno.ENOSPC, ["user.max_net_namespaces = 0"]),
        (without_unshare(CLONE_NEWUSER), errno.EPERM, ["seccomp", "forbids user namespaces"]),
        (without_unshare(CLONE_NEWNET), errno.EPERM, ["forbids capabilities"]),
        (["setpriv", "--bounding-set=-setfcap"], errno.EPERM, ["CAP_SETFCAP", "--cap-add"]),
    ],
    ids=["no user namespaces", "no network namespaces", "seccomp", "no capabilities", "no setfcap"],
)
def test_a_stack_says_what_forbids_namespaces(prefix: Any, code: int, words: Any) -> None:
    said = child(
        """
        async def main():
            try:
                async with aiotun.open_netstack():
                    pass
            except aiotun.NotPermittedError as error:
                print(json.dumps([error.errno, str(error)]))
            else:
                print(json.dumps(None))

        asyncio.run(main())
        """,
        prefix=[*prefix, *_WITHOUT_CAPABILITIES],
    )
    assert said is not None, "it was allowed"
    assert said[0] == code, said
    for word in words:
        assert word in said[1]
