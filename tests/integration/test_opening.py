"""Every option of `open_tun` and `open_tap`, checked with the kernel's own view."""

import asyncio
import contextlib
import errno
import fcntl
import grp
import ipaddress
import json
import os
import pwd
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun._device.opening import Opening
from aiotun._kernel.abi import Iff, Ioctl, OffloadFlag
from aiotun._link.session import Session
from aiotun._link.values import LinkAddress, Route

from ..helpers import REAL_ROOT, ip, wait_until
from .kernel import (
    addresses,
    another_namespace,
    ask,
    changes,
    forward,
    held,
    inside,
    is_up,
    link,
    make,
    may_leave_to_us,
    names,
    ordinary_child,
    routes,
    state,
    tun_data,
    tun_flags,
)

Open = Callable[..., Any]

both = pytest.mark.parametrize(
    ("open_it", "mode"), [(aiotun.open_tun, "tun"), (aiotun.open_tap, "tap")], ids=["tun", "tap"]
)


class TestName:
    @both
    async def test_without_a_name_the_kernel_picks_one(self, open_it: Open, mode: str) -> None:
        async with open_it() as first, open_it() as second:
            assert [first.name, second.name] == names() == [f"{mode}0", f"{mode}1"]

    @both
    async def test_a_pattern_takes_the_next_free_number(self, open_it: Open, mode: str) -> None:
        async with open_it("vpn%dx") as first, open_it("vpn%dx") as second:
            assert [first.name, second.name] == names() == ["vpn0x", "vpn1x"]
        async with open_it("vpn%dx") as again:
            assert again.name == "vpn0x"

    @both
    async def test_a_device_has_the_given_name(self, open_it: Open, mode: str) -> None:
        async with open_it("mine") as device:
            assert (device.name, device.mode) == ("mine", mode)
            assert names() == ["mine"]
            assert tun_data("mine")["type"] == mode
            assert device.index == socket.if_nametoindex("mine")
            assert device.mtu == 1500
        assert names() == []

    @pytest.mark.parametrize("name", ["a" * 15, "é" * 7, "-", "..."])
    async def test_unusual_names_are_taken(self, name: str) -> None:
        async with aiotun.open_tun(name) as device:
            assert device.name == name
            assert names() == [name]

    async def test_an_existing_device_is_taken(self) -> None:
        make("old0")
        index = socket.if_nametoindex("old0")
        async with aiotun.open_tun("old0") as device:
            assert device.index == index
        assert names() == ["old0"]

    async def test_another_name_of_an_interface(self) -> None:
        make("old0")
        ip("link", "property", "add", "dev", "old0", "altname", "alternative")
        async with aiotun.open_tun("alternative") as device:
            assert device.name == "old0"
            assert device.index == socket.if_nametoindex("old0")


class TestForms:
    @both
    async def test_async_with_opens_and_closes(self, open_it: Open, mode: str) -> None:
        async with open_it("form0", addresses=["10.0.0.1/24"]) as device:
            assert type(device).__name__.lower().startswith(mode)
            assert addresses("form0") == {"10.0.0.1/24"}
        assert (device.closed, names()) == (True, [])

    @both
    async def test_await_opens_and_aclose_closes(self, open_it: Open, mode: str) -> None:
        device = await open_it("form0", addresses=["10.0.0.1/24"])
        try:
            assert addresses("form0") == {"10.0.0.1/24"}
        finally:
            await device.aclose()
        assert (device.closed, names()) == (True, [])


class TestQueues:
    @both
    async def test_by_default_a_device_has_one_queue(self, open_it: Open, mode: str) -> None:
        async with open_it("q0") as device:
            assert len(device.queues) == 1
            assert tun_data("q0")["multi_queue"] is False
            assert not tun_flags("q0") & Iff.MULTI_QUEUE

    @both
    @pytest.mark.parametrize("count", [2, 3, 256])
    async def test_a_device_has_as_many_queues_as_asked_for(
        self, open_it: Open, mode: str, count: int
    ) -> None:
        async with open_it("q0", queues=count) as device:
            assert len({queue.fileno() for queue in device.queues}) == count
            data = tun_data("q0")
            assert (data["multi_queue"], data["numqueues"]) == (True, count)

    async def test_multi_queue_can_be_forced_with_one_queue(self) -> None:
        async with aiotun.open_tun("q0", multi_queue=True) as device:
            assert len(device.queues) == 1
            assert tun_flags("q0") & Iff.MULTI_QUEUE
            async with aiotun.open_tun("q0", multi_queue=True) as other:
                assert tun_data("q0")["numqueues"] == 2
                assert other.index == device.index
            assert tun_data("q0")["numqueues"] == 1

    async def test_all_are_on_the_interface_with_close_on_exec(self) -> None:
        async with aiotun.open_tun("q%d", queues=3) as device:
            for queue in device.queues:
                fd = queue.fileno()
                request = fcntl.ioctl(fd, Ioctl.TUNGETIFF, bytes(40))
                assert request.split(b"\0")[0] == b"q0"
                assert not os.get_inheritable(fd)
                assert not os.get_blocking(fd)


