"""Links on the real kernel, checked with `ip`."""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import itertools
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from aiotun._kernel import threads
from aiotun._kernel.abi import Iff
from aiotun._kernel.interface import Interface
from aiotun._kernel.namespaces import NamespaceFd
from aiotun._link import session as link_session
from aiotun._link.info import LinkInfo, TunTapInfo
from aiotun._link.session import Session, in_session
from aiotun._link.values import parse_address, parse_route
from aiotun.device import open_tap
from aiotun.errors import LinkError, NotPermittedError
from aiotun.link import Link

from ..helpers import REAL_ROOT, need, wait_until

_numbers = itertools.count()


def run(*command: str, netns: str | None = None) -> str:
    """Run a command, in a namespace if given, and return its output."""
    prefix = ["nsenter", f"--net={netns}"] if netns else []
    words = [*prefix, need(command[0]), *command[1:]]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def ip(words: str, netns: str | None = None) -> list[Any]:
    """Run `ip -j`, which prints nothing when it changes something."""
    printed = run("ip", "-j", "-d", *words.split(), netns=netns)
    # iproute2 writes an empty object for each entry that it filters out.
    return [each for each in json.loads(printed or "[]") if each]


def show(name: str, netns: str | None = None) -> Any:
    (only,) = ip(f"-s addr show dev {name}", netns)
    return only


def child(code: str, *prefix: str) -> str:
    """Run code in a new Python process, with warnings as errors, and return its output."""
    return run(*prefix, sys.executable, "-W", "error", "-c", textwrap.dedent(code))


@contextlib.contextmanager
def attached(name: str, flags: int = 0) -> Iterator[None]:
    """Have a child attached to a TAP device."""
    code = f"""
        import os, sys
        from aiotun._kernel import abi
        from fcntl import ioctl
        fd = os.open(abi.NODE, os.O_RDWR)
        flags = abi.Iff.TAP | abi.Iff.NO_PI | {flags}
        ioctl(fd, abi.Ioctl.TUNSETIFF, abi.IFREQ.pack({name!r}.encode(), flags))
        print("attached", flush=True)
        sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"attached\n"
    try:
        yield
    finally:
        holder.communicate()


def join_threads() -> None:
    """Wait for the requests' threads to end: each closes its namespace last."""
    for thread in threading.enumerate():
        if thread.name == "aiotun":
            thread.join()


def named_namespaces() -> list[str]:
    folder = Path("/run/netns")
    return os.listdir(folder) if folder.is_dir() else []


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def make() -> Iterator[Callable[..., str]]:
    """Make persistent TUN and TAP devices and bridges, and delete them at the end."""
    made: list[str] = []

    def make_one(kind: str, more: str = "") -> str:
        name = f"t{os.getpid()}x{next(_numbers)}"
        made.append(name)
        if kind == "bridge":
            ip(f"link add {name} type bridge")
        else:
            ip(f"tuntap add {name} mode {kind} {more}")
        return name

    yield make_one
    left = {each["ifname"] for each in ip("link show")}
    for name in made:
        if name in left:
            ip(f"link del {name}")


@pytest.fixture
def tap(make: Callable[..., str]) -> str:
    return make("tap")


@pytest.fixture
def tun(make: Callable[..., str]) -> str:
    return make("tun")


