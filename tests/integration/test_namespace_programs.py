"""Namespaces in programs of their own: an ordinary user, killed, interrupted, short of fds."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ..helpers import ordinary_python, wait_until
from .kernel import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    child,
    limited,
    ordinary_child,
    with_node,
    without_unshare,
)

LOOPS = ["asyncio.SelectorEventLoop", "__import__('uvloop').new_event_loop"]


def programs_with(marker: str) -> list[int]:
    """The processes that have this in their environment, or command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            if marker.encode() in said and (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


async def gone(marker: str) -> None:
    await wait_until(lambda: programs_with(marker) == [], timeout=1.0)


@contextlib.contextmanager
def program(code: str, marker: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program that has the marker in its environment, in a session of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", "import asyncio, os, aiotun\n" + textwrap.dedent(code)],
        env={**os.environ, "MARKER": marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in programs_with(marker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def marker(request: pytest.FixtureRequest) -> str:
    return f"aiotun-{os.getpid()}-{abs(hash(request.node.nodeid))}"


# --- An ordinary user ----------------------------------------------------------------------------

_EVERYTHING = """
import socket, subprocess

async def main():
    said = {}
    async with aiotun.new_namespace() as ns:
        said["rootless"] = ns.rootless
        async with aiotun.open_tun(
            "tun0", netns=ns, addresses=["10.0.0.1/24"], routes=["default"], offload="split"
        ) as tun, tun.link.events() as events:
            sock = await ns.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.sendto(b"out", ("192.0.2.1", 9))
            async for packet in tun:
                if packet[0] >> 4 == 4:
                    said["dst"] = str(aiotun.IPHeader(packet).dst)
                    break
            sock.close()
            await tun.link.rename("tun9")
            said["event"] = (await anext(events)).kind
            async with aiotun.new_namespace() as other:
                await tun.link.move_to_netns(other)
                said["moved"] = [each.name for each in await aiotun.list_devices(netns=other)]
        await aiotun.create_bridge("br0", netns=ns)
        async with aiotun.open_tap("tap0", netns=ns, bridge="br0") as tap:
            said["master"] = (await tap.link.info()).master
        low = await ns.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 80)
        said["port"] = low.sockets[0].getsockname()[1]
        low.close()
        await low.wait_closed()
        process = await ns.create_subprocess_shell(
            "id -u; grep CapEff /proc/self/status | cut -f2; ls /sys/class/net; "
            "cat /etc/resolv.conf; ping -n -c1 127.0.0.1 | grep -o '1 received'",
            stdout=subprocess.PIPE, resolv_conf="nameserver 192.0.2.53\\n",
        )
        out, _ = await process.communicate()
        said["program"] = out.decode().splitlines()
    print(json.dumps(said))

with asyncio.Runner(loop_factory=LOOP) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_an_ordinary_user_can_do_all_of_it(loop: str) -> None:
    ordinary_python()  # skips where there is nobody else to be
    said = ordinary_child(_EVERYTHING.replace("LOOP", loop))
    assert said == {
        "rootless": True,
        "dst": "192.0.2.1",
        "event": "renamed",
        "moved": ["tun9"],
        "master": "br0",
        "port": 80,
        "program": [
            "65534", "0000000000000000", "br0", "lo", "nameserver 192.0.2.53", "1 received",
        ],
    }  # fmt: skip


# --- The end of the program ----------------------------------------------------------------------

_HOLDS = """
async def main():
    ns = await aiotun.new_namespace(rootless=True)
    tun = await aiotun.open_tun("tun0", netns=ns)
    {more}
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()


@pytest.mark.parametrize(
    "more",
    [
        "pass",
        # A child that goes on living must not keep the helper.
        "os.fork() or os.execvp('sh', ['sh', '-c', 'exec env -u MARKER sleep 20 >/dev/null 2>&1'])",
    ],
    ids=["alone", "with a child"],
)
async def test_a_killed_program_leaves_nothing_within_a_second(marker: str, more: str) -> None:
    with program(_HOLDS.format(more=more), marker) as process:
        await asyncio.to_thread(wait_ready, process)
        assert len(programs_with(marker)) >= 2
        process.kill()
        await asyncio.to_thread(process.wait)
        await gone(marker)


async def test_a_fork_that_lives_on_does_not_keep_the_helper(marker: str) -> None:
    more = "pid = os.fork()\n    if pid == 0:\n        import time; time.sleep(30); os._exit(0)"
    with program(_HOLDS.format(more=more), marker) as process:
        await asyncio.to_thread(wait_ready, process)
        # Other programs on this machine may have helpers, too.
        (helper,) = {*programs_with("aiotun-namespace")} & {*programs_with(marker)}
        process.kill()
        await asyncio.to_thread(process.wait)
        await wait_until(lambda: not is_alive(helper), timeout=1.0)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


_MAKES = """
async def main():
    print("ready", flush=True)
    while True:
        async with aiotun.new_namespace(rootless=True) as ns:
            (await ns.socket()).close()
            await (await ns.create_subprocess_exec("true")).wait()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("moment", range(10))
async def test_ctrl_c_at_any_moment_leaves_nothing(marker: str, moment: int) -> None:
    with program(_MAKES, marker) as process:
        await asyncio.to_thread(wait_ready, process)
        # The moment is what the test is about: from before the first step to the third namespace.
        await asyncio.sleep(moment * 0.013)
        os.killpg(process.pid, signal.SIGINT)
        out, err = await asyncio.to_thread(process.communicate, None, 20)
        assert (out, err, process.returncode) == ("interrupted\n", "", 0)
        await gone(marker)


# --- Short of file descriptors -------------------------------------------------------------------


def test_at_the_limit_of_descriptors_it_is_an_error_and_works_again_afterwards() -> None:
    said = child(
        """
        import errno, resource, socket

        async def main():
            async with aiotun.new_namespace(rootless=True) as ns:
                (await ns.socket()).close()
                udp = [await ns.socket(type=socket.SOCK_DGRAM) for _ in range(2)]  # fills a pool
                before = len(os.listdir("/proc/self/fd"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (before + 10, 4096))
                held = []
                try:
                    while True:
                        held.append(await ns.socket())
                except OSError as error:
                    code = error.errno
                for sock in held:
                    sock.close()
                again = await ns.socket()
                again.close()
                tun = await aiotun.open_tun("tun0", netns=ns)
                await tun.aclose()
                for sock in udp:
                    sock.close()
            print(json.dumps([code == errno.EMFILE, len(held) >= 8]))

        asyncio.run(main())
        """
    )
    assert said == [True, True]


# --- Without an interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_a_frozen_program_forks(loop: str) -> None:
    said = child(
        f"""
        import subprocess, threading

        sys.frozen = True
        threading.Thread(target=threading.Event().wait, daemon=True).start()

        async def main():
            async with aiotun.new_namespace(rootless=True) as ns:
                async with aiotun.open_tun("tun0", netns=ns) as tun:
                    with open(f"/proc/self/task/{{os.getpid()}}/children") as file:
                        (helper,) = file.read().split() or [0]
                    fds = len(os.listdir(f"/proc/{{helper}}/fd"))
                    process = await ns.create_subprocess_exec(
                        "ls", "/sys/class/net", stdout=subprocess.PIPE)
                    out, _ = await process.communicate()
                try:
                    await ns.create_subprocess_exec("/no/such/program")
                except FileNotFoundError:
                    missing = True
            print(json.dumps([tun.name, out.decode().split(), fds, missing]))

        with asyncio.Runner(loop_factory={loop}) as runner:
            runner.run(main())
        """
    )
    assert said == ["tun0", ["lo", "tun0"], 5, True]


# --- Forbidden -----------------------------------------------------------------------------------

_TRY = """
async def main():
    try:
        async with aiotun.new_namespace(rootless=True) as ns:
            pass
    except aiotun.NotPermittedError as error:
        print(json.dumps([error.errno, error.strerror]))
    else:
        print(json.dumps(None))

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["user", "net"])
def test_a_limit_of_none_is_told(kind: str) -> None:
    code, said = child(_TRY, prefix=limited(f"max_{kind}_namespaces", 0))
    assert code == 28  # ENOSPC
    assert f"user.max_{kind}_namespaces = 0 allows no" in said
    assert f"sysctl -w user.max_{kind}_namespaces=10000" in said


def test_a_limit_that_is_used_up_is_told() -> None:
    in_use = 'unshare -U sleep 30 & while [ ! -e /tmp/none ] && [ "$(readlink /proc/$!/ns/user)" '
    in_use += '= "$(readlink /proc/self/ns/user)" ]; do :; done; '
    script = f'echo 1 >/proc/sys/user/max_user_namespaces && {in_use} "$@"; kill $!'
    code, said = child(_TRY, prefix=["unshare", "-Ur", "sh", "-c", script, "sh"])
    assert code == 28
    assert "user.max_user_namespaces = 1" in said
    assert "used up" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (CLONE_NEWUSER, ["a seccomp filter forbids user namespaces", "--security-opt"]),
        (CLONE_NEWNET, ["forbids capabilities in user namespaces", "dmesg"]),
    ],
    ids=["user", "net"],
)
def test_a_seccomp_filter_is_told(flags: int, words: Sequence[str]) -> None:
    code, said = child(_TRY, prefix=without_unshare(flags))
    assert code == 1
    for word in words:
        assert word in said


def test_a_chroot_is_told() -> None:
    script = 'mount --rbind / /mnt && exec chroot /mnt "$@"'
    prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    code, said = child(_TRY, prefix=prefix)
    assert (code, "after a chroot" in said) == (1, True)


_OPEN = """
async def main():
    async with aiotun.new_namespace() as ns:
        try:
            await opened(aiotun.open_tun("tun0", netns=ns))
        except aiotun.AiotunError as error:
            print(json.dumps([type(error).__name__, error.errno, error.strerror]))

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("how", "kind", "word"),
    [
        ("none", "TunUnavailableError", "modprobe tun"),
        ("closed", "NotPermittedError", "chmod 0666"),
        ("nodev", "NotPermittedError", "nodev"),
    ],
)
def test_a_node_that_is_missing_or_closed_is_told(how: str, kind: str, word: str) -> None:
    ordinary_python()
    said = ordinary_child(_OPEN, prefix=with_node(how))
    assert said[0] == kind
    assert word in said[2]
