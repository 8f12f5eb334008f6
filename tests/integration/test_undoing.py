"""An opening that fails or is cancelled leaves everything as it was.

The harness checks after every test that no fd and no thread is left.
"""

import asyncio
import contextlib
import errno
import fcntl
import functools
import gc
import json
import os
import random
import resource
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

import aiotun
from aiotun._kernel import ioctl
from aiotun._kernel.abi import Iff, Ioctl
from aiotun._link.session import Session

from .. import _isolation
from .._leaks import LeakCheck
from ..helpers import REAL_ROOT, ip
from .kernel import (
    addresses,
    another_namespace,
    ask,
    changes,
    child,
    held,
    inside,
    is_up,
    link,
    make,
    names,
    routes,
    state,
    tun_data,
)

# The state before: a bridge to leave, a bridge to join, and a device with a configuration.
OLD_ADDRESSES = ["10.8.0.1/24", "10.8.0.2/24", "fd08::1/64"]
OLD_ROUTES = ["10.80.0.0/16 via 10.8.0.9 metric 7", "10.81.0.0/16", "fd80::/64 via fd08::9"]

# Every option that is undone, each with a value that differs from before.
EVERYTHING: dict[str, Any] = {
    "addresses": ["10.8.0.3/24", "10.9.0.1/24", "10.9.1.1 peer 10.9.1.2/32", "fd09::1/64"],
    "routes": ["10.90.0.0/16 via 10.9.0.9", "10.80.0.0/16 metric 8", "fd90::/64", "default"],
    "mtu": 1300,
    "txqueuelen": 33,
    "gso_max_segs": 45,
    "gso_max_size": 60_000,
    "mac": "02:00:00:00:00:99",
    "bridge": "br1",
    "sndbuf": 100_000,
    "carrier": True,
}


def bridges() -> None:
    for name in ("br0", "br1"):
        ip("link", "add", name, "type", "bridge")


def old_device(name: str = "old0", *, up: bool = True, multi_queue: bool = False) -> dict[str, Any]:
    """Make a persistent TAP with a configuration, and return its state."""
    make(name, "tap", *(["multi_queue"] if multi_queue else []))
    ip("link", "set", name, "address", "02:00:00:00:00:08", "mtu", "1480", "txqueuelen", "88")
    ip("link", "set", name, "gso_max_segs", "77", "gso_max_size", "65000")
    if up:
        ip("link", "set", name, "up")
        for address in OLD_ADDRESSES:
            nodad = ["nodad"] if ":" in address else []
            ip("addr", "add", address, "dev", name, *nodad)
        for route in OLD_ROUTES:
            family = "-6" if ":" in route else "-4"
            ip(family, "route", "add", *route.split(), "dev", name)
        ip("link", "set", name, "master", "br0")
    return state(name)