class TestAddresses:
    @both
    async def test_addresses_in_every_form_are_set(self, open_it: Open, mode: str) -> None:
        wanted = [
            "10.0.0.1/24",
            "10.1.0.1/32",
            "10.2.0.1 peer 10.2.0.2/32",
            "fd00::1/64",
            "fd01::1 peer fd01::2/128",
            ipaddress.IPv4Interface("10.3.0.1/16"),
            ipaddress.IPv6Interface("fd02::1/64"),
            LinkAddress(ipaddress.IPv4Interface("10.4.0.1/16")),
        ]
        async with open_it("a0", addresses=iter(wanted)):
            assert addresses("a0") == {
                "10.0.0.1/24",
                "10.1.0.1/32",
                "10.2.0.1 peer 10.2.0.2/32",
                "fd00::1/64",
                "fd01::1 peer fd01::2/128",
                "10.3.0.1/16",
                "fd02::1/64",
                "10.4.0.1/16",
            }

    async def test_addresses_are_set_in_the_given_order(self) -> None:
        wanted = ["10.0.0.3/24", "10.0.0.1/24", "10.0.0.2/24"]
        async with aiotun.open_tun("a0", addresses=wanted):
            (shown,) = ip("-4", "addr", "show", "dev", "a0")
            assert [f"{each['local']}/24" for each in shown["addr_info"]] == wanted

    async def test_the_same_address_twice_is_set_once(self) -> None:
        async with aiotun.open_tun("a0", addresses=["10.0.0.1/24", "10.0.0.1/24"]):
            assert addresses("a0") == {"10.0.0.1/24"}

    async def test_ipv6_is_usable_at_once(self) -> None:
        async with aiotun.open_tap("a0", addresses=["fd00::1/64"]):
            (shown,) = ip("-6", "addr", "show", "dev", "a0")
            assert not shown["addr_info"][0].get("tentative")
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.bind(("fd00::1", 0))

    @pytest.mark.parametrize("address", ["::1.2.3.4/96", "::a00:1/96", "64:ff9b::1.2.3.4/96"])
    async def test_an_address_with_two_spellings_is_not_waited_for_in_vain(
        self, address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dumps = 0
        dump = Session._dump

        def counting(*args: Any) -> Any:
            nonlocal dumps
            dumps += 1
            return dump(*args)

        monkeypatch.setattr(Session, "_dump", counting)
        async with aiotun.open_tun("a0", addresses=[address]):
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.bind((address.partition("/")[0], 0))
        assert dumps < 100  # it gives up after 200, which takes more than a second

    async def test_addresses_that_exist_stay(self) -> None:
        make("a0")
        ip("addr", "add", "10.0.0.1/24", "dev", "a0")
        async with aiotun.open_tun("a0", addresses=["10.0.0.1/24", "10.0.1.1/24"]):
            assert addresses("a0") == {"10.0.0.1/24", "10.0.1.1/24"}
        # Addresses that were configured also stay after an ordinary close.
        assert addresses("a0") == {"10.0.0.1/24", "10.0.1.1/24"}


class TestRoutes:
    @both
    async def test_routes_in_every_form_are_set(self, open_it: Open, mode: str) -> None:
        wanted = [
            "10.1.0.0/16",
            "10.2.0.1",
            "10.3.0.0/16 via 10.0.0.2",
            "10.4.0.0/16 metric 50",
            "10.5.0.0/16 table 100",
            "10.6.0.0/16 via 10.0.0.2 metric 60 table 200",
            "10.6.0.0/16 table 200 metric 61 via 10.0.0.3",
            "default",
            "default via fd00::2",
            "fd01::/64 via fd00::2 metric 70",
            ipaddress.IPv4Network("10.7.0.0/16"),
            ipaddress.IPv6Network("fd02::/64"),
            ipaddress.IPv4Address("10.8.0.1"),
            Route(ipaddress.IPv4Network("10.9.0.0/16"), ipaddress.IPv4Address("10.0.0.2")),
        ]
        options = {"addresses": ["10.0.0.1/24", "fd00::1/64"]}
        async with open_it("r0", routes=iter(wanted), **options):
            found = {
                (
                    each["dst"],
                    each.get("gateway"),
                    each.get("metric"),
                    each.get("table"),
                )
                for each in routes("r0")
            }
            assert found == {
                ("10.1.0.0/16", None, None, None),
                ("10.2.0.1", None, None, None),
                ("10.3.0.0/16", "10.0.0.2", None, None),
                ("10.4.0.0/16", None, 50, None),
                ("10.5.0.0/16", None, None, "100"),
                ("10.6.0.0/16", "10.0.0.2", 60, "200"),
                ("10.6.0.0/16", "10.0.0.3", 61, "200"),
                ("default", None, None, None),
                ("default", "fd00::2", 1024, None),
                ("fd01::/64", "fd00::2", 70, None),
                ("10.7.0.0/16", None, None, None),
                ("fd02::/64", None, 1024, None),
                ("10.8.0.1", None, None, None),
                ("10.9.0.0/16", "10.0.0.2", None, None),
            }

    async def test_routes_that_exist_stay(self) -> None:
        make("r0")
        ip("link", "set", "r0", "up")
        ip("route", "add", "10.1.0.0/16", "dev", "r0")
        before = routes("r0")
        async with aiotun.open_tun("r0", routes=["10.1.0.0/16", "10.1.0.0/16"]):
            assert routes("r0") == before
        assert routes("r0") == before

    async def test_packets_to_a_route_reach_the_device(self) -> None:
        async with aiotun.open_tun("r0", addresses=["10.0.0.1/24"], routes=["192.0.2.0/24"]) as tun:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"hello", ("192.0.2.5", 9))
            packet = await asyncio.wait_for(tun.recv(), 5)
            assert packet[16:20] == socket.inet_aton("192.0.2.5")


