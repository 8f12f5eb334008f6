"""``napi="threaded"``: the kernel receives what is sent here in a thread of its own."""

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun import DeviceMismatchError, LinkError, NotPermittedError
from aiotun._kernel import napi
from aiotun._kernel.abi import Iff

from ..helpers import ip, need, ordinary_python
from .kernel import another_namespace, child, inside, make, names, ordinary_child, tun_flags
from .rig import udp

LOOK = "mount -t sysfs none /mnt && cat /mnt/class/net/{}/threaded"


def threaded(name: str, netns: str = "/proc/self/ns/net") -> bool:
    """What sysfs says, mounted in that namespace."""
    said = inside(netns, "unshare", "-m", "sh", "-c", LOOK.format(name))
    return {"0": False, "1": True}[said.strip()]


def mounts() -> dict[str, str]:
    """What each thread of this program sees."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found[task.name] = (task / "mountinfo").read_text()
    return found


@pytest.mark.parametrize("opener", [aiotun.open_tun, aiotun.open_tap])
async def test_a_new_device_has_threads_and_the_program_sees_no_mount(
    opener: Callable[..., "aiotun.device.Opener[Any]"],
) -> None:
    namespace, before = os.readlink("/proc/self/ns/mnt"), mounts()
    ours = before[str(os.getpid())]
    async with opener("h0", napi="threaded", queues=2):
        assert tun_flags("h0") & Iff.NAPI
        assert threaded("h0")
        assert os.readlink("/proc/self/ns/mnt") == namespace
        # A thread of pytest-xdist has other mounts all the time: see `unshare_run`.
        assert all(seen == before.get(task, ours) for task, seen in mounts().items())
    async with opener("h0", napi=True):
        assert not threaded("h0")


@pytest.mark.parametrize("offload", ["off", "split"])
async def test_packets_reach_a_socket_in_order(offload: Any) -> None:
    async with aiotun.open_tun(
        "h0", addresses=["10.9.0.1/24"], napi="threaded", offload=offload
    ) as tun:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("10.9.0.1", 0))
            sock.setblocking(False)
            port = sock.getsockname()[1]
            packets = [udp("10.9.0.2", 9, "10.9.0.1", port, bytes([each])) for each in range(100)]
            assert await tun.send_many(packets) == 100
            loop = asyncio.get_running_loop()
            got = [await asyncio.wait_for(loop.sock_recv(sock, 10), 5) for _ in packets]
            assert got == [bytes([each]) for each in range(100)]


OPENED = """
import asyncio, aiotun
async def main():
    async with aiotun.open_tun("h0", napi="threaded"):
        print("opened")
asyncio.run(main())
"""


@pytest.mark.parametrize("then", [":", "mount -o remount,bind,ro /sys"])
def test_where_sys_shows_this_namespace_already_as_in_a_container(then: str) -> None:
    script = f'mount -t sysfs sysfs /sys && {then} && exec "$@"'
    words = ("unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", OPENED)
    assert inside("/proc/self/ns/net", *words) == "opened\n"


async def test_in_another_namespace() -> None:
    with another_namespace() as there:
        async with aiotun.open_tun("h0", netns=there, napi="threaded"):
            assert threaded("h0", there)
            assert names() == []


@pytest.mark.parametrize("rootless", [True, False])
async def test_in_a_private_namespace(rootless: bool) -> None:
    async with aiotun.new_namespace(rootless=rootless) as ns:
        for name in ("h0", "h1"):  # the helper mounts once
            async with aiotun.open_tun(name, netns=ns, napi="threaded"):
                process = await ns.create_subprocess_exec(
                    "cat", f"/sys/class/net/{name}/threaded", stdout=asyncio.subprocess.PIPE
                )
                assert (await process.communicate())[0] == b"1\n"


CODE = """
async def main():
    async with aiotun.new_namespace(rootless=True) as ns:
        async with aiotun.open_tun("h0", netns=ns, napi="threaded"):
            process = await ns.create_subprocess_shell(
                "cat /sys/class/net/h0/threaded; id -u; grep CapEff /proc/self/status",
                stdout=asyncio.subprocess.PIPE,
            )
            said = (await process.communicate())[0].decode().split()
            print(json.dumps([said[0], int(said[1]) == os.getuid(), int(said[3], 16)]))
asyncio.run(main())
"""


def test_an_ordinary_user_has_them_in_a_namespace_of_its_own() -> None:
    """And a program inside is the same user, without capabilities."""
    ordinary_python()  # skips the test where this can't be tried
    assert ordinary_child(CODE) == ["1", True, 0]


@pytest.mark.parametrize("before", [False, True])
async def test_a_step_that_fails_puts_them_back(before: bool) -> None:
    make("h0")
    ip("link", "set", "h0", "up")
    async with aiotun.open_tun("h0", napi="threaded" if before else True):
        assert threaded("h0") == before
    with pytest.raises(LinkError):
        await aiotun.open_tun("h0", napi="threaded", routes=["10.90.0.0/16 via 192.0.2.1"])
    async with aiotun.open_tun("h0", napi=True):
        assert threaded("h0") == before


@pytest.mark.parametrize("existing", [False, True])
def test_without_the_right_to_mount_it_is_refused_and_nothing_is_left(existing: bool) -> None:
    if existing:
        make("h0")
    before = names()
    drop = [need("setpriv"), "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    said = child("attempt(aiotun.open_tun('h0', napi='threaded'))", prefix=drop)
    assert (said["class"], said["errno"]) == ("NotPermittedError", errno.EPERM)
    assert "CAP_SYS_ADMIN" in said["strerror"]
    assert said["filename"] == "h0"
    assert names() == before


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, DeviceMismatchError),
        (errno.EOPNOTSUPP, DeviceMismatchError),
        (errno.EROFS, NotPermittedError),
        (errno.EIO, LinkError),
        (errno.EMFILE, aiotun.ResourceLimitError),
    ],
)
async def test_a_kernel_without_it(
    code: int, kind: type[aiotun.AiotunError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(napi, "_open", refuse)
    with pytest.raises(kind) as caught:
        await aiotun.open_tun("h0", napi="threaded")
    assert getattr(caught.value, "errno", None) == code
    assert names() == []


async def test_a_device_that_moves_keeps_its_threads() -> None:
    with another_namespace() as there:
        async with aiotun.open_tun("h0", napi="threaded") as tun:
            await tun.link.move_to_netns(there)
            assert threaded("h0", there)