def open_files() -> Counter[str]:
    """Count this process's open files by their target, not by number."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the fd that listed the folder
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return found


def join_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "aiotun":
            thread.join(5)
            assert not thread.is_alive()


# --- Steps that fail -----------------------------------------------------------------------------

# Each with the kernel's errno. The first steps succeed before one fails.
FAILING: dict[str, tuple[dict[str, Any], int]] = {
    "missing bridge": ({"bridge": "nobridge0"}, errno.ENODEV),
    # The kernel removes it from its old bridge before it finds that out.
    "no bridge": ({"bridge": "lo"}, errno.EOPNOTSUPP),
    "gateway out of reach": ({"routes": ["10.90.0.0/16 via 192.0.2.1"]}, errno.ENETUNREACH),
    "gateway out of reach by IPv6": ({"routes": ["fd90::/64 via fd77::1"]}, errno.EHOSTUNREACH),
    "second route": (
        {"routes": ["10.90.0.0/16", "10.91.0.0/16 via 192.0.2.1"]},
        errno.ENETUNREACH,
    ),
    "same route by another gateway": (
        {"routes": ["10.90.0.0/16 via 10.9.0.8", "10.90.0.0/16 via 10.9.0.9"]},
        errno.EEXIST,
    ),
    "MTU 68, which is too small for IPv6": (
        {
            "mtu": 68,
            "addresses": ["10.9.0.1/24"],
            "routes": ["10.90.0.0/16 via 192.0.2.1"],
        },
        errno.ENETUNREACH,
    ),
    # An interface can't have 0.0.0.0/0 or a multicast address.
    "impossible address": ({"addresses": ["10.9.0.1/24", "ff02::5/64"]}, errno.EADDRNOTAVAIL),
}


class TestFailing:
    @pytest.mark.parametrize("how", FAILING)
    async def test_a_created_device_is_deleted(self, how: str) -> None:
        options, code = FAILING[how]
        bridges()
        with pytest.raises(aiotun.LinkError) as caught:
            await aiotun.open_tap("new0", **{**EVERYTHING, **options})
        assert caught.value.errno == code
        assert names() == ["br0", "br1"]

    @pytest.mark.parametrize("how", FAILING)
    async def test_what_was_to_persist_is_gone_as_well(self, how: str) -> None:
        options, _ = FAILING[how]
        bridges()
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tap("new0", **{**EVERYTHING, **options}, persist=True, queues=3)
        assert names() == ["br0", "br1"]

    @pytest.mark.parametrize("how", FAILING)
    async def test_an_existing_device_is_restored(self, how: str) -> None:
        options, _ = FAILING[how]
        bridges()
        before = old_device()
        if options.get("mtu") == 68:
            # See test_ipv6_survives_an_mtu_too_small_for_it.
            ip("-6", "addr", "flush", "dev", "old0")
            ip("-6", "route", "flush", "dev", "old0")
            before = state("old0")
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tap("old0", **{**EVERYTHING, **options})
        assert changes("old0", before) == []

    @pytest.mark.parametrize("how", FAILING)
    async def test_a_device_that_was_down_is_taken_down_again(self, how: str) -> None:
        options, _ = FAILING[how]
        bridges()
        before = old_device(up=False)
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tap("old0", **{**EVERYTHING, **options})
        assert changes("old0", before) == []

    async def test_a_tun_joins_no_bridge_and_has_no_mac(self) -> None:
        """`open_tun` has no such options, so the test passes them in another way."""
        make("old0", "tun")
        with pytest.raises(aiotun.DeviceMismatchError):
            await aiotun.open_tap("old0", bridge="br0")
        assert names() == ["old0"]

    async def test_ipv6_survives_an_mtu_too_small_for_it(self) -> None:
        """With an MTU below 1280 the kernel removes the IPv6 addresses, which must be restored."""
        make("old0")
        ip("link", "set", "old0", "up")
        ip("addr", "add", "fd08::1/64", "dev", "old0", "nodad")
        ip("-6", "route", "add", "fd80::/64", "dev", "old0")
        before = state("old0")
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tun("old0", mtu=1000, routes=["10.90.0.0/16 via 192.0.2.1"])
        assert changes("old0", before) == []

    async def test_ipv6_of_what_was_down_survives(self) -> None:
        """Taking a link down removes IPv6 addresses that it already had while it was down."""
        make("old0")
        ip("addr", "add", "fd08::1/64", "dev", "old0", "nodad")
        ip("addr", "add", "10.8.0.1/24", "dev", "old0")
        before = addresses("old0")
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tun("old0", routes=["10.90.0.0/16 via 192.0.2.1"])
        assert not is_up("old0")
        assert addresses("old0") == before

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("fd90::/64 metric 50", "fd90::/64"),
            ("fd90::/64 metric 2000", "fd90::/64"),
            ("fd90::/64", "fd90::/64 metric 50"),
            ("10.90.0.0/16 metric 50", "10.90.0.0/16"),
            ("10.90.0.0/16", "10.90.0.0/16 metric 50"),
            ("10.90.0.0/16 table 100", "10.90.0.0/16"),
            ("10.90.0.0/16 via 10.8.0.9 metric 50", "10.90.0.0/16 metric 60"),
            ("fd90::/64 via fd08::9 metric 50", "fd90::/64 metric 60"),
            ("fd90::/64 via fd08::9 metric 50", "fd90::/64"),
        ],
    )
    async def test_a_route_beside_another_is_told_from_it(self, old: str, new: str) -> None:
        """The added route is removed, and not another route to the same network."""
        make("old0")
        ip("link", "set", "old0", "up")
        ip("addr", "add", "10.8.0.1/24", "dev", "old0")
        ip("addr", "add", "fd08::1/64", "dev", "old0", "nodad")
        ip("-6" if ":" in old else "-4", "route", "add", *old.split(), "dev", "old0")
        before = state("old0")
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tun("old0", routes=[new, "10.91.0.0/16 via 192.0.2.1"])
        assert changes("old0", before) == []

    @pytest.mark.parametrize("name", ["old0", "new0"])
    async def test_the_error_holds_nothing_open(self, name: str) -> None:
        """Not even its traceback, because a program may keep an error."""
        make("old0")
        ip("link", "set", "old0", "up")
        before = open_files()
        with pytest.raises(aiotun.LinkError) as caught:
            await aiotun.open_tun(name, routes=["10.91.0.0/16 via 192.0.2.1"])
        join_threads()
        assert open_files() - before == Counter()
        assert caught.value.errno == errno.ENETUNREACH

    @pytest.mark.parametrize("carrier", [True, False])
    async def test_the_carrier_that_others_had(self, carrier: bool) -> None:
        """The carrier belongs to the device, not to a queue: another program still uses it."""
        flags = Iff.TUN | Iff.NO_PI | Iff.MULTI_QUEUE
        with held("old0", flags) as (fd,):
            ip("link", "set", "old0", "up")
            fcntl.ioctl(fd, Ioctl.TUNSETCARRIER, struct.pack("i", carrier))
            assert ("LOWER_UP" in link("old0")["flags"]) == carrier
            with pytest.raises(aiotun.LinkError):
                await aiotun.open_tun(
                    "old0",
                    multi_queue=True,
                    carrier=not carrier,
                    routes=["10.91.0.0/16 via 192.0.2.1"],
                )
            assert ("LOWER_UP" in link("old0")["flags"]) == carrier

    @pytest.mark.parametrize("who", ["owner", "group"])
    def test_an_owner_that_stands_for_nobody(self, who: str) -> None:
        """The last steps fail, too: a user namespace has one user, which is not 12345."""
        before, after, left, said = child(
            f"""
            import subprocess

            def show():
                args = ["-j", "-d", "-4", "addr", "show", "dev", "old0"]
                routes = ["-j", "-4", "route", "show", "table", "all", "dev", "old0"]
                found = [
                    json.loads(subprocess.check_output(["ip", *each])) for each in (args, routes)
                ]
                for key in ("operstate", "qdisc", "flags"):
                    for each in found[0]:
                        each.pop(key)
                # The kernel marks and unmarks routes as programs come and go.
                for each in found[1]:
                    each.pop("flags", None)
                return found

            def run(line):
                subprocess.run(line.split(), check=True)

            run("ip link set lo up")
            run("ip tuntap add old0 mode tun")
            run("ip link set old0 mtu 1480 up")
            run("ip addr add 10.8.0.1/24 dev old0")
            before, said = show(), []
            for name in ("old0", "new0"):
                options = dict(
                    addresses=["10.9.0.1/24"], routes=["10.90.0.0/16 via 10.9.0.9"], mtu=1300,
                    persist=True, {who}=12345,
                )
                try:
                    asyncio.run(opened(aiotun.open_tun(name, **options)))
                except aiotun.AiotunError as error:
                    said.append([type(error).__name__, error.errno, error.filename])
            left = sorted(os.listdir("/proc/sys/net/ipv4/conf"))
            print(json.dumps([before, show(), left, said]))
            """,
            prefix=["unshare", "-rn"],
        )
        assert said == [["DeviceMismatchError", errno.EINVAL, name] for name in ("old0", "new0")]
        assert [each for each in left if each.endswith("0")] == ["old0"]
        assert after == before

    async def test_no_owner_that_the_kernel_does_not_take(self) -> None:
        """The last steps fail, too: in a user namespace most ids belong to no user."""
        if REAL_ROOT:
            pytest.skip("root's kernel takes any owner")
        with pytest.raises(aiotun.DeviceMismatchError):
            await aiotun.open_tun("new0", owner=12345, persist=True)
        assert names() == []


class TestQueues:
    @pytest.mark.parametrize("free", [1, 2, 5])
    async def test_the_next_queue_is_one_too_many(self, free: int) -> None:
        """Another program holds the other queues; those that we have attached are released."""
        make("old0", "tun", "multi_queue")
        flags = Iff.TUN | Iff.NO_PI | Iff.MULTI_QUEUE
        with held("old0", flags, 256 - free):
            before = state("old0")
            with pytest.raises(aiotun.DeviceBusyError) as caught:
                await aiotun.open_tun("old0", queues=free + 1, mtu=1400, addresses=["10.0.0.1/24"])
            assert caught.value.errno == errno.E2BIG
            assert tun_data("old0")["numqueues"] == 256 - free
            assert changes("old0", before) == []

    @pytest.mark.parametrize("number", [1, 2, 3, 7])
    @pytest.mark.parametrize("call", ["open_node", "attach"])
    @pytest.mark.parametrize("persist", [None, True])
    async def test_the_nth_fails_on_a_new_device(
        self, number: int, call: str, persist: bool | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = getattr(ioctl, call)
        calls = 0

        def failing(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.ENFILE, "Too many open files in system")
            return original(*args)

        monkeypatch.setattr(ioctl, call, failing)
        with pytest.raises(aiotun.ResourceLimitError, match="no file descriptor left"):
            await aiotun.open_tun("new0", queues=7, persist=persist)
        assert calls == number
        assert names() == []

    @pytest.mark.parametrize("persist", [None, True])
    async def test_the_program_runs_out_of_fds(self, persist: bool | None) -> None:
        """The limit may be reached by a queue, the namespace or netlink."""
        bridges()
        before = old_device()
        options = {**EVERYTHING, "persist": persist}
        async with aiotun.open_tap("new0", **options):
            pass  # from here on everything is imported
        if persist:
            ip("link", "del", "new0")
        leaks = LeakCheck()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        failures = 0
        for free in range(20):
            for name in ("new0", "old0"):
                numbers = [os.dup(0) for _ in range(free + 1)]
                for number in numbers:
                    os.close(number)
                resource.setrlimit(resource.RLIMIT_NOFILE, (numbers[-1], hard))
                try:
                    device = await aiotun.open_tap(name, **options)
                except aiotun.ResourceLimitError as error:
                    assert error.errno == errno.EMFILE  # noqa: PT017 - it may also succeed
                    failures += 1
                else:
                    break
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert names() == ["br0", "br1", "old0"]
                assert changes("old0", before) == []
                assert leaks.problem() is None
            else:
                continue
            await device.aclose()
            break
        assert 5 < failures < 40

    async def test_the_first_is_multi_queue_and_the_device_is_not(self) -> None:
        make("old0")
        before = state("old0")
        with pytest.raises(aiotun.DeviceMismatchError):
            await aiotun.open_tun("old0", queues=2, mtu=1400)
        assert changes("old0", before) == []

    async def test_headers_that_others_rely_on(self) -> None:
        """The mismatch is found after attaching; the header, offloads and link are unchanged."""
        make("old0", "tun", "multi_queue", "vnet_hdr")
        flags = Iff.TUN | Iff.NO_PI | Iff.MULTI_QUEUE | Iff.VNET_HDR
        with held("old0", flags) as (fd,):
            fcntl.ioctl(fd, Ioctl.TUNSETVNETHDRSZ, struct.pack("i", 12))
            before = state("old0")
            for offload in ("off", "raw"):
                with pytest.raises(aiotun.DeviceMismatchError):
                    await aiotun.open_tun(
                        "old0", multi_queue=True, offload=offload, mtu=1400, txqueuelen=5, up=True
                    )
                assert changes("old0", before) == []
                assert ask(fd, Ioctl.TUNGETVNETHDRSZ) == 12


# --- In another namespace ------------------------------------------------------------------------

THERE: dict[str, Any] = {
    "addresses": ["10.9.0.1/24"],
    "routes": ["10.90.0.0/16 via 10.9.0.9"],
    "mtu": 1300,
    "txqueuelen": 33,
    "gso_max_segs": 45,
    "gso_max_size": 60_000,
}


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The path of another namespace with a configured persistent device."""
    first = (
        "ip tuntap add old0 mode tap && ip link set old0 mtu 1480 up && "
        "ip addr add 10.8.0.1/24 dev old0 && ip route add 10.80.0.0/16 via 10.8.0.9 dev old0"
    )
    with another_namespace(first) as path:
        yield path