class TestLink:
    @both
    async def test_the_given_mtu_is_set(self, open_it: Open, mode: str) -> None:
        for mtu in (68, 1280, 9000, 65_521):
            async with open_it("m0", mtu=mtu) as device:
                assert link("m0")["mtu"] == device.mtu == mtu

    async def test_the_largest_mtu_of_a_tun(self) -> None:
        async with aiotun.open_tun("m0", mtu=65_535) as tun:
            assert link("m0")["mtu"] == tun.mtu == 65_535

    @both
    @pytest.mark.parametrize("packets", [0, 1, 50, 5000])
    async def test_the_given_txqueuelen_is_set(
        self, open_it: Open, mode: str, packets: int
    ) -> None:
        async with open_it("l0", txqueuelen=packets):
            # iproute2 does not write a 0.
            assert link("l0").get("txqlen", 0) == packets

    @both
    async def test_the_given_limits_of_super_packets_are_set(
        self, open_it: Open, mode: str
    ) -> None:
        async with open_it("l0", gso_max_segs=45, gso_max_size=60_000) as device:
            shown = link("l0")
            assert (shown["gso_max_segs"], shown["gso_max_size"]) == (45, 60_000)
            info = await device.link.info()
            assert (info.gso_max_segs, info.gso_max_size) == (45, 60_000)

    @both
    async def test_up_unless_told_otherwise(self, open_it: Open, mode: str) -> None:
        async with open_it("u0"):
            assert is_up("u0")

    async def test_up_false_leaves_a_new_one_down(self) -> None:
        async with aiotun.open_tun("u0", up=False, addresses=["10.0.0.1/24"], mtu=1400):
            assert not is_up("u0")
            assert addresses("u0") == {"10.0.0.1/24"}
            assert link("u0")["mtu"] == 1400

    async def test_up_false_leaves_an_old_one_up(self) -> None:
        make("u0")
        ip("link", "set", "u0", "up")
        async with aiotun.open_tun("u0", up=False):
            assert is_up("u0")

    async def test_the_given_mac_is_set(self) -> None:
        async with aiotun.open_tap("t0", mac="02:AB:00:00:00:01"):
            assert link("t0")["address"] == "02:ab:00:00:00:01"

    async def test_mac_of_an_old_one_that_is_up(self) -> None:
        make("t0", "tap")
        ip("link", "set", "t0", "up")
        async with aiotun.open_tap("t0", mac="02:ab:00:00:00:02"):
            assert link("t0")["address"] == "02:ab:00:00:00:02"

    async def test_a_tap_joins_the_given_bridge(self) -> None:
        ip("link", "add", "br0", "type", "bridge")
        ip("link", "set", "br0", "up")
        async with aiotun.open_tap("t0", bridge="br0"), aiotun.open_tap(bridge="br0") as other:
            assert link("t0")["master"] == link(other.name)["master"] == "br0"
        assert names() == ["br0"]

    async def test_frames_pass_the_bridge(self) -> None:
        ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
        ip("link", "set", "br0", "up")
        frame = b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + bytes(46)
        async with (
            aiotun.open_tap("t0", bridge="br0") as one,
            aiotun.open_tap("t1", bridge="br0") as two,
        ):
            await wait_until(lambda: forward("t0", "t1"))
            await one.send(frame)
            async with asyncio.timeout(5):
                while await two.recv() != frame:
                    pass

    async def test_a_tap_moves_from_another_bridge(self) -> None:
        for bridge in ("br0", "br1"):
            ip("link", "add", bridge, "type", "bridge")
        make("t0", "tap")
        ip("link", "set", "t0", "master", "br0")
        async with aiotun.open_tap("t0", bridge="br1"):
            assert link("t0")["master"] == "br1"