class Elsewhere:
    """An anonymous network namespace, which lives as long as a child process."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._child.stdout is not None
        assert self._child.stdout.readline() == b"ready\n"
        self.path = f"/proc/{self._child.pid}/ns/net"

    def end(self) -> None:
        """End the child; the namespace lives on if something else holds it."""
        self._child.communicate()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    namespace = Elsewhere()
    yield namespace
    namespace.end()


class TestInfo:
    async def test_info_of_a_tap_agrees_with_iproute2(self, tap: str) -> None:
        info = await Link(tap).info()
        shown = show(tap)
        assert info == LinkInfo(
            name=tap,
            index=shown["ifindex"],
            mtu=shown["mtu"],
            mac=shown["address"],
            up=False,
            carrier=False,
            master=None,
            alias=None,
            txqueuelen=shown["txqlen"],
            tuntap=TunTapInfo(
                name=tap,
                index=shown["ifindex"],
                mode="tap",
                multi_queue=False,
                queues=0,
                persist=True,
                owner=None,
                group=None,
                packet_info=False,
                vnet_header=False,
                attached=False,
            ),
            gso_max_segs=shown["gso_max_segs"],
            gso_max_size=shown["gso_max_size"],
        )

    async def test_every_tun_option(self, make: Callable[..., str]) -> None:
        name = make("tun", "multi_queue pi vnet_hdr user 0 group 0")
        info = await Link(name).info()
        assert info.mac is None
        assert info.tuntap is not None
        assert (info.tuntap.mode, info.tuntap.multi_queue) == ("tun", True)
        assert (info.tuntap.packet_info, info.tuntap.vnet_header) == (True, True)
        assert (info.tuntap.owner, info.tuntap.group) == (0, 0)
        assert (info.tuntap.queues, info.tuntap.attached) == (0, False)

    async def test_info_of_other_interfaces_has_no_tuntap(self, make: Callable[..., str]) -> None:
        assert (await Link("lo").info()).tuntap is None
        assert (await Link(make("bridge")).info()).tuntap is None

    @pytest.mark.parametrize("options", ["", "multi_queue"])
    async def test_info_shows_whether_a_program_is_attached(
        self, make: Callable[..., str], options: str
    ) -> None:
        name = make("tap", options)
        with attached(name, Iff.MULTI_QUEUE if options else 0):
            during = (await Link(name).info()).tuntap
        after = (await Link(name).info()).tuntap
        assert during is not None
        assert (during.attached, during.queues) == (True, 1)
        assert after is not None
        assert (after.attached, after.queues) == (False, 0)

    async def test_info_of_a_missing_interface_raises_link_error(self) -> None:
        with pytest.raises(LinkError, match="there is no interface nowhere0") as caught:
            await Link("nowhere0").info()
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "nowhere0")
        assert "ip link" in str(caught.value)

    async def test_a_link_says_that_its_name_belongs_to_another_interface_now(self) -> None:
        async with open_tap("again0", persist=True) as tap:
            ip("link del again0")
            ip("tuntap add again0 mode tap")
            for request in (tap.link.info, tap.link.up, tap.link.events().__aenter__):
                with pytest.raises(LinkError, match="is another interface") as caught:
                    await request()
                assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "again0")
                assert "open the device again" in str(caught.value)
        assert (await Link("again0").info()).index != tap.index

    async def test_stats_count_packets_dropped_by_the_kernel(self, tap: str) -> None:
        """A queue of length 0 drops all packets: here the neighbor request for a datagram."""
        ip(f"addr add 192.0.2.1/24 dev {tap}")
        # Before it is up, so that there is no queueing discipline that drops the packets first.
        ip(f"link set {tap} txqueuelen 0")
        ip(f"link set {tap} up")
        with attached(tap), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", ("192.0.2.2", 9))
            await wait_until(lambda: show(tap)["stats64"]["tx"]["dropped"] > 0)
            before = show(tap)["stats64"]["tx"]["dropped"]
            counted = await Link(tap).stats()
            after = show(tap)["stats64"]["tx"]["dropped"]
        # The kernel may send a packet by itself at any time.
        assert before <= counted.tx_dropped <= after


class TestSetting:
    async def test_up_and_down_change_the_state(self, tap: str) -> None:
        link = Link(tap)
        await link.up()
        assert "UP" in show(tap)["flags"]
        assert (await link.info()).up
        await link.down()
        assert "UP" not in show(tap)["flags"]

    async def test_set_mtu_changes_the_mtu_and_info_follows_others(self, tun: str) -> None:
        link = Link(tun)
        known = [link._interface.mtu]
        await link.set_mtu(1400)
        assert show(tun)["mtu"] == 1400
        known.append(link._interface.mtu)
        ip(f"link set {tun} mtu 1300")
        assert (await link.info()).mtu == 1300
        assert [*known, link._interface.mtu] == [None, 1400, 1300]

    @pytest.mark.parametrize(
        ("mtu", "sentence"),
        [(67, "mtu less than device minimum"), (65536, "mtu greater than device maximum")],
    )
    async def test_mtu_that_the_kernel_refuses(self, tun: str, mtu: int, sentence: str) -> None:
        link = Link(tun)
        with pytest.raises(LinkError, match=sentence) as caught:
            await link.set_mtu(mtu)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, tun)
        assert "maxmtu" in str(caught.value)
        assert caught.value.__cause__ is not None
        assert link._interface.mtu == 1500

    async def test_set_mac_works_up_and_down(self, tap: str) -> None:
        link = Link(tap)
        await link.set_mac("02:00:00:00:0A:01")
        assert show(tap)["address"] == "02:00:00:00:0a:01"
        await link.up()
        await link.set_mac("02:00:00:00:0a:02")
        assert (await link.info()).mac == show(tap)["address"] == "02:00:00:00:0a:02"

    async def test_a_tun_has_no_mac(self, tun: str) -> None:
        with pytest.raises(LinkError, match="TUN device has no MAC") as caught:
            await Link(tun).set_mac("02:00:00:00:00:01")
        assert caught.value.errno == errno.EOPNOTSUPP

    async def test_set_txqueuelen_changes_the_queue_length(self, tap: str) -> None:
        link = Link(tap)
        await link.set_txqueuelen(50)
        assert (await link.info()).txqueuelen == show(tap)["txqlen"] == 50

    async def test_a_txqueuelen_that_no_ring_has(self) -> None:
        """The kernel says EPERM, even to root, but the cause is not a missing privilege.

        Newer kernels say ERANGE, for shorter queues, too.
        """
        async with open_tap("tap0") as device:
            with pytest.raises(LinkError, match=r"at most (524288|32767) packets") as caught:
                await device.link.set_txqueuelen(10**8)
            longest = 32_767 if caught.value.errno == errno.ERANGE else 524_288
            assert f"at most {longest} packets" in str(caught.value)
            await device.link.set_txqueuelen(longest)
            assert (await device.link.info()).txqueuelen == longest

    async def test_set_gso_max_limits_what_the_kernel_sends(self, tap: str) -> None:
        link = Link(tap)
        await link.set_gso_max(segs=45)
        assert (show(tap)["gso_max_segs"], show(tap)["gso_max_size"]) == (45, 65_536)
        await link.set_gso_max(size=60_000)
        await link.set_gso_max(segs=44, size=61_000)
        info = await link.info()
        assert (info.gso_max_segs, info.gso_max_size) == (44, 61_000)
        assert (show(tap)["gso_max_segs"], show(tap)["gso_max_size"]) == (44, 61_000)

    @pytest.mark.parametrize("limits", [{"segs": 65_536}, {"size": 100_000}])
    async def test_a_gso_limit_that_the_kernel_refuses(
        self, tap: str, limits: dict[str, int]
    ) -> None:
        before = show(tap)
        with pytest.raises(LinkError, match="tso_max_size") as caught:
            await Link(tap).set_gso_max(**limits)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, tap)
        assert show(tap) == before

    async def test_set_gso_max_needs_a_limit(self, tap: str) -> None:
        with pytest.raises(TypeError, match="'segs', 'size' or both"):
            await Link(tap).set_gso_max()

    async def test_set_alias_sets_and_removes_the_alias(self, tap: str) -> None:
        link = Link(tap)
        for text in ("site A: ünïcode", "x" * 254):
            await link.set_alias(text)
            assert (await link.info()).alias == show(tap)["ifalias"] == text
        await link.set_alias("")
        assert (await link.info()).alias is None
        assert not show(tap).get("ifalias")

    async def test_rename_follows_the_new_name(self, tap: str) -> None:
        link = Link(tap)
        index = (await link.info()).index
        other = f"{tap}r"
        await link.rename(other)
        assert link.name == other
        assert show(other)["ifindex"] == index
        await link.rename("ü%d")
        assert link.name == "ü0"
        await link.rename(tap)
        assert (await link.info()).name == link.name == tap

    async def test_rename_while_up(self, tap: str) -> None:
        """Newer kernels allow it; older ones say EBUSY, and the error says what to do."""
        link = Link(tap)
        await link.up()
        try:
            await link.rename(f"{tap}r")
        except LinkError as error:
            assert "down first" in str(error)  # noqa: PT017 - the kernel's choice
            assert link.name == tap
        else:
            assert show(f"{tap}r")["operstate"] is not None
        await link.down()
        await link.rename(tap)

    async def test_busy_rename_says_what_to_do(
        self, tap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def busy(self: Session, info: LinkInfo, *_: object, **__: object) -> None:
            raise LinkError(errno.EBUSY, "Device or resource busy", info.name)

        monkeypatch.setattr(Session, "set", busy)
        with pytest.raises(LinkError, match="take it down first") as caught:
            await Link(tap).rename("other0")
        assert caught.value.errno == errno.EBUSY

    async def test_rename_to_a_taken_name(self, tap: str) -> None:
        with pytest.raises(LinkError, match="choose another name") as caught:
            await Link(tap).rename("lo")
        assert caught.value.errno == errno.EEXIST

    async def test_set_master_joins_and_leaves_a_bridge(
        self, tap: str, make: Callable[..., str]
    ) -> None:
        bridge, link = make("bridge"), Link(tap)
        await link.set_master(bridge)
        assert (await link.info()).master == show(tap)["master"] == bridge
        await link.set_master(None)
        assert (await link.info()).master is None
        assert "master" not in show(tap)

    async def test_set_master_with_a_missing_bridge_raises_link_error(self, tap: str) -> None:
        with pytest.raises(LinkError, match="no interface nobridge0") as caught:
            await Link(tap).set_master("nobridge0")
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "nobridge0")

    async def test_a_bridge_takes_no_tun(self, tun: str, make: Callable[..., str]) -> None:
        with pytest.raises(LinkError, match="use a TAP device") as caught:
            await Link(tun).set_master(make("bridge"))
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, tun)

    async def test_set_master_to_an_interface_that_is_no_bridge_is_refused(
        self, tap: str, tun: str
    ) -> None:
        with pytest.raises(LinkError, match=f"check that {tun} is a bridge"):
            await Link(tap).set_master(tun)


class TestAddresses:
    @pytest.mark.parametrize(
        "text",
        [
            "10.0.0.1/24",
            "10.0.0.1/32",
            "127.8.0.1/16",
            "fd00::1/64",
            "fe80::77/64",
            "10.0.0.1 peer 10.0.0.2/32",
            "10.0.0.1 peer 10.9.0.2/16",
            "fd00::1 peer fd00::2/128",
        ],
    )
    async def test_addresses_are_added_and_removed(self, tap: str, text: str) -> None:
        link, address = Link(tap), parse_address(text)
        await link.up()
        await link.add_address(text)
        (shown,) = (
            each for each in show(tap)["addr_info"] if each["local"] == str(address.interface.ip)
        )
        expected = address.peer or address.interface
        assert shown["prefixlen"] == expected.network.prefixlen
        assert shown.get("address") == (str(address.peer.ip) if address.peer else None)
        assert shown["scope"] == address.scope
        assert address in await link.addresses()
        await link.remove_address(text)
        assert address not in await link.addresses()

    async def test_addresses_that_iproute2_added_are_read(self, tap: str) -> None:
        ip(f"addr add 10.0.0.1/24 brd + dev {tap}")
        ip(f"addr add 10.1.0.1 peer 10.1.0.2/24 scope 7 dev {tap}")
        ip(f"addr add fd00::1 peer fd00::2/64 dev {tap}")
        found = await Link(tap).addresses()
        assert {(str(each), each.scope) for each in found} == {
            ("10.0.0.1/24", "global"),
            ("10.1.0.1 peer 10.1.0.2/24", "7"),
            ("fd00::1 peer fd00::2/64", "global"),
        }
        for each in found:
            await Link(tap).remove_address(each)
        assert await Link(tap).addresses() == []

    async def test_add_address_takes_an_ipaddress_object(self, tap: str) -> None:
        await Link(tap).add_address(IPv4Interface("10.0.0.1/24"))
        assert [str(each) for each in await Link(tap).addresses()] == ["10.0.0.1/24"]

    async def test_ipv6_is_usable_at_once(self, tap: str) -> None:
        link = Link(tap)
        await link.up()
        await link.add_address("fd00::1/64")
        (shown,) = (each for each in show(tap)["addr_info"] if each["local"] == "fd00::1")
        assert not shown.get("tentative")

    async def test_adding_an_address_twice_raises_link_error(self, tap: str) -> None:
        link = Link(tap)
        await link.add_address("10.0.0.1/24")
        with pytest.raises(LinkError, match=r"10\.0\.0\.1/24") as caught:
            await link.add_address("10.0.0.1/24")
        assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, tap)

    async def test_removing_a_missing_address_raises_link_error(self, tap: str) -> None:
        with pytest.raises(LinkError, match="addresses\\(\\) lists") as caught:
            await Link(tap).remove_address("10.0.0.1/24")
        assert caught.value.errno == errno.EADDRNOTAVAIL


class TestRoutes:
    @pytest.fixture
    async def link(self, tap: str) -> Link:
        link = Link(tap)
        await link.up()
        await link.add_address("10.0.0.1/24")
        await link.add_address("fd00::1/64")
        return link

    @pytest.mark.parametrize(
        "text",
        [
            "10.2.0.0/16",
            "10.2.3.4",
            "10.2.0.0/16 via 10.0.0.2",
            "10.2.0.0/16 via 10.0.0.2 metric 50 table 1000",
            "10.2.0.0/16 metric 4294967295",
            "default",
            "default via 10.0.0.2",
            "default table 7",
            "fd01::/64",
            "fd01::5",
            "fd01::/64 via fd00::2 metric 50 table 100000",
            "fd01::/64 via fe80::9",
            "::/0",
            "default via fd00::2",
        ],
    )
    async def test_routes_are_added_and_removed(self, link: Link, text: str) -> None:
        route = parse_route(text)
        await link.add_route(text)
        (shown,) = (
            each
            for each in ip(
                f"-{route.dst.version} route show table {route.table} dev {link.name} "
                f"proto static root {route.dst}"
            )
            if not each["dst"].startswith("ff00")
        )
        host = route.dst.num_addresses == 1
        everything = route.dst.prefixlen == 0
        written = str(route.dst.network_address) if host else str(route.dst)
        assert shown["dst"] == ("default" if everything else written)
        assert shown.get("gateway") == (str(route.via) if route.via else None)
        default = None if route.dst.version == 4 else 1024
        assert shown.get("metric") == (route.metric or default)
        assert route in await link.routes()
        await link.remove_route(text)
        assert route not in await link.routes()

    async def test_add_route_takes_ipaddress_objects(self, link: Link) -> None:
        network, gateway = IPv4Network("10.2.0.0/16"), IPv4Address("10.0.0.2")
        await link.add_route(network, gateway, metric=5, table=99)
        await link.add_route(gateway)
        routes = await link.routes()
        assert parse_route("10.2.0.0/16 via 10.0.0.2 metric 5 table 99") in routes
        assert parse_route("10.0.0.2") in routes

    async def test_a_gateway_behind_a_route(self, link: Link) -> None:
        """This shows that on-link routes have link scope, as `ip` sets it."""
        await link.add_route("192.0.2.1")
        await link.add_route("default", via="192.0.2.1")
        (shown,) = ip(f"route show 192.0.2.1 dev {link.name}")
        assert shown["scope"] == "link"

    @pytest.mark.parametrize(
        ("dst", "via"),
        [("default", "172.31.1.1"), ("::/0", "fd77::1"), ("10.9.0.0/16", "10.7.0.1")],
    )
    async def test_a_gateway_outside_of_all_networks(self, link: Link, dst: str, via: str) -> None:
        """As on WSL and some clouds: the error names two solutions, and each works."""
        with pytest.raises(LinkError) as caught:
            await link.add_route(dst, via)
        assert caught.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        written = str(parse_route(dst, via).dst)
        first, onlink = f"'{via}/{128 if ':' in via else 32}'", f"'{written} via {via} onlink'"
        assert first in str(caught.value)
        assert onlink in str(caught.value)

        await link.add_route(onlink.strip("'"))
        (route,) = (each for each in await link.routes() if str(each.via) == via)
        assert str(route) == onlink.strip("'")
        family = "-6" if ":" in via else "-4"
        (shown,) = (each for each in ip(f"{family} route show") if each.get("gateway") == via)
        assert "onlink" in shown["flags"]
        await link.remove_route(route)
        await link.add_route(dst, via, onlink=True)
        await link.remove_route(dst, via)
        assert route not in await link.routes()

        await link.add_route(first.strip("'"))
        await link.add_route(dst, via)
        (route,) = (each for each in await link.routes() if str(each.via) == via)
        assert not route.onlink

    async def test_onlink_of_one_hop_among_several(self, link: Link) -> None:
        hops = f"nexthop via 10.0.0.2 dev {link.name} nexthop via 172.31.1.1 dev {link.name} onlink"
        ip(f"route add 10.6.0.0/16 {hops}")
        found = {str(route) for route in await link.routes()}
        assert {"10.6.0.0/16 via 10.0.0.2", "10.6.0.0/16 via 172.31.1.1 onlink"} <= found

    async def test_routes_are_only_this_links_unicast_routes(
        self, link: Link, make: Callable[..., str]
    ) -> None:
        other = make("tap")
        ip(f"link set {other} up")
        ip(f"route add 10.7.0.0/16 dev {other}")
        ip("route add unreachable 10.8.0.0/16")
        ip(f"route add 10.9.0.0/16 via inet6 fe80::9 dev {link.name}")
        ip(f"route add 10.6.0.0/16 nexthop dev {other} nexthop via 10.0.0.2 dev {link.name}")
        routes = await link.routes()
        ip("route del unreachable 10.8.0.0/16")
        assert {str(route) for route in routes if route.dst.version == 4} == {
            "10.0.0.0/24",
            "10.9.0.0/16 via fe80::9",
            "10.6.0.0/16 via 10.0.0.2",
        }
        assert all(not route.dst.is_multicast for route in routes)
        (odd,) = (route for route in routes if str(route.via) == "fe80::9")
        await link.remove_route(odd)
        await link.add_route(odd)
        assert odd in await link.routes()

    async def test_adding_a_route_twice_raises_link_error(self, link: Link) -> None:
        await link.add_route("10.2.0.0/16")
        with pytest.raises(LinkError, match=r"10\.2\.0\.0/16") as caught:
            await link.add_route("10.2.0.0/16")
        assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, link.name)

    async def test_removing_a_missing_route_raises_link_error(self, link: Link) -> None:
        with pytest.raises(LinkError, match="routes\\(\\) lists") as caught:
            await link.remove_route("10.2.0.0/16")
        assert caught.value.errno == errno.ESRCH

    async def test_a_gateway_that_cannot_be_reached_is_refused(self, link: Link) -> None:
        with pytest.raises(LinkError, match="Nexthop has invalid gateway"):
            await link.add_route("10.2.0.0/16 via 192.0.2.1")

    async def test_a_route_on_a_link_that_is_down_is_refused(self, tap: str) -> None:
        with pytest.raises(LinkError, match="bring the link up first") as caught:
            await Link(tap).add_route("10.2.0.0/16")
        assert caught.value.errno == errno.ENETDOWN


class TestNamespaces:
    async def test_a_link_in_a_namespace_given_by_path(self, elsewhere: Elsewhere) -> None:
        ip("tuntap add there0 mode tun", elsewhere.path)
        here = os.stat("/proc/thread-self/ns/net").st_ino
        link = Link("there0", netns=elsewhere.path)
        await link.set_mtu(1234)
        assert show("there0", elsewhere.path)["mtu"] == 1234
        assert os.stat("/proc/thread-self/ns/net").st_ino == here
        with pytest.raises(LinkError):
            await Link("there0").info()

    async def test_a_link_duplicates_the_namespaces_fd(self, elsewhere: Elsewhere) -> None:
        fd = os.open(elsewhere.path, os.O_RDONLY)
        link = Link("lo", netns=fd)
        os.close(fd)
        await link.up()
        assert "UP" in show("lo", elsewhere.path)["flags"]

    async def test_a_link_in_a_namespace_given_by_name(self) -> None:
        if not REAL_ROOT:
            pytest.skip("'ip netns add' does not work in a user namespace")
        run("ip", "netns", "add", "blue")
        try:
            link = Link("lo", netns="blue")
            await link.up()
            assert "UP" in show("lo", "/run/netns/blue")["flags"]
        finally:
            run("ip", "netns", "del", "blue")
        assert (await link.info()).up  # the link holds the namespace

    async def test_a_link_holds_its_namespace_open(self) -> None:
        elsewhere = Elsewhere()
        ip("tuntap add there0 mode tap", elsewhere.path)
        link = Link("there0", netns=Path(elsewhere.path))
        await link.up()
        elsewhere.end()
        await link.set_mtu(1300)
        assert (await link.info()).mtu == 1300

    async def test_nothing_is_opened_before_it_is_used(self) -> None:
        before = fds()
        link = Link("lo", netns="nowhere")
        assert fds() == before
        with pytest.raises(LinkError, match="ip netns add") as caught:
            await link.info()
        assert caught.value.errno == errno.ENOENT
        assert "nowhere" not in named_namespaces()

    @pytest.fixture
    def uncollected(self) -> Iterator[None]:
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.usefixtures("uncollected")
    async def test_the_fd_goes_with_the_link(self, elsewhere: Elsewhere) -> None:
        """Immediately, without the garbage collector, also after an error."""
        link = Link("lo", netns=elsewhere.path)
        with pytest.raises(LinkError):
            await link.remove_address("192.0.2.1/32")
        assert link._interface.namespace is not None
        fd = link._interface.namespace.fd
        os.fstat(fd)
        del link
        join_threads()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    async def test_a_devices_link_is_found_by_index_after_a_rename(self, tap: str) -> None:
        """The link is found by its index, so that another program may rename it."""
        index = show(tap)["ifindex"]
        namespace = NamespaceFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        link = Link._held(Interface(tap, index, None, namespace))
        other = f"{tap}r"
        ip(f"link set {tap} name {other}")
        assert link.name == tap
        await link.up()
        assert (await link.info()).name == link.name == other
        await link.down()  # Linux 5.10 renames no link that is up
        await link.rename(tap)
        ip(f"link del {tap}")
        with pytest.raises(LinkError, match=f"no interface {tap}") as caught:
            await link.info()
        assert caught.value.errno == errno.ENODEV

    def test_fd_that_is_not_open(self) -> None:
        with pytest.raises(LinkError, match="not an open fd") as caught:
            Link("lo", netns=999_999)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="not a valid fd"):
            Link("lo", netns=-1)

    async def test_fd_that_is_no_namespace(self) -> None:
        fd = os.open("/dev/null", os.O_RDONLY)
        link = Link("lo", netns=fd)
        os.close(fd)
        with pytest.raises(LinkError, match="not a network namespace"):
            await link.info()


class TestRefusals:
    """An error of the kernel names the interface and the request."""

    @pytest.mark.parametrize(
        ("method", "arguments", "code", "words"),
        [
            ("set_mtu", (67,), errno.EINVAL, "set the MTU to 67"),
            ("set_mac", ("02:00:00:00:00:01",), errno.EOPNOTSUPP, "set the MAC to 02:00"),
            ("rename", ("lo",), errno.EEXIST, "set the name to lo"),
            ("set_master", ("lo",), errno.EOPNOTSUPP, "set the master to lo"),
            ("add_address", ("10.0.0.1/24",), errno.EEXIST, "add the address 10.0.0.1/24"),
            ("remove_address", ("10.9.0.1/24",), errno.EADDRNOTAVAIL, "remove the address 10.9"),
            ("add_route", ("10.2.0.0/16",), errno.ENETDOWN, "add the route 10.2.0.0/16"),
            ("remove_route", ("10.3.0.0/16",), errno.ESRCH, "remove the route 10.3.0.0/16"),
            ("move_to_netns", ("/dev/null",), errno.EINVAL, "not a network namespace"),
        ],
    )
    async def test_a_refused_request_says_what_it_was(
        self, tun: str, method: str, arguments: tuple[str, ...], code: int, words: str
    ) -> None:
        ip(f"addr add 10.0.0.1/24 dev {tun}")
        before = show(tun)
        with pytest.raises(LinkError) as caught:
            await getattr(Link(tun), method)(*arguments)
        assert caught.value.errno == code
        assert words in str(caught.value)
        if method != "move_to_netns":
            assert f" on {tun}: " in str(caught.value)
            assert caught.value.filename == tun
        assert show(tun) == before

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("up", ()),
            ("down", ()),
            ("set_mtu", (1400,)),
            ("set_mac", ("02:00:00:00:00:01",)),
            ("set_txqueuelen", (5,)),
            ("set_alias", ("x",)),
            ("rename", ("other0",)),
            ("set_master", (None,)),
            ("move_to_netns", ("/proc/self/ns/net",)),
            ("add_address", ("10.0.0.1/24",)),
            ("remove_address", ("10.0.0.1/24",)),
            ("addresses", ()),
            ("add_route", ("default",)),
            ("remove_route", ("default",)),
            ("routes", ()),
            ("info", ()),
            ("stats", ()),
        ],
    )
    async def test_no_such_link_or_namespace(
        self, method: str, arguments: tuple[object, ...]
    ) -> None:
        with pytest.raises(LinkError, match="no interface nowhere0") as caught:
            await getattr(Link("nowhere0"), method)(*arguments)
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "nowhere0")
        with pytest.raises(LinkError, match="ip netns add") as caught:
            await getattr(Link("lo", netns="nowhere"), method)(*arguments)
        assert caught.value.errno == errno.ENOENT
        assert "nowhere" not in named_namespaces()


class TestWrongArguments:
    @pytest.mark.parametrize("name", ["", "a" * 16, "a/b", ".."])
    def test_a_link_refuses_an_invalid_name(self, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            Link(name)

    @pytest.mark.parametrize("netns", [1.5, b"name", True])
    def test_a_link_refuses_a_netns_of_the_wrong_type(self, netns: Any) -> None:
        with pytest.raises(TypeError, match="netns"):
            Link("lo", netns=netns)

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("set_mtu", (-1,)),
            ("set_mtu", (2**31,)),
            ("set_mac", ("01:00:00:00:00:01",)),
            ("set_txqueuelen", (2**32,)),
            ("set_alias", ("x" * 255,)),
            ("set_alias", ("ü" * 128,)),
            ("set_alias", ("a\0b",)),
            ("set_alias", ("\ud800",)),
            ("rename", ("a b",)),
            ("set_master", ("",)),
            ("add_address", ("10.0.0.1/24/24",)),
            ("remove_address", ("nobody",)),
            ("add_route", ("10.0.0.1/8",)),
            ("add_route", ("10.0.0.0/8", "fd00::1")),
            ("remove_route", ("nowhere",)),
        ],
    )
    async def test_methods_refuse_invalid_values_before_any_request(
        self, method: str, arguments: tuple[Any, ...]
    ) -> None:
        """They are refused before any request: the missing namespace is not noticed."""
        with pytest.raises(ValueError, match=r"\w"):
            await getattr(Link("lo", netns="nowhere"), method)(*arguments)

    @pytest.mark.parametrize(
        ("method", "argument"),
        [
            ("set_mtu", "1400"),
            ("set_mtu", True),
            ("set_txqueuelen", 1.5),
            ("set_alias", b"text"),
            ("set_mac", 5),
            ("rename", None),
            ("add_address", 5),
            ("add_route", None),
        ],
    )
    async def test_methods_refuse_arguments_of_the_wrong_type(
        self, method: str, argument: object
    ) -> None:
        with pytest.raises(TypeError):
            await getattr(Link("lo", netns="nowhere"), method)(argument)


class TestPermission:
    def test_without_capabilities_reading_works_and_changing_is_refused(
        self, tap: str, elsewhere: Elsewhere
    ) -> None:
        """Errors of changing and of entering another namespace name the missing capability."""
        printed = child(
            f"""
            import asyncio
            from aiotun.errors import NotPermittedError
            from aiotun.link import Link

            async def main():
                link = Link({tap!r})
                assert (await link.info()).name == {tap!r}
                await link.stats(), await link.addresses(), await link.routes()
                for attempt in (
                    link.set_mtu(1400), link.up(), link.add_address("10.0.0.1/24"),
                    Link("lo", netns={elsewhere.path!r}).info(),
                ):
                    try:
                        await attempt
                    except NotPermittedError as error:
                        print(error.errno, error.filename, error.strerror)

            asyncio.run(main())
            """,
            *("setpriv", "--bounding-set=-all", "--inh-caps=-all"),
        )
        mtu, up, address, entering = printed.splitlines()
        for line in (mtu, up, address):
            code, name, text = line.split(maxsplit=2)
            assert int(code) in (errno.EPERM, errno.EACCES)
            assert name == tap
            assert "CAP_NET_ADMIN" in text
        assert "1400" in mtu
        assert "CAP_SYS_ADMIN" in entering or "no permission to open" in entering


class TestSession:
    def test_importing_loads_no_pyroute2(self) -> None:
        child("import aiotun.link, sys; assert not [m for m in sys.modules if 'pyroute2' in m]")

    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_first_requests_at_once(self, loop: str) -> None:
        """Several threads import at the same time, and uvloop's policy changes nothing."""
        printed = child(
            f"""
            import asyncio, gc, warnings
            from aiotun.link import Link

            async def main():
                infos = await asyncio.gather(*(Link("lo").info() for _ in range(8)))
                print({{info.name for info in infos}})

            if {loop!r} == "uvloop":
                import uvloop
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
            asyncio.run(main())
            gc.collect()
            """
        )
        assert printed == "{'lo'}\n"

    def test_find_returns_none_for_a_missing_interface(self, tap: str) -> None:
        async def work(session: Session) -> tuple[LinkInfo | None, LinkInfo | None, LinkInfo]:
            found = await session.find(tap)
            assert found is not None
            return found, await session.find("nowhere0"), await session.get(found.index)

        found, missing, again = threads.run_blocking(lambda: in_session(work))
        assert found == again
        assert missing is None

    def test_a_misspelt_attribute_is_no_silence(self) -> None:
        async def work(session: Session) -> None:
            await session.set(await session.get("lo"), "set the alias", alias="text")

        with pytest.raises(TypeError, match="alias"):
            threads.run_blocking(lambda: in_session(work))

    @pytest.mark.parametrize("free", range(5))
    def test_too_few_descriptors(self, free: int) -> None:
        """A failure is a ResourceLimitError, and leaves nothing open."""
        printed = child(
            f"""
            import os, resource, warnings
            from aiotun._kernel import threads
            from aiotun.errors import ResourceLimitError
            from aiotun._link.session import in_session

            async def work(session):
                return (await session.get("lo")).name

            def attempt():
                return threads.run_blocking(lambda: in_session(work))

            attempt()
            before = os.listdir("/proc/self/fd")
            lowest = os.dup(0)
            os.close(lowest)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + {free}, hard))
            try:
                print(attempt())
            except ResourceLimitError as error:
                print(error.errno)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert os.listdir("/proc/self/fd") == before
            assert attempt() == "lo"
            """
        )
        assert printed.strip() == ("lo" if free >= 4 else str(int(errno.EMFILE)))

    def test_a_failing_setup_leaves_nothing_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import pyroute2

        async def fail(self: object) -> None:
            raise OSError(errno.ENOBUFS, "No buffer space available")

        async def work(session: Session) -> None:
            raise AssertionError("not reached")

        monkeypatch.setattr(pyroute2.AsyncIPRoute, "setup_endpoint", fail)
        before = fds()
        with pytest.raises(LinkError, match="netlink could not be opened"):
            threads.run_blocking(lambda: in_session(work))
        assert fds() == before

    def test_an_interrupted_dump_is_repeated(self) -> None:
        flag = link_session._NLM_F_DUMP_INTR

        def message(name: str, flags: int) -> dict[str, object]:
            return {
                "index": 7,
                "family": 2,
                "prefixlen": 24,
                "scope": 0,
                "address": name,
                "header": {"flags": flags},
            }

        dumps = [[message("10.0.0.1", flag)], [message("10.0.0.1", 0), message("10.0.0.2", 0)]]

        class Dumping:
            async def addr(self, command: str) -> Any:
                assert command == "dump"

                async def each() -> Any:
                    for one in dumps.pop(0):
                        yield one

                return each()

        info = LinkInfo("x", 7, 1500, None, True, True, None, None, 500, None)
        found = asyncio.run(Session(Dumping()).addresses(info))
        assert [each.interface for each in found] == [
            ipaddress.ip_interface("10.0.0.1/24"),
            ipaddress.ip_interface("10.0.0.2/24"),
        ]


class TestConcurrency:
    async def test_many_requests_at_once(self, tap: str) -> None:
        link, before = Link(tap), fds()
        await link.up()
        await asyncio.gather(
            *(link.add_address(f"10.0.{n}.1/24") for n in range(20)),
            *(link.info() for _ in range(10)),
            *(Link(tap).routes() for _ in range(10)),
        )
        assert len([a for a in await link.addresses() if a.interface.version == 4]) == 20
        join_threads()
        assert fds() <= before + 1

    async def test_cancelled_it_is_done_all_the_same(self, tap: str) -> None:
        link = Link(tap)
        task = asyncio.ensure_future(link.rename(f"{tap}c"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert link.name == show(f"{tap}c")["ifname"]
        await link.rename(tap)

    async def test_the_loop_goes_on(self, tap: str) -> None:
        """While a request is blocked in its thread, the loop runs."""
        link, gate = Link(tap), threading.Lock()
        with gate:
            link._lock = gate
            task = asyncio.ensure_future(link.info())
            for _ in range(100):
                await asyncio.sleep(0)
            assert not task.done()
        assert (await task).name == tap


def test_permission_error_is_the_standard_one() -> None:
    assert issubclass(NotPermittedError, PermissionError)