def state_there(path: str) -> tuple[Any, Any, Any]:
    """The interfaces there, and the state of `old0`."""
    shown = json.loads(inside(path, "ip", "-j", "-d", "addr", "show"))
    routes = json.loads(inside(path, "ip", "-j", "-4", "route", "show", "table", "all"))
    (old,) = (each for each in shown if each["ifname"] == "old0")
    for each in (old, *routes):
        # The kernel updates the state of the carrier later.
        for key in ("operstate", "qdisc"):
            each.pop(key, None)
        # And it adds IPv6 addresses by itself unless that is disabled.
        if "addr_info" in each:
            each["addr_info"] = [one for one in each["addr_info"] if one["family"] == "inet"]
        each["flags"] = sorted({*each["flags"]} - {"NO-CARRIER", "LOWER_UP", "linkdown"})
    return [each["ifname"] for each in shown], old, routes


class TestElsewhere:
    """The device is restored there, and one of the same name in this namespace is unchanged."""

    @pytest.mark.parametrize("name", ["old0", "new0"])
    async def test_a_failed_opening_in_another_namespace_is_undone_there(
        self, elsewhere: str, name: str
    ) -> None:
        bridges()
        here, there = old_device(), state_there(elsewhere)
        failing = {**THERE, "routes": [*THERE["routes"], "10.91.0.0/16 via 192.0.2.1"]}
        with pytest.raises(aiotun.LinkError) as caught:
            await aiotun.open_tap(name, netns=elsewhere, **failing)
        assert caught.value.errno == errno.ENETUNREACH
        assert state_there(elsewhere) == there
        assert changes("old0", here) == []

    @pytest.mark.parametrize("name", ["old0", "new0"])
    async def test_cancelled_at_every_step(
        self, elsewhere: str, name: str, moments: "Moments"
    ) -> None:
        bridges()
        here, there = old_device(), state_there(elsewhere)

        def check() -> None:
            assert state_there(elsewhere) == there
            assert changes("old0", here) == []

        await sweep(moments, lambda: tap(name, netns=elsewhere, **THERE), check, 20)

    @pytest.mark.parametrize("name", ["old0", "new0"])
    async def test_cancelled_with_the_device_on_its_way(self, elsewhere: str, name: str) -> None:
        """The opening's thread has ended, so another thread enters the namespace and undoes it."""
        bridges()
        here, there = old_device(), state_there(elsewhere)
        task = asyncio.create_task(tap(name, netns=elsewhere, persist=True, **THERE))
        await asyncio.sleep(0)
        join_threads()
        assert (name in state_there(elsewhere)[0], state_there(elsewhere) != there) == (True, True)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert state_there(elsewhere) == there
        assert changes("old0", here) == []