class TestNetns:
    @pytest.fixture
    def elsewhere(self) -> Iterator[str]:
        """The path of another namespace."""
        with another_namespace() as path:
            yield path

    @staticmethod
    def there(path: str) -> Any:
        """The interfaces of that namespace."""
        done = subprocess.run(
            ["nsenter", f"--net={path}", "ip", "-o", "addr"], capture_output=True, text=True
        )
        return done.stdout

    async def check(self, netns: str | os.PathLike[str] | int, path: str) -> None:
        """Open in that namespace; check that the device is there and that this thread is not."""
        here = os.stat("/proc/thread-self/ns/net").st_ino
        async with aiotun.open_tun("n0", netns=netns, addresses=["10.0.0.1/24"], queues=2) as tun:
            assert names() == []
            assert "n0    inet 10.0.0.1/24" in self.there(path)
            assert os.stat("/proc/thread-self/ns/net").st_ino == here
            assert os.stat("/proc/self/ns/net").st_ino != os.stat(path).st_ino
            assert "10.0.0.1/24" in {str(each) for each in await tun.link.addresses()}
            await tun.link.set_mtu(1400)
            assert tun.mtu == 1400
        assert "n0" not in self.there(path)

    async def test_a_device_opens_in_a_namespace_given_by_path(self, elsewhere: str) -> None:
        await self.check(elsewhere, elsewhere)

    async def test_a_device_opens_in_a_namespace_given_by_path_object(self, elsewhere: str) -> None:
        await self.check(Path(elsewhere), elsewhere)

    async def test_fd_is_duplicated(self, elsewhere: str) -> None:
        fd = os.open(elsewhere, os.O_RDONLY)
        try:
            await self.check(fd, elsewhere)
            assert os.fstat(fd).st_ino == os.stat(elsewhere).st_ino
        finally:
            os.close(fd)

    async def test_the_link_works_on_without_the_callers_fd(self, elsewhere: str) -> None:
        fd = os.open(elsewhere, os.O_RDONLY)
        tun = await aiotun.open_tun("n0", netns=fd)
        os.close(fd)
        async with tun:
            await tun.link.add_address("10.0.0.1/24")
            assert "10.0.0.1/24" in self.there(elsewhere)

    async def test_a_device_opens_in_a_namespace_given_by_name(self) -> None:
        if not REAL_ROOT:
            pytest.skip("'ip netns add' does not work in a user namespace")
        ip("netns", "add", "blue")
        try:
            await self.check("blue", "/run/netns/blue")
        finally:
            ip("netns", "del", "blue")

    async def test_the_device_lives_on_after_ip_netns_del(self) -> None:
        if not REAL_ROOT:
            pytest.skip("'ip netns add' does not work in a user namespace")
        ip("netns", "add", "blue")
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(ip, "netns", "del", "blue")
            async with aiotun.open_tun("n0", netns="blue", addresses=["10.0.0.1/24"]) as tun:
                cleanup.close()
                assert "10.0.0.1/24" in {str(each) for each in await tun.link.addresses()}
                await tun.send(bytes.fromhex("4500001400000000401166d60a0000020a000001"))

    async def test_an_existing_device_in_there(self, elsewhere: str) -> None:
        """It is used and stays; an interface of the same name in this namespace is not touched."""
        make("n0", "tap")
        before = state("n0")
        inside(elsewhere, "ip", "tuntap", "add", "n0", "mode", "tun")
        async with aiotun.open_tun("n0", netns=elsewhere, addresses=["10.0.0.1/24"], mtu=1400):
            shown = self.there(elsewhere)
            assert "n0    inet 10.0.0.1/24" in shown
        assert "n0    inet 10.0.0.1/24" in self.there(elsewhere)
        assert changes("n0", before) == []

    async def test_exclusive_looks_in_there(self, elsewhere: str) -> None:
        make("n0")
        async with aiotun.open_tun("n0", netns=elsewhere, exclusive=True):
            with pytest.raises(aiotun.DeviceBusyError):
                await aiotun.open_tun("n0", netns=elsewhere, exclusive=True)

    async def test_the_bridge_is_the_one_in_there(self, elsewhere: str) -> None:
        """Each namespace numbers its interfaces; here the same indices are other interfaces."""
        ip("link", "add", "br0", "type", "bridge")
        inside(elsewhere, "ip", "link", "add", "other0", "type", "bridge")
        inside(elsewhere, "ip", "link", "add", "br0", "type", "bridge")
        async with aiotun.open_tap("n0", netns=elsewhere, bridge="br0"):
            (shown,) = json.loads(inside(elsewhere, "ip", "-j", "link", "show", "dev", "n0"))
            assert shown["master"] == "br0"
        assert names() == ["br0"]

    async def test_a_bridge_of_another_namespace_is_not_found(self, elsewhere: str) -> None:
        ip("link", "add", "br0", "type", "bridge")
        with pytest.raises(aiotun.LinkError) as caught:
            await aiotun.open_tap("n0", netns=elsewhere, bridge="br0")
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "br0")
        assert "n0" not in self.there(elsewhere)

    async def test_missing_is_never_created(self, tmp_path: Path) -> None:
        for missing in ("missing", tmp_path / "missing", str(tmp_path / "missing")):
            with pytest.raises(aiotun.LinkError, match="ip netns add") as caught:
                await aiotun.open_tun("n0", netns=missing)
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(FileNotFoundError):
            os.stat("/run/netns/missing")
        assert os.listdir(tmp_path) == []
        assert names() == []

    async def test_a_file_that_is_no_namespace_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(aiotun.LinkError, match="not a network namespace"):
            await aiotun.open_tun("n0", netns=tmp_path / "file")
        assert names() == []

    def test_a_namespace_of_another_users_process_is_not_permitted(self) -> None:
        path = f"/proc/{os.getpid()}/ns/net"
        said = ordinary_child(f"attempt(aiotun.open_tun('n0', netns={path!r}))")
        assert (said["class"], said["filename"]) == ("NotPermittedError", path)
        assert "no permission to open the network namespace" in said["strerror"]

    async def test_fd_that_is_not_open(self) -> None:
        fd = os.open("/", os.O_RDONLY)
        os.close(fd)
        with pytest.raises(aiotun.LinkError) as caught:
            await aiotun.open_tun("n0", netns=fd)
        assert caught.value.errno == errno.EBADF
        assert names() == []


