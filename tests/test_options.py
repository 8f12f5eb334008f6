"""Invalid arguments raise ValueError or TypeError when `open_tun` or `open_tap` is called."""

import asyncio
import copy
import errno
import fcntl
import gc
import inspect
import ipaddress
import os
import pickle
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun._device import options as device_options
from aiotun._kernel import ioctl
from aiotun.networkd import NetworkdOptions

Open = Callable[..., Any]

BOTH: list[Open] = [aiotun.open_tun, aiotun.open_tap]
both = pytest.mark.parametrize("open_it", BOTH, ids=["tun", "tap"])


def _forbidden(*args: object, **kwargs: object) -> Any:
    raise AssertionError(f"the arguments were invalid, but the opening went on: {args}")


@pytest.fixture
def nothing_done(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test fails if an opening does anything."""
    with monkeypatch.context() as patch:
        patch.setattr(ioctl, "open_node", _forbidden)
        patch.setattr(fcntl, "ioctl", _forbidden)
        patch.setattr(os, "open", _forbidden)
        patch.setattr(socket, "socket", _forbidden)
        patch.setattr(threading.Thread, "start", _forbidden)
        yield


@pytest.mark.parametrize(
    ("function", "own", "options"),
    [
        (aiotun.open_tun, ["name"], aiotun.TunOptions),
        (aiotun.open_tap, ["name"], aiotun.TapOptions),
        (aiotun.create_tun_endpoint, ["factory", "name"], aiotun.TunOptions),
        (aiotun.create_tap_endpoint, ["factory", "name"], aiotun.TapOptions),
        (aiotun.networkd_units, ["name", "mode"], NetworkdOptions),
    ],
)
def test_a_signature_shows_each_option_with_its_default(
    function: Callable[..., Any], own: list[str], options: Any
) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters)[: len(own)] == own
    assert {*parameters} == {*own} | options.__optional_keys__
    assert all(each.kind is each.KEYWORD_ONLY for each in [*parameters.values()][len(own) :])
    assert (parameters["queues"].default, parameters["queues"].annotation) == (1, "int")
    assert parameters["offload"].default == "off"
    described = function.__doc__ or ""
    if function is aiotun.open_tun:
        assert [name for name in parameters if name not in described] == []


LONG = "a" * 16


class _BytesPath:
    def __fspath__(self) -> bytes:
        return b"/run/netns/name"


WRONG_NAMES: list[tuple[Any, type[Exception]]] = [
    ("", ValueError),
    (LONG, ValueError),
    ("é" * 8, ValueError),  # 16 bytes in 8 letters
    ("a%d%d", ValueError),
    ("a%s", ValueError),
    ("a%", ValueError),
    ("a%5d", ValueError),
    ("a b", ValueError),
    ("a\n", ValueError),
    ("a\tb", ValueError),
    ("a/b", ValueError),
    ("a:b", ValueError),
    ("a\0b", ValueError),
    (".", ValueError),
    ("..", ValueError),
    ("all", ValueError),
    ("default", ValueError),
    # lib/ctype.c: a byte of 0xA0 is a space to the kernel, and "à" has one.
    ("à0", ValueError),
    ("t\udcff", ValueError),  # a byte that is not UTF-8, as os.fsdecode returns it
    ("t\ud800", ValueError),
    (b"tun0", TypeError),
    (0, TypeError),
    (Path("tun0"), TypeError),
]

WRONG: list[tuple[str, Any, type[Exception]]] = [
    ("queues", 0, ValueError),
    ("queues", -1, ValueError),
    ("queues", 257, ValueError),
    ("queues", 1.0, TypeError),
    ("queues", "1", TypeError),
    ("queues", True, TypeError),
    ("queues", None, TypeError),
    ("addresses", "10.0.0.1/24", TypeError),
    ("addresses", b"10.0.0.1/24", TypeError),
    ("addresses", None, TypeError),
    ("addresses", 5, TypeError),
    ("addresses", [5], TypeError),
    ("addresses", [None], TypeError),
    ("addresses", [ipaddress.ip_network("10.0.0.0/24")], TypeError),
    ("addresses", ["nonsense"], ValueError),
    ("addresses", ["10.0.0.1"], ValueError),
    ("addresses", ["fd00::1"], ValueError),
    ("addresses", ["10.0.0.1/33"], ValueError),
    ("addresses", ["10.0.0.256/24"], ValueError),
    ("addresses", ["10.0.0.1/24", "fd00::1/129"], ValueError),
    ("addresses", ["10.0.0.1/24 peer 10.0.0.2/32"], ValueError),
    ("addresses", ["10.0.0.1 peer fd00::1/64"], ValueError),
    ("addresses", ["10.0.0.1 peer"], ValueError),
    ("addresses", ["fe80::1%eth0/64"], ValueError),
    ("routes", "10.0.0.0/24", TypeError),
    ("routes", b"10.0.0.0/24", TypeError),
    ("routes", None, TypeError),
    ("routes", 5, TypeError),
    ("routes", ipaddress.ip_network("10.0.0.0/30"), TypeError),  # iterates over its addresses
    ("routes", ipaddress.ip_network("fd00::/126"), TypeError),
    ("routes", [5], TypeError),
    ("routes", [""], ValueError),
    ("routes", ["nonsense"], ValueError),
    ("routes", ["10.0.0.1/24"], ValueError),  # host bits set
    ("routes", ["10.0.0.0/24 via"], ValueError),
    ("routes", ["10.0.0.0/24 via nowhere"], ValueError),
    ("routes", ["10.0.0.0/24 via fd00::1"], ValueError),
    ("routes", ["10.0.0.0/24 metric -1"], ValueError),
    ("routes", ["10.0.0.0/24 metric 4294967296"], ValueError),
    ("routes", ["10.0.0.0/24 table main"], ValueError),
    ("routes", ["10.0.0.0/24 table 0"], ValueError),
    ("routes", ["10.0.0.0/24 dev tun0"], ValueError),
    ("mtu", 67, ValueError),
    ("mtu", 65_536, ValueError),
    ("mtu", -1, ValueError),
    ("mtu", "1500", TypeError),
    ("mtu", 1500.0, TypeError),
    ("mtu", True, TypeError),
    ("txqueuelen", -1, ValueError),
    ("txqueuelen", 524_289, ValueError),
    ("txqueuelen", 2**32, ValueError),
    ("txqueuelen", "500", TypeError),
    ("gso_max_segs", 0, ValueError),
    ("gso_max_segs", 65_536, ValueError),
    ("gso_max_segs", 45.0, TypeError),
    ("gso_max_size", 0, ValueError),
    ("gso_max_size", 65_537, ValueError),
    ("gso_max_size", "64k", TypeError),
    ("netns", 1.5, TypeError),
    ("netns", True, TypeError),
    ("netns", b"name", TypeError),
    ("netns", ["name"], TypeError),
    ("netns", -1, ValueError),
    ("netns", 2**31, ValueError),
    ("netns", "\ud800", ValueError),
    ("netns", _BytesPath(), TypeError),
    ("netns", "", ValueError),
    ("netns", "a\0b", ValueError),
    ("owner", -1, ValueError),
    ("owner", 2**32, ValueError),
    ("owner", True, TypeError),
    ("owner", 1.0, TypeError),
    ("owner", b"root", TypeError),
    ("owner", "no such user", ValueError),
    ("owner", "", ValueError),
    ("owner", "a\0b", ValueError),
    ("owner", "\ud800", ValueError),
    ("group", -1, ValueError),
    ("group", 2**32, ValueError),
    ("group", True, TypeError),
    ("group", 1.0, TypeError),
    ("group", "no such group", ValueError),
    ("group", "", ValueError),
    ("group", "a\0b", ValueError),
    ("group", "\ud800", ValueError),
    ("offload", "on", ValueError),
    ("offload", "", ValueError),
    ("offload", None, ValueError),
    ("offload", True, ValueError),
    ("sndbuf", 0, ValueError),
    ("sndbuf", -1, ValueError),
    ("sndbuf", 2**31, ValueError),
    ("sndbuf", "65536", TypeError),
    ("sndbuf", True, TypeError),
]

WRONG_TAP: list[tuple[str, Any, type[Exception]]] = [
    ("mtu", 65_522, ValueError),
    ("mac", "", ValueError),
    ("mac", "02:00:00:00:00", ValueError),
    ("mac", "02-00-00-00-00-01", ValueError),
    ("mac", "02:00:00:00:00:0g", ValueError),
    ("mac", "02:00:00:00:00:01\n", ValueError),
    ("mac", "01:00:5e:00:00:01", ValueError),
    ("mac", "ff:ff:ff:ff:ff:ff", ValueError),
    ("mac", "00:00:00:00:00:00", ValueError),
    ("mac", b"\2\0\0\0\0\1", TypeError),
    ("mac", 2, TypeError),
    ("bridge", "", ValueError),
    ("bridge", LONG, ValueError),
    ("bridge", "br 0", ValueError),
    ("bridge", 3, TypeError),
    ("bridge", True, TypeError),
]

SWITCHES = [
    "multi_queue",
    "up",
    "persist",
    "exclusive",
    "packet_info",
    "napi",
    "carrier",
    "ipv6_autoconf",
]


@pytest.mark.usefixtures("nothing_done")
class TestWrong:
    @both
    @pytest.mark.parametrize(("name", "kind"), WRONG_NAMES, ids=lambda value: repr(value))
    def test_open_refuses_invalid_names(
        self, open_it: Open, name: Any, kind: type[Exception]
    ) -> None:
        with pytest.raises(kind) as caught:
            open_it(name)
        assert type(caught.value) is kind

    @both
    @pytest.mark.parametrize(("option", "value", "kind"), WRONG)
    def test_open_refuses_invalid_values(
        self, open_it: Open, option: str, value: Any, kind: type[Exception]
    ) -> None:
        with pytest.raises(kind) as caught:
            open_it("tun0", **{option: value})
        assert type(caught.value) is kind

    @pytest.mark.parametrize(("option", "value", "kind"), WRONG_TAP)
    def test_open_tap_refuses_invalid_values(
        self, option: str, value: Any, kind: type[Exception]
    ) -> None:
        with pytest.raises(kind) as caught:
            aiotun.open_tap("tap0", **{option: value})
        assert type(caught.value) is kind

    @both
    @pytest.mark.parametrize("option", SWITCHES)
    def test_a_str_for_a_bool_is_refused(self, open_it: Open, option: str) -> None:
        """``persist="no"`` must not mean True."""
        with pytest.raises(TypeError, match=option):
            open_it("tun0", **{option: "no"})

    @pytest.mark.parametrize(
        "options", [{"mac": "02:00:00:00:00:01"}, {"bridge": "br0"}, {"mac": "x", "bridge": ""}]
    )
    def test_a_tun_has_neither_mac_nor_bridge(self, options: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match="open_tap"):
            aiotun.open_tun("tun0", **options)

    @both
    def test_an_unknown_keyword_names_the_nearest_option(self, open_it: Open) -> None:
        function = open_it.__name__
        for word, nearest in (
            ("address", "addresses"), ("adresses", "addresses"), ("route", "routes"),
            ("user", "owner"), ("ns", "netns"), ("txqlen", "txqueuelen"), ("brdge", "bridge"),
        ):  # fmt: skip
            text = (
                f"{function}() got an unexpected keyword argument '{word}'; "
                f"did you mean '{nearest}'?"
            )
            with pytest.raises(TypeError) as caught:
                open_it("tun0", **{word: None})
            assert str(caught.value) == text

    @both
    def test_an_unknown_keyword_that_resembles_none(self, open_it: Open) -> None:
        for word in ("mode", "zzz"):
            with pytest.raises(TypeError) as caught:
                open_it("tun0", **{word: "tap"})
            function = open_it.__name__
            text = f"{function}() got an unexpected keyword argument '{word}'"
            assert str(caught.value) == text

    @both
    def test_options_are_keywords(self, open_it: Open) -> None:
        with pytest.raises(TypeError, match="positional"):
            open_it("tun0", 2)

    @both
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"queues": 2, "multi_queue": False}, "multi_queue"),
            ({"packet_info": True, "offload": "raw"}, "packet_info"),
            ({"mtu": 1279, "addresses": ["10.0.0.1/24", "fd00::1/64"]}, "at least 1280"),
            ({"mtu": 1279, "ipv6_autoconf": True}, "ipv6_autoconf=True: IPv6 needs"),
            ({"mtu": 1279, "routes": ["fd01::/64"]}, "fd01::/64: IPv6 needs at least 1280"),
        ],
    )
    def test_open_refuses_options_that_contradict_each_other(
        self, open_it: Open, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            open_it("tun0", **options)

    @both
    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("addresses", "10.0.0.1/24", "addresses=['10.0.0.1/24']"),
            ("routes", "default", "routes=['default']"),
            ("addresses", ["10.0.0.1/33"], "write '10.0.0.1/24'"),
            ("addresses", ["10.7.0.1"], "'10.7.0.1/24'"),
            ("addresses", ["10.7.0.1"], "'10.7.0.1/32'"),
            ("addresses", ["fd07::1"], "'fd07::1/64'"),
            ("addresses", ["fd07::1"], "'fd07::1/128'"),
            ("addresses", 5, "addresses must be a list"),
            ("txqueuelen", 10**8, "txqueuelen must be 0 to 524288"),
            ("netns", 2**31, "netns=2147483648"),
            ("owner", "a\0b", "owner='a\\x00b'"),
            ("routes", ["10.0.0.1/24"], "10.0.0.0/24"),
            ("mtu", 67, "68 to 65"),
            ("queues", 257, "1 to 256"),
            ("owner", "no such user", "no such user"),
            ("group", "no such group", "no such group"),
            ("netns", 1.5, "a name, a path, an open fd"),
        ],
    )
    def test_the_text_says_what_is_right(
        self, open_it: Open, option: str, value: Any, words: str
    ) -> None:
        with pytest.raises((ValueError, TypeError), match=re.escape(words)):
            open_it("tun0", **{option: value})


@pytest.mark.usefixtures("nothing_done")
class TestRight:
    @both
    @pytest.mark.parametrize(
        "name", [None, "a", "a" * 15, "é" * 7, "vpn%d", "%d", "a%db", "a.b", "a-b", "...", "tun0"]
    )
    def test_open_accepts_valid_names(self, open_it: Open, name: str | None) -> None:
        open_it(name)

    @both
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("queues", 256),
            ("mtu", 68),
            ("mtu", 65_521),
            ("txqueuelen", 0),
            ("txqueuelen", 524_288),
            ("gso_max_segs", 1),
            ("gso_max_segs", 65_535),
            ("gso_max_size", 65_536),
            ("owner", 0),
            ("owner", "root"),
            ("group", 0),
            ("group", "root"),
            ("sndbuf", 2**31 - 1),
            ("netns", "name"),
            ("netns", Path("/run/netns/name")),
            ("netns", 0),
            ("addresses", iter(["10.0.0.1/32"])),
            ("routes", (each for each in ["default via 10.0.0.1 metric 5 table 100"])),
        ],
    )
    def test_open_accepts_the_extreme_values(self, open_it: Open, option: str, value: Any) -> None:
        open_it("tun0", **{option: value})

    def test_a_tun_takes_a_larger_mtu(self) -> None:
        aiotun.open_tun(mtu=65_535)

    def test_iterables_are_read_at_the_call(self) -> None:
        addresses = ["10.0.0.1/24"]
        opener = aiotun.open_tun(addresses=iter(addresses), routes=iter(["10.1.0.0/16"]))
        addresses.clear()
        assert [str(each) for each in opener._options.addresses] == ["10.0.0.1/24"]
        assert [str(each) for each in opener._options.routes] == ["10.1.0.0/16"]

    def test_users_and_groups_are_looked_up_at_the_call(self) -> None:
        checked = device_options.check("tun", "tun0", owner="root", group="root")
        assert (checked.owner, checked.group) == (0, 0)

    @pytest.mark.parametrize(
        ("options", "multi_queue"),
        [
            ({}, False),
            ({"queues": 2}, True),
            ({"multi_queue": True}, True),
            ({"multi_queue": False}, False),
            ({"queues": 2, "multi_queue": True}, True),
        ],
    )
    def test_multi_queue_follows_queues(self, options: dict[str, Any], multi_queue: bool) -> None:
        assert device_options.check("tun", None, **options).multi_queue is multi_queue


class TestOpener:
    @both
    def test_never_awaited_does_nothing_and_warns_nothing(self, open_it: Open) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            opener = open_it("tun0", addresses=["10.0.0.1/24"], persist=True)
            del opener
            gc.collect()
        assert seen == []
        assert socket.if_nameindex() == [(1, "lo")]

    @both
    def test_a_forgotten_await_says_what_to_write(self, open_it: Open) -> None:
        kind = open_it.__name__.removeprefix("open_")
        opener = open_it("tun0")

        def loops() -> None:
            with opener:
                raise AssertionError

        uses: list[tuple[type[Exception], Callable[[], object]]] = [
            (AttributeError, lambda: opener.recv()),
            (AttributeError, lambda: opener.send(b"")),
            (AttributeError, lambda: opener.queues),
            (AttributeError, lambda: opener.link),
            (AttributeError, lambda: opener.name),
            (TypeError, lambda: aiter(opener)),
            (TypeError, loops),
        ]
        for error, use in uses:
            with pytest.raises(error) as caught:
                use()
            assert f"'{kind} = await open_{kind}(...)'" in str(caught.value)
            assert f"'async with open_{kind}(...) as {kind}:'" in str(caught.value)
        with pytest.raises(AttributeError, match="'Opener' object has no attribute 'recieve'"):
            _ = opener.recieve
        assert not hasattr(opener, "recv")
        assert getattr(opener, "_absent", 5) == 5

    @both
    def test_an_opener_can_be_copied(self, open_it: Open) -> None:
        opener = open_it("tun0", mtu=1400)
        for each in (copy.copy(opener), copy.deepcopy(opener), pickle.loads(pickle.dumps(opener))):
            assert type(each) is type(opener)
            assert each._options == opener._options

    @both
    async def test_an_opener_works_only_once(self, open_it: Open) -> None:
        opener = open_it("one0")
        device = await opener
        await device.aclose()
        for again in range(2):
            with pytest.raises(RuntimeError, match="again"):
                await opener
            with pytest.raises(RuntimeError, match="again"):
                async with opener:
                    raise AssertionError(again)

    async def test_an_opener_works_only_once_also_after_a_failure(self) -> None:
        opener = aiotun.open_tun("one0", netns="no-such-namespace")
        with pytest.raises(aiotun.LinkError) as caught:
            await opener
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(RuntimeError, match="again"):
            await opener

    async def test_an_opener_works_only_once_for_two_tasks(self) -> None:
        opener = aiotun.open_tun("one0")

        async def use() -> aiotun.TunDevice:
            return await opener

        first, second = await asyncio.gather(use(), use(), return_exceptions=True)
        assert isinstance(first, aiotun.TunDevice)
        await first.aclose()
        assert isinstance(second, RuntimeError)

    @both
    async def test_an_opener_can_be_awaited_or_entered(self, open_it: Open) -> None:
        device = await open_it("one0")
        assert [name for _, name in socket.if_nameindex()] == ["lo", "one0"]
        await device.aclose()
        assert device.closed
        async with open_it("two0") as device:
            assert [name for _, name in socket.if_nameindex()] == ["lo", "two0"]
        assert device.closed
        assert socket.if_nameindex() == [(1, "lo")]

    async def test_async_with_closes_after_an_error(self) -> None:
        with pytest.raises(KeyError):
            async with aiotun.open_tun("one0") as device:
                raise KeyError
        assert device.closed
        assert socket.if_nameindex() == [(1, "lo")]

    async def test_async_with_may_be_closed_inside(self) -> None:
        async with aiotun.open_tun("one0") as device:
            await device.aclose()
        assert device.closed