# --- Cancellation --------------------------------------------------------------------------------

_CALLS = [
    "open_node", "attach", "get_index", "get_vnet_header_size", "set_vnet_header_size",
    "set_offload", "set_sndbuf", "set_carrier", "set_group", "set_owner", "set_persist",
]  # fmt: skip
_REQUESTS = ["get", "set", "addresses", "add_address", "routes", "add_route"]


class Moments:
    """The moments before and after each step of an opening, counted in its thread."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._number = 0
        self._wanted = 0
        self._act: Callable[[], None] = lambda: None
        for name in _CALLS:
            patch.setattr(ioctl, name, self._call(getattr(ioctl, name)))
        for name in _REQUESTS:
            patch.setattr(Session, name, self._request(getattr(Session, name)))

    def at(self, number: int, act: Callable[[], None]) -> None:
        """Do something at one moment, counted from 1."""
        self._number, self._wanted, self._act = 0, number, act

    @property
    def reached(self) -> bool:
        return self._number >= self._wanted

    def _pass(self) -> None:
        self._number += 1
        if self._number == self._wanted:
            self._act()

    def _call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            value = function(*args, **kwargs)
            if isinstance(value, int) and function.__name__ == "open_node":
                return value  # no result yet; the moment before the next step is the same
            self._pass()
            return value

        return wrapped

    def _request(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(function)
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            value = await function(*args, **kwargs)
            self._pass()
            return value

        return wrapped


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    return Moments(monkeypatch)


Opened = Coroutine[Any, Any, aiotun.Device]


async def cancelled_at(moments: Moments, number: int, opening: Opened) -> bool:
    """Cancel an opening at one moment. If it has ended before, close it and return False."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(opening)

    def cancel() -> None:
        """Runs in the opening's thread; continues when the task has seen the cancellation."""
        seen = threading.Event()

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            else:
                seen.set()

        def begin() -> None:
            task.cancel()
            turn(4)

        loop.call_soon_threadsafe(begin)
        assert seen.wait(5)

    moments.at(number, cancel)
    try:
        device = await task
    except asyncio.CancelledError:
        assert moments.reached
        return True
    assert not moments.reached
    await device.aclose()
    return False