class TestPersist:
    @both
    async def test_persist_true_keeps_the_device_after_closing(
        self, open_it: Open, mode: str
    ) -> None:
        async with open_it("p0", persist=True, addresses=["10.0.0.1/24"]):
            assert tun_data("p0")["persist"] is True
        assert names() == ["p0"]
        assert addresses("p0") == {"10.0.0.1/24"}

    async def test_persist_false_ends_persistence(self) -> None:
        make("p0")
        async with aiotun.open_tun("p0", persist=False):
            assert tun_data("p0")["persist"] is False
        assert names() == []

    async def test_persist_none_changes_nothing(self) -> None:
        make("p0")
        async with aiotun.open_tun("p0"), aiotun.open_tun("p1"):
            assert tun_data("p0")["persist"] is True
            assert tun_data("p1")["persist"] is False
        assert names() == ["p0"]

    async def test_persist_false_on_a_new_device_changes_nothing(self) -> None:
        async with aiotun.open_tun("p0", persist=False):
            assert tun_data("p0")["persist"] is False
        assert names() == []


class TestOwner:
    def owned(self, name: str) -> tuple[str | None, str | None]:
        # iproute2 shows names instead of ids if there are names.
        data = tun_data(name)
        return data.get("user"), data.get("group")

    @pytest.mark.parametrize("who", [0, "root"])
    async def test_owner_and_group_may_be_numbers_or_names(self, who: int | str) -> None:
        async with aiotun.open_tun("o0") as tun:
            assert self.owned(tun.name) == (None, None)
        async with aiotun.open_tun("o0", owner=who):
            assert self.owned("o0") == ("root", None)
        async with aiotun.open_tun("o0", group=who):
            assert self.owned("o0") == (None, "root")
        async with aiotun.open_tap("o0", owner=who, group=who) as tap:
            assert self.owned("o0") == ("root", "root")
            info = (await tap.link.info()).tuntap
            assert info is not None
            assert (info.owner, info.group) == (0, 0)

    async def test_owner_and_group_of_an_existing_device_are_changed(self) -> None:
        make("o0", "tun", "user", "0", "group", "0")
        if not REAL_ROOT:
            pytest.skip("a user namespace like this has one user only")
        async with aiotun.open_tun("o0", owner=12, group=13) as tun:
            info = (await tun.link.info()).tuntap
            assert info is not None
            assert (info.owner, info.group) == (12, 13)

    async def test_owner_and_group_may_be_other_names(self) -> None:
        if not REAL_ROOT:
            pytest.skip("a user namespace like this has one user only")
        user, group = pwd.getpwnam("nobody"), grp.getgrgid(os.getgid())
        async with aiotun.open_tun("o0", owner=user.pw_name, group=group.gr_name) as tun:
            info = (await tun.link.info()).tuntap
            assert info is not None
            assert (info.owner, info.group) == (user.pw_uid, group.gr_gid)

    async def test_owner_none_changes_nothing(self) -> None:
        make("o0", "tun", "user", "0", "group", "0")
        async with aiotun.open_tun("o0"):
            assert self.owned("o0") == ("root", "root")