async def sweep(
    moments: Moments, opening: Callable[[], Opened], check: Callable[[], None], least: int
) -> None:
    """Cancel an opening at each of its moments in turn, and check the state after each."""
    number = 1
    while await cancelled_at(moments, number, opening()):
        check()
        number += 1
    assert number > least


async def tap(name: str, **options: Any) -> aiotun.TapDevice:
    return await aiotun.open_tap(name, **options)


class TestCancelling:
    @pytest.mark.parametrize("persist", [None, True, False])
    async def test_a_new_device_at_every_step(self, moments: Moments, persist: bool | None) -> None:
        bridges()

        def check() -> None:
            assert names() == ["br0", "br1"]

        more = {"persist": persist, "owner": 0, "group": 0}
        await sweep(moments, lambda: tap("new0", queues=3, **more, **EVERYTHING), check, 40)

    async def test_a_device_that_the_kernel_names(self, moments: Moments) -> None:
        await sweep(moments, lambda: tap("new%d"), lambda: _none_left(), 5)

    @pytest.mark.parametrize("up", [True, False])
    async def test_an_old_device_at_every_step(self, moments: Moments, up: bool) -> None:
        bridges()
        before = old_device(up=up)

        def check() -> None:
            assert changes("old0", before) == []

        await sweep(moments, lambda: tap("old0", **EVERYTHING), check, 40)

    async def test_an_old_device_that_is_to_persist_as_it_does(self, moments: Moments) -> None:
        bridges()
        before = old_device()

        def check() -> None:
            assert changes("old0", before) == []

        await sweep(moments, lambda: tap("old0", persist=True, **EVERYTHING), check, 40)

    async def test_an_old_device_that_others_hold(self, moments: Moments) -> None:
        bridges()
        old_device(multi_queue=True)
        with held("old0", Iff.TAP | Iff.NO_PI | Iff.MULTI_QUEUE):
            before = state("old0")

            def check() -> None:
                assert changes("old0", before) == []

            await sweep(moments, lambda: tap("old0", queues=2, **EVERYTHING), check, 40)

    async def test_a_cancelled_opening_in_another_namespace_is_undone_there(
        self, moments: Moments, netns: int
    ) -> None:
        prepare = (
            "(echo 1 > /proc/sys/net/ipv6/conf/default/addr_gen_mode || true) 2>/dev/null && "
            "ip tuntap add old0 mode tap && ip link set old0 up"
        )
        with another_namespace(prepare) as path:
            there = os.open(path, os.O_RDONLY)

            def look() -> tuple[list[str], dict[str, Any]]:
                _isolation.setns(there)
                try:
                    return names(), state("old0")
                finally:
                    _isolation.setns(netns)

            before = look()

            def check() -> None:
                assert look() == before
                assert names() == []

            options: dict[str, Any] = {"mtu": 1300, "addresses": ["10.0.0.1/24"], "netns": path}
            try:
                await sweep(moments, lambda: tap("new0", **options), check, 10)
                await sweep(moments, lambda: tap("old0", **options), check, 10)
            finally:
                os.close(there)

    async def test_an_old_device_that_is_to_persist_no_more(self, moments: Moments) -> None:
        """A cancelled opening does not delete an existing device: it becomes persistent again."""
        make("old0", "tap")
        before = state("old0")

        def check() -> None:
            assert names() == ["old0"]
            assert changes("old0", before) == []

        await sweep(moments, lambda: tap("old0", persist=False, up=False), check, 5)

    async def test_a_device_that_others_hold_does_not_begin_to_persist(
        self, moments: Moments
    ) -> None:
        flags = Iff.TAP | Iff.NO_PI | Iff.MULTI_QUEUE
        with held("old0", flags):
            before = state("old0")

            def check() -> None:
                assert changes("old0", before) == []

            opening = functools.partial(tap, "old0", multi_queue=True, persist=True, up=False)
            await sweep(moments, opening, check, 5)

    async def test_the_task_is_cancelled_twice(self, moments: Moments) -> None:
        """The second cancellation comes during the undoing, which continues to its end."""
        bridges()
        before = old_device()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(tap("old0", **EVERYTHING))

        def cancel_thrice() -> None:
            task.cancel()
            for delay in (0.001, 0.003):
                loop.call_later(delay, task.cancel)

        def cancel() -> None:
            loop.call_soon_threadsafe(cancel_thrice)

        moments.at(40, cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert changes("old0", before) == []

    async def test_an_error_and_a_cancellation_at_once(self, moments: Moments) -> None:
        bridges()
        before = old_device()
        failing = {**EVERYTHING, "routes": ["10.90.0.0/16 via 192.0.2.1"]}
        hits = 0
        for number in range(30, 60):
            try:
                assert await cancelled_at(moments, number, tap("old0", **failing))
                hits += 1
            except aiotun.LinkError:
                break
            assert changes("old0", before) == []
        assert hits > 5
        assert changes("old0", before) == []

    async def test_an_opening_cancelled_before_it_begins_leaves_no_device(self) -> None:
        task = asyncio.create_task(tap("new0", persist=True))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert names() == []

    async def test_timeouts_at_any_moment(self) -> None:
        """Sweeps over times instead of steps."""
        bridges()
        before = old_device()
        chance = random.Random(4)
        over = 0
        started = time.monotonic()
        async with aiotun.open_tap("meter0", **{**EVERYTHING, "routes": []}):
            longest = time.monotonic() - started
        for _ in range(25):
            for name in ("old0", "new0"):
                options: dict[str, Any] = {"persist": True} if name == "new0" else {}
                try:
                    async with asyncio.timeout(chance.random() * longest):
                        device = await tap(name, **EVERYTHING, **options)
                except TimeoutError:
                    over += 1
                else:
                    await device.link.down()
                    await device.aclose()
                    ip("link", "del", name)
                    if name == "old0":
                        assert old_device()["addresses"] == before["addresses"]
                        before = state("old0")
                assert "new0" not in names()
                assert changes("old0", before) == []
        assert over > 5

    async def test_a_timeout_is_a_timeout(self, moments: Moments) -> None:
        waiting, going_on = threading.Event(), threading.Event()

        def act() -> None:
            waiting.set()
            assert going_on.wait(5)

        moments.at(6, act)
        started = asyncio.get_running_loop().time()
        asyncio.get_running_loop().call_later(0.1, going_on.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await aiotun.open_tun("new0")
        # It waited for the running step.
        assert waiting.is_set()
        assert asyncio.get_running_loop().time() - started >= 0.1
        assert names() == []

    async def test_a_wait_for_that_times_out_leaves_no_device(self) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(aiotun.open_tun("new0"), 0.0)
        assert names() == []

    async def test_a_task_group_that_fails(self) -> None:
        async def fail() -> None:
            await asyncio.sleep(0.002)
            raise KeyError

        async def use(name: str) -> None:
            async with aiotun.open_tap(name):
                await asyncio.Event().wait()

        async def program() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(5):
                    group.create_task(use(f"new{number}"))
                group.create_task(fail())

        with pytest.raises(ExceptionGroup):
            await program()
        assert names() == []


def _none_left() -> None:
    assert names() == []


# --- A loop that ends meanwhile ------------------------------------------------------------------

_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


@contextlib.contextmanager
def loop_for(kind: str) -> Iterator[asyncio.AbstractEventLoop]:
    loop = _LOOPS[kind]()
    # The loop reports a pending task that was destroyed; here that is on purpose.
    loop.set_exception_handler(lambda _, __: None)
    try:
        yield loop
    finally:
        loop.close()


@pytest.mark.parametrize("kind", _LOOPS)
class TestLoopClosed:
    @pytest.mark.parametrize("number", [1, 5, 20, 40])
    def test_an_opening_is_undone_when_the_loop_is_closed_during_it(
        self, kind: str, moments: Moments, number: int
    ) -> None:
        bridges()
        before = old_device()
        reached, going_on = threading.Event(), threading.Event()

        def act() -> None:
            reached.set()
            assert going_on.wait(5)

        for name in ("old0", "new0"):
            reached.clear()
            going_on.clear()
            moments.at(number, act)
            with loop_for(kind) as loop:
                task = loop.create_task(tap(name, **EVERYTHING))
                loop.run_until_complete(asyncio.sleep(0))
                assert reached.wait(5)
            going_on.set()
            join_threads()
            assert not task.done()
            del task
            assert changes("old0", before) == []
            assert names() == ["br0", "br1", "old0"]

    def test_an_opening_is_undone_when_its_result_cannot_be_delivered(self, kind: str) -> None:
        """The thread has ended and has told the loop, but the loop never runs again."""
        bridges()
        before = old_device()
        for name in ("old0", "new0"):
            with loop_for(kind) as loop:
                task = loop.create_task(tap(name, **EVERYTHING))
                loop.run_until_complete(asyncio.sleep(0))
                join_threads()
            assert not task.done()
            del task
            gc.collect()
            join_threads()
            assert names() == ["br0", "br1", "old0"]
            assert changes("old0", before) == []

    def test_an_opening_is_undone_when_asyncio_run_ends(self, kind: str) -> None:
        """asyncio.run cancels the task and waits for it."""

        async def program() -> None:
            task = asyncio.create_task(tap("new0", persist=True))
            await asyncio.sleep(0)
            assert not task.done()

        with asyncio.Runner(loop_factory=_LOOPS[kind]) as runner:
            runner.run(program())
        join_threads()
        assert names() == []


# --- And what is not undone ----------------------------------------------------------------------


class TestNotUndone:
    async def test_what_was_there_before_is_no_ones_to_remove(self) -> None:
        """Requested addresses and routes that existed already stay after a failure."""
        make("old0")
        ip("link", "set", "old0", "up", "mtu", "1400")
        ip("addr", "add", "10.0.0.1/24", "dev", "old0")
        ip("route", "add", "10.1.0.0/16", "dev", "old0")
        before = state("old0")
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_tun(
                "old0",
                addresses=["10.0.0.1/24"],
                mtu=1400,
                routes=["10.1.0.0/16", "10.2.0.0/16 via 192.0.2.1"],
            )
        assert changes("old0", before) == []

    async def test_undoing_goes_on_where_one_step_can_not_be_undone(self, moments: Moments) -> None:
        """Another program has removed the address meanwhile; the MTU is still restored."""
        make("old0")

        async def opening() -> aiotun.Device:
            return await aiotun.open_tun("old0", addresses=["10.0.0.1/24"], mtu=1400, up=False)

        loop = asyncio.get_running_loop()
        for number in range(1, 100):
            meddled = False
            task = loop.create_task(opening())

            def act(task: asyncio.Task[aiotun.Device] = task) -> None:
                nonlocal meddled
                if addresses("old0"):
                    ip("addr", "flush", "dev", "old0")
                    meddled = True
                seen = threading.Event()
                loop.call_soon_threadsafe(task.cancel)
                loop.call_soon_threadsafe(loop.call_soon, loop.call_soon, seen.set)
                assert seen.wait(5)

            moments.at(number, act)
            with contextlib.suppress(asyncio.CancelledError):
                device = await task
                await device.aclose()
                break
            assert link("old0")["mtu"] == 1500
            assert addresses("old0") == set()
            if meddled:
                return
        raise AssertionError("the address was never seen")

    async def test_after_an_ordinary_close_everything_stays(self) -> None:
        bridges()
        old_device()
        async with aiotun.open_tap("old0", **EVERYTHING):
            during = state("old0")
        assert changes("old0", during) == []
        assert {"10.9.0.1/24", "fd09::1/64"} < addresses("old0")
        assert {"10.90.0.0/16", "fd90::/64"} < {each["dst"] for each in routes("old0")}
        assert socket.if_nametoindex("old0")


@pytest.mark.parametrize("method", ["get", "set", "add_address"])
async def test_an_interface_that_is_deleted_meanwhile_is_a_lost_device(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Session, method)

    async def after_deletion(session: Session, *args: Any, **named: Any) -> Any:
        if "tun7" in names():
            ip("link", "del", "tun7")
        return await original(session, *args, **named)

    monkeypatch.setattr(Session, method, after_deletion)
    with pytest.raises(aiotun.DeviceLostError, match="tun7 was deleted while it was opened"):
        await aiotun.open_tun("tun7", addresses=["10.0.7.1/24"], mtu=1400)