class TestExclusive:
    async def test_exclusive_creates_a_new_device(self) -> None:
        async with aiotun.open_tun("x0", exclusive=True):
            assert names() == ["x0"]
            assert not tun_flags("x0") & Iff.TUN_EXCL

    async def test_an_old_one_is_left_alone(self) -> None:
        make("x0")
        with pytest.raises(aiotun.DeviceBusyError, match="exists already"):
            await aiotun.open_tun("x0", exclusive=True, addresses=["10.0.0.1/24"])
        assert names() == ["x0"]
        assert addresses("x0") == set()

    @pytest.mark.parametrize("name", [None, "x%d"])
    async def test_a_name_that_the_kernel_picks(self, name: str | None) -> None:
        async with aiotun.open_tun(name, exclusive=True) as tun:
            assert names() == [tun.name]


ALL = OffloadFlag.CSUM | OffloadFlag.TSO4 | OffloadFlag.TSO6


class TestHeaders:
    @both
    async def test_offload_off_has_no_header_and_leaves_nothing_to_us(
        self, open_it: Open, mode: str
    ) -> None:
        async with open_it("h0") as device:
            assert device.offload == "off"
            flags = tun_flags("h0")
            assert flags & Iff.NO_PI
            assert not flags & (Iff.VNET_HDR | Iff.NAPI)
            assert may_leave_to_us("h0") == (False, False)

    @both
    async def test_offload_raw_has_a_10_byte_virtio_header(self, open_it: Open, mode: str) -> None:
        async with open_it("h0", offload="raw") as device:
            assert device.offload == "raw"
            assert tun_flags("h0") & (Iff.VNET_HDR | Iff.NO_PI) == Iff.VNET_HDR | Iff.NO_PI
            assert ask(device.queues[0].fileno(), Ioctl.TUNGETVNETHDRSZ) == 10
            assert may_leave_to_us("h0") == (True, True)

    @both
    @pytest.mark.parametrize("offload", ["off", "raw"])
    async def test_whatever_a_device_remembers(
        self, open_it: Open, mode: str, offload: str
    ) -> None:
        make("h0", mode, "vnet_hdr")
        flags = Iff.VNET_HDR | (Iff.TAP if mode == "tap" else Iff.TUN)
        with held("h0", flags) as (fd,):
            fcntl.ioctl(fd, Ioctl.TUNSETVNETHDRSZ, struct.pack("i", 24))
            fcntl.ioctl(fd, Ioctl.TUNSETOFFLOAD, int(ALL))
        assert may_leave_to_us("h0") == (True, True)
        async with open_it("h0", offload=offload) as device:
            raw = offload == "raw"
            assert may_leave_to_us("h0") == (raw, raw)
            if raw:
                assert ask(device.queues[0].fileno(), Ioctl.TUNGETVNETHDRSZ) == 10
            assert bool(tun_flags("h0") & Iff.VNET_HDR) == raw
            assert tun_data("h0")["pi"] is False

    async def test_offload_follows_the_latest_opening(self) -> None:
        make("h0")
        async with aiotun.open_tun("h0"):
            pass
        async with aiotun.open_tun("h0", offload="raw"):
            assert may_leave_to_us("h0") == (True, True)
        async with aiotun.open_tun("h0"):
            assert may_leave_to_us("h0") == (False, False)

    async def test_checksums_are_whole_after_another_left_them_to_us(self) -> None:
        """A datagram's checksum is right, although an earlier program had enabled offload."""
        make("h0", "tun", "vnet_hdr")
        with held("h0", Iff.TUN | Iff.NO_PI | Iff.VNET_HDR) as (fd,):
            fcntl.ioctl(fd, Ioctl.TUNSETOFFLOAD, int(ALL))
        async with aiotun.open_tun("h0", addresses=["10.0.0.1/24"]) as tun:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"hello!", ("10.0.0.2", 9))
            packet = await asyncio.wait_for(tun.recv(), 5)
        assert len(packet) == 34
        pseudo = packet[12:20] + bytes([0, 17]) + struct.pack("!H", 14)
        total = sum(struct.unpack("!20H", (pseudo + packet[20:]).ljust(40, b"\0")[:40]))
        while total > 0xFFFF:
            total = (total & 0xFFFF) + (total >> 16)
        assert total == 0xFFFF

    async def test_a_second_opening_joins_with_the_same_headers(self) -> None:
        async with aiotun.open_tun("h0", multi_queue=True, offload="raw") as one:
            fcntl.ioctl(one.queues[0].fileno(), Ioctl.TUNSETOFFLOAD, int(OffloadFlag.CSUM))
            async with aiotun.open_tun("h0", multi_queue=True, offload="raw"):
                # The settings of the other program stay.
                assert may_leave_to_us("h0") == (True, False)

    @both
    async def test_packet_info_puts_4_bytes_before_each_packet(
        self, open_it: Open, mode: str
    ) -> None:
        async with open_it("h0", packet_info=True, addresses=["fd00::1/64"]) as device:
            assert tun_data("h0")["pi"] is True
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", ("fd00::2", 9))
            packet = await asyncio.wait_for(device.recv(), 5)
            assert packet[:4] == bytes.fromhex("000086dd")

    async def test_packet_info_off_after_on(self) -> None:
        make("h0", "tun", "pi")
        assert tun_data("h0")["pi"] is True
        async with aiotun.open_tun("h0"):
            assert tun_data("h0")["pi"] is False

    @both
    async def test_napi_sets_the_flag(self, open_it: Open, mode: str) -> None:
        async with open_it("h0", napi=True, queues=2):
            assert tun_flags("h0") & Iff.NAPI

    @both
    @pytest.mark.parametrize("persistent", [False, True])
    async def test_carrier_can_be_off_and_is_on_by_default(
        self, open_it: Open, mode: str, persistent: bool
    ) -> None:
        if persistent:
            make("h0", mode)
        async with open_it("h0", carrier=False):
            await wait_until(lambda: "NO-CARRIER" in link("h0")["flags"])
        async with open_it("h0", carrier=True):
            await wait_until(lambda: "NO-CARRIER" not in link("h0")["flags"])
        async with open_it("h0"):
            await wait_until(lambda: "NO-CARRIER" not in link("h0")["flags"])

    @both
    async def test_sndbuf_is_set_on_every_queue(self, open_it: Open, mode: str) -> None:
        async with open_it("h0", sndbuf=65_536, queues=2) as device:
            found = [ask(queue.fileno(), Ioctl.TUNGETSNDBUF) for queue in device.queues]
            assert found == [65_536, 65_536]

    async def test_sndbuf_is_unlimited_unless_given(self) -> None:
        async with aiotun.open_tun("h0") as tun:
            assert ask(tun.queues[0].fileno(), Ioctl.TUNGETSNDBUF) == 2**31 - 1


class TestAgain:
    async def test_with_the_same_options_nothing_changes(self) -> None:
        options: dict[str, Any] = {
            "addresses": ["10.0.0.1/24", "fd00::1/64", "10.1.0.1 peer 10.1.0.2/32"],
            "routes": ["10.2.0.0/16 via 10.0.0.2", "fd02::/64 metric 5"],
            "mtu": 1400,
            "txqueuelen": 77,
            "gso_max_segs": 45,
            "gso_max_size": 60_000,
            "persist": True,
            "owner": 0,
            "mac": "02:00:00:00:00:01",
        }
        shown = []
        for _ in range(2):
            async with aiotun.open_tap("again0", **options):
                shown.append((link("again0"), addresses("again0"), routes("again0")))
        for each, _, _ in shown:
            each.pop("operstate")
        assert shown[0] == shown[1]

    async def test_many_devices_can_be_opened_at_once(self) -> None:
        async def one(number: int) -> None:
            async with aiotun.open_tun(addresses=[f"10.0.{number}.1/24"]) as tun:
                assert addresses(tun.name) == {f"10.0.{number}.1/24"}

        await asyncio.gather(*(one(number) for number in range(20)))
        assert names() == []

    async def test_one_name_for_many_at_once(self) -> None:
        """Exactly one opening gets the name, and the others don't disturb it."""

        async def one(number: int) -> aiotun.TunDevice:
            return await aiotun.open_tun("again0", addresses=[f"10.0.{number}.1/24"])

        results = await asyncio.gather(*(one(n) for n in range(8)), return_exceptions=True)
        winners = [each for each in results if isinstance(each, aiotun.TunDevice)]
        busy = [each for each in results if isinstance(each, aiotun.DeviceBusyError)]
        async with contextlib.AsyncExitStack() as stack:
            for tun in winners:
                await stack.enter_async_context(tun)
            assert (len(winners), len(busy)) == (1, 7)
            assert addresses("again0") == {f"10.0.{results.index(winners[0])}.1/24"}
            assert tun_data("again0")["persist"] is False
        assert names() == []

    async def test_one_multi_queue_device_for_many_at_once(self) -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def one() -> aiotun.TunDevice:
                opener = aiotun.open_tun("again0", multi_queue=True)
                return await stack.enter_async_context(opener)

            tuns = await asyncio.gather(*(one() for _ in range(8)))
            assert tun_data("again0")["numqueues"] == 8
            assert len({tun.index for tun in tuns}) == 1
            for tun in tuns:
                assert names() == ["again0"]
                await tun.aclose()
            assert names() == []

    @pytest.mark.parametrize("step", ["add_address", "add_route"])
    async def test_options_that_another_program_sets_meanwhile_are_no_error(
        self, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Programs that share a device ask for the same addresses and routes; none may fail.

        Another program adds them between our listing and our adding.
        """
        make("again0")
        ip("link", "set", "again0", "up")
        original = getattr(Session, step)

        async def adding(self: Session, *args: Any) -> None:
            if step == "add_address":
                ip("addr", "add", "10.0.0.1/24", "dev", "again0")
            else:
                ip("route", "add", "10.1.0.0/16", "dev", "again0")
            await original(self, *args)

        monkeypatch.setattr(Session, step, adding)
        async with aiotun.open_tun("again0", addresses=["10.0.0.1/24"], routes=["10.1.0.0/16"]):
            assert addresses("again0") == {"10.0.0.1/24"}
            assert "10.1.0.0/16" in {each["dst"] for each in routes("again0")}


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for the user's."""


class TestBlocking:
    """`open_blocking`: the same opening where nothing can be awaited."""

    @both
    def test_it_opens_without_a_loop_and_any_loop_may_use_it(
        self, open_it: Open, mode: str
    ) -> None:
        device = open_it("b0", addresses=["10.0.0.1/24"], mtu=1400).open_blocking()
        assert (device.name, device.mode, device.mtu) == ("b0", mode, 1400)
        assert "10.0.0.1/24" in addresses("b0")
        assert is_up("b0")

        async def use() -> int:
            async with asyncio.timeout(5):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.sendto(b"x", ("10.0.0.2", 9))
                return len(await device.recv())

        assert asyncio.run(use()) > 0
        device.close()
        assert names() == []

    async def test_it_opens_inside_a_running_loop(self) -> None:
        device = aiotun.open_tun("b0", addresses=["10.0.0.1/24"]).open_blocking()
        assert "10.0.0.1/24" in addresses("b0")
        await device.aclose()
        assert names() == []

    def test_it_opens_in_another_namespace_and_leaves_the_thread_here(self) -> None:
        here = os.stat("/proc/thread-self/ns/net").st_ino
        with another_namespace() as netns:
            with contextlib.closing(aiotun.open_tun("b0", netns=netns).open_blocking()):
                assert names() == []
                assert "b0" in inside(netns, "ip", "-br", "link")
            assert os.stat("/proc/thread-self/ns/net").st_ino == here

    def test_a_failed_step_is_undone(self) -> None:
        with pytest.raises(aiotun.LinkError, match="nowhere"):
            aiotun.open_tap("b0", bridge="nowhere").open_blocking()
        assert names() == []

    def test_an_opener_can_be_used_once(self) -> None:
        opener = aiotun.open_tun("b0")
        with (
            contextlib.closing(opener.open_blocking()),
            pytest.raises(RuntimeError, match="can be used once"),
        ):
            opener.open_blocking()

    @pytest.fixture
    def interrupts(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            raise Interrupted

        before = signal.signal(signal.SIGUSR1, interrupt)
        yield
        signal.signal(signal.SIGUSR1, before)

    def test_an_interrupt_undoes_every_step(
        self, interrupts: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C raises in the thread that waits; the thread that opens must end and undo."""
        get, main = Session.get, threading.get_ident()

        async def interrupting(session: Session, *which: Any) -> Any:
            signal.pthread_kill(main, signal.SIGUSR1)
            return await get(session, *which)

        monkeypatch.setattr(Session, "get", interrupting)
        with pytest.raises(Interrupted):
            aiotun.open_tun("b0").open_blocking()
        assert names() == []

    def test_a_second_interrupt_stops_no_undoing(
        self, interrupts: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, main = Opening.run, threading.get_ident()
        aborted = threading.Event()

        def interrupting(opening: Opening) -> Any:
            signal.pthread_kill(main, signal.SIGUSR1)
            assert aborted.wait(5)
            opened = run(opening)
            signal.pthread_kill(main, signal.SIGUSR1)
            return opened

        # Only noted: the opening goes on, so that there is something to undo.
        monkeypatch.setattr(Opening, "run", interrupting)
        monkeypatch.setattr(Opening, "abort", lambda opening: aborted.set())
        for _ in range(20):
            aborted.clear()
            with pytest.raises(Interrupted):
                aiotun.open_tun("b0").open_blocking()
            assert aborted.is_set()
            assert names() == []

    def test_an_interrupt_after_the_last_step_undoes_them_all(
        self, interrupts: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, abort, main = Opening.run, Opening.abort, threading.get_ident()
        aborted = threading.Event()

        def interrupting(opening: Opening) -> Any:
            opened = run(opening)
            signal.pthread_kill(main, signal.SIGUSR1)
            assert aborted.wait(5)
            return opened

        def noticing(opening: Opening) -> None:
            abort(opening)
            aborted.set()

        make("b0")
        before = state("b0")
        monkeypatch.setattr(Opening, "run", interrupting)
        monkeypatch.setattr(Opening, "abort", noticing)
        with pytest.raises(Interrupted):
            aiotun.open_tun("b0", mtu=1300, addresses=["10.0.0.1/24"]).open_blocking()
        assert changes("b0", before) == []
