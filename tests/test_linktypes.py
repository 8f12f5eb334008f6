"""Addresses, routes, MACs and names: their text forms and invalid values."""

import dataclasses
import ipaddress
import re
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun._kernel.words import parse_mac
from aiotun._link.values import LinkAddress, Route, check_name, parse_address, parse_route


def interfaces(version: int) -> st.SearchStrategy[IPv4Interface | IPv6Interface]:
    """Any address of that family with any prefix length."""
    bits = 32 if version == 4 else 128
    return st.builds(
        lambda ip, prefix: ipaddress.ip_interface((ip, prefix)),
        st.ip_addresses(v=4) if version == 4 else st.ip_addresses(v=6),
        st.integers(0, bits),
    )


any_interface = interfaces(4) | interfaces(6)
numbers = st.none() | st.integers(0, 2**32 - 1)


class TestAddress:
    @given(any_interface)
    def test_an_address_parsed_and_printed_is_the_same(
        self, interface: IPv4Interface | IPv6Interface
    ) -> None:
        address = parse_address(str(interface))
        assert address.interface == interface
        assert address == parse_address(interface) == parse_address(address)
        assert str(address) == str(interface)

    @given(st.sampled_from([4, 6]).flatmap(lambda v: st.tuples(interfaces(v), interfaces(v))))
    def test_a_peer_address_parsed_and_printed_is_the_same(
        self, pair: tuple[IPv4Interface | IPv6Interface, IPv4Interface | IPv6Interface]
    ) -> None:
        own, peer = pair
        text = f"{own.ip} peer {peer}"
        if own.ip == peer.ip:
            with pytest.raises(ValueError, match="same address at both ends"):
                parse_address(text)
            return
        address = parse_address(text)
        assert (address.interface.ip, address.peer) == (own.ip, peer)
        assert str(address) == text
        assert parse_address(str(address)) == address

    @given(st.text())
    def test_any_text_is_an_address_or_a_value_error(self, text: str) -> None:
        try:
            address = parse_address(text)
        except ValueError:
            with pytest.raises(ValueError, match=re.escape(repr(text))):
                parse_address(text)
        else:
            assert parse_address(str(address)) == address

    def test_a_peer_alone_has_the_whole_length(self) -> None:
        assert str(parse_address("10.0.0.1 peer 10.0.0.2")) == "10.0.0.1 peer 10.0.0.2/32"

    def test_the_scope_follows_from_the_address(self) -> None:
        scopes = {
            "10.0.0.1/24": "global",
            "169.254.0.1/16": "global",
            "127.0.0.2/8": "host",
            "::1/128": "host",
            "fe80::1/64": "link",
            "fec0::1/64": "site",
            "fd00::1/64": "global",
        }
        assert {text: parse_address(text).scope for text in scopes} == scopes

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "write '10.0.0.1/24'"),
            ("10.0.0.1", "no prefix length; write '10.0.0.1/24' for .*, or '10.0.0.1/32' for"),
            ("fd00::1", "no prefix length; write 'fd00::1/64' for .*, or 'fd00::1/128' for"),
            ("10.0.0.256/24", "write '10.0.0.1/24'"),
            ("10.0.0.1/33", "write '10.0.0.1/24'"),
            ("10.0.0.1/24 brd 10.0.0.255", "write '10.0.0.1/24'"),
            ("10.0.0.1 peer", "write '10.0.0.1/24'"),
            ("10.0.0.1 peer fd00::2/64", "mixes IPv4 and IPv6"),
            ("10.0.0.1/24 peer 10.0.0.2/32", "only the peer can have one"),
            ("fe80::1%eth0/64", "leave out '%eth0'"),
            ("fd00::1 peer fe80::1%eth0/64", "leave out '%eth0'"),
        ],
    )
    def test_parse_address_says_what_to_write(self, text: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as caught:
            parse_address(text)
        assert repr(text) in str(caught.value)

    @pytest.mark.parametrize("value", [None, 5, b"10.0.0.1/24", IPv4Address("10.0.0.1")])
    def test_parse_address_refuses_other_types(self, value: Any) -> None:
        with pytest.raises(TypeError, match=type(value).__name__):
            parse_address(value)


class TestValues:
    """Objects check their fields when they are made, not when they are used."""

    @pytest.mark.parametrize(
        ("arguments", "kind", "words"),
        [
            (("x",), TypeError, "interface"),
            ((IPv4Address("10.0.0.1"),), TypeError, "interface"),
            ((IPv4Interface("10.0.0.1/24"), "10.0.0.2"), TypeError, "peer"),
            ((IPv4Interface("10.0.0.1/24"), None, 0), TypeError, "scope"),
            ((IPv4Interface("10.0.0.1/24"), None, "banana"), ValueError, "'banana'"),
            ((IPv4Interface("10.0.0.1/24"), None, "256"), ValueError, "'256'"),
            ((IPv4Interface("10.0.0.1/24"), None, "²"), ValueError, "scope"),
        ],
    )
    def test_link_address_refuses_invalid_fields(
        self, arguments: tuple[Any, ...], kind: type[Exception], words: str
    ) -> None:
        with pytest.raises(kind, match=words):
            LinkAddress(*arguments)

    @pytest.mark.parametrize(
        ("arguments", "kind", "words"),
        [
            (("10.2.0.0/16",), TypeError, "dst"),
            ((IPv4Interface("10.2.0.0/16"),), TypeError, "dst"),
            ((IPv4Network("10.2.0.0/16"), "10.0.0.2"), TypeError, "via"),
            ((IPv4Network("10.2.0.0/16"), IPv4Interface("10.0.0.2/24")), TypeError, "via"),
            ((IPv4Network("10.2.0.0/16"), None, "5"), TypeError, "metric"),
            ((IPv4Network("10.2.0.0/16"), None, -1), ValueError, "metric"),
            ((IPv4Network("10.2.0.0/16"), None, None, None), TypeError, "table"),
            ((IPv4Network("10.2.0.0/16"), None, None, 0), ValueError, "table"),
            ((IPv4Network("10.2.0.0/16"), None, None, "main"), TypeError, "table"),
            ((IPv4Network("10.2.0.0/16"), None, None, 254, True), ValueError, "onlink"),
            ((IPv4Network("10.2.0.0/16"), None, None, 254, 1), TypeError, "onlink"),
        ],
    )
    def test_route_refuses_invalid_fields(
        self, arguments: tuple[Any, ...], kind: type[Exception], words: str
    ) -> None:
        with pytest.raises(kind, match=words):
            Route(*arguments)

    def test_a_scope_may_be_a_number(self) -> None:
        assert LinkAddress(IPv4Interface("10.0.0.1/24"), None, "77").scope == "77"


class TestRoute:
    @given(any_interface, st.booleans(), numbers, st.none() | st.integers(1, 2**32 - 1))
    def test_a_route_parsed_and_printed_is_the_same(
        self,
        interface: IPv4Interface | IPv6Interface,
        gateway: bool,
        metric: int | None,
        table: int | None,
    ) -> None:
        via = interface.ip if gateway else None
        route = parse_route(interface.network, via, metric, table)
        assert parse_route(str(route)) == route == parse_route(route)
        assert (route.dst, route.via) == (interface.network, via)
        assert route.table == (254 if table is None else table)
        default = 0 if interface.version == 4 else 1024
        assert (default if route.metric is None else route.metric) == (metric or default)

    @given(st.text() | st.text(alphabet="0123456789./: viametrctbldfu%onk", max_size=40))
    def test_any_text_is_a_route_or_a_value_error(self, text: str) -> None:
        try:
            route = parse_route(text)
        except ValueError:
            with pytest.raises(ValueError, match=re.escape(repr(text))):
                parse_route(text)
        else:
            assert parse_route(str(route)) == route

    def test_parse_route_reads_every_word_in_any_order(self) -> None:
        assert parse_route("10.2.0.0/16 table 100 via 10.0.0.2 metric 50") == Route(
            IPv4Network("10.2.0.0/16"), IPv4Address("10.0.0.2"), 50, 100
        )

    def test_onlink_is_parsed_printed_and_not_compared(self) -> None:
        route = parse_route("default via 172.31.1.1 onlink metric 5")
        assert route.onlink
        assert str(route) == "0.0.0.0/0 via 172.31.1.1 onlink metric 5"
        assert parse_route("default onlink via 172.31.1.1 metric 5").onlink
        assert parse_route("default", "172.31.1.1", 5, onlink=True).onlink
        assert parse_route(str(route)).onlink
        plain = parse_route("default via 172.31.1.1 metric 5")
        assert not plain.onlink
        assert plain == route  # the kernel accepts only one of them

    def test_an_address_is_its_own_network(self) -> None:
        assert parse_route("10.2.3.4").dst == IPv4Network("10.2.3.4/32")
        assert parse_route(IPv4Address("10.2.3.4")).dst == IPv4Network("10.2.3.4/32")
        assert parse_route("fd00::4").dst == IPv6Network("fd00::4/128")

    def test_default_takes_its_family_from_the_gateway(self) -> None:
        assert parse_route("default").dst == IPv4Network("0.0.0.0/0")
        assert parse_route("default via 10.0.0.2").dst == IPv4Network("0.0.0.0/0")
        assert parse_route("default via fd00::2").dst == IPv6Network("::/0")
        assert parse_route("default", via="fd00::2").dst == IPv6Network("::/0")
        assert parse_route("::/0").dst == IPv6Network("::/0")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "is not a valid route"),
            ("all", "is not a valid route"),
            ("10.2.0.1/16", "host bits set; write 10.2.0.0/16 for the network"),
            ("10.2.0.0/16 via", "is not a valid route"),
            ("10.2.0.0/16 10.0.0.2", "is not a valid route"),
            ("10.2.0.0/16 dev eth0", "is not a valid route"),
            ("10.2.0.0/16 onlink", "'onlink' needs a gateway"),
            ("10.2.0.0/16 via onlink", "gateway 'onlink'"),
            ("10.2.0.0/16 via 10.0.0.2 onlink onlink", "has 'onlink' twice"),
            ("10.2.0.0/16 via 10.0.0.2 onlink 5", "is not a valid route"),
            ("onlink", "is not a valid route"),
            ("10.2.0.0/16 via nobody", "gateway 'nobody'"),
            ("10.2.0.0/16 via fd00::2", "mixes IPv4 and IPv6"),
            ("10.2.0.0/16 metric 5 metric 6", "has 'metric' twice"),
            ("10.2.0.0/16 metric -5", "'metric' must be a number"),
            ("10.2.0.0/16 metric 1_0", "'metric' must be a number"),
            ("10.2.0.0/16 metric 4294967296", "must be 0 to 4294967295"),
            ("10.2.0.0/16 table main", "'table' must be a number"),
            ("10.2.0.0/16 table 0", "must be 1 to 4294967295"),
            ("fe80::%eth0/64", "leave out '%eth0'"),
            ("default via fe80::1%eth0", "leave out '%eth0'"),
        ],
    )
    def test_parse_route_says_what_is_wrong(self, text: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as caught:
            parse_route(text)
        assert repr(text) in str(caught.value)

    def test_an_option_given_twice_is_refused(self) -> None:
        with pytest.raises(ValueError, match="given twice"):
            parse_route("10.2.0.0/16 metric 5", metric=5)
        with pytest.raises(ValueError, match="already"):
            parse_route(parse_route("10.2.0.0/16"), metric=5)
        with pytest.raises(ValueError, match="already"):
            parse_route(parse_route("10.2.0.0/16"), onlink=True)

    @pytest.mark.parametrize(
        "arguments",
        [
            (None,),
            (5,),
            ("default", 5),
            ("default", None, "5"),
            ("default", None, None, True),
            ("default", "10.0.0.2", None, None, "yes"),
        ],
    )
    def test_parse_route_refuses_other_types(self, arguments: tuple[Any, ...]) -> None:
        with pytest.raises(TypeError):
            parse_route(*arguments)


class TestMac:
    @given(st.binary(min_size=6, max_size=6), st.booleans())
    def test_only_unicast_macs_are_accepted(self, octets: bytes, upper: bool) -> None:
        text = octets.hex(":")
        given_text = text.upper() if upper else text
        if octets[0] & 1 or not any(octets):
            with pytest.raises(ValueError, match="MAC"):
                parse_mac(given_text)
        else:
            assert parse_mac(given_text) == text

    @pytest.mark.parametrize("text", ["", "02", "02-00-00-00-00-01", "0200.0000.0001", " 02:00"])
    def test_parse_mac_says_what_to_write(self, text: str) -> None:
        with pytest.raises(ValueError, match="write six pairs") as caught:
            parse_mac(text)
        assert repr(text) in str(caught.value)

    def test_parse_mac_refuses_bytes(self) -> None:
        mac: Any = b"\x02\0\0\0\0\1"
        with pytest.raises(TypeError, match="bytes"):
            parse_mac(mac)


class TestName:
    @pytest.mark.parametrize("name", ["a", "tun0", "vpn%d", "a" * 15, "ünïcö", "a.b", "..."])
    def test_check_name_accepts_names_that_the_kernel_takes(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize(
        "name", ["", "a" * 16, "ü" * 8, ".", "..", "a/b", "a b", "a:b", "a\tb", "a\0b"]
    )
    def test_check_name_refuses_invalid_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            check_name(name)

    def test_check_name_refuses_bytes(self) -> None:
        name: Any = b"tun0"
        with pytest.raises(TypeError, match="bytes"):
            check_name(name)


def test_values_are_frozen_and_hashable() -> None:
    address = LinkAddress(IPv4Interface("10.0.0.1/24"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        address.scope = "link"  # type: ignore[misc] # which is the point
    assert len({address, parse_address("10.0.0.1/24")}) == 1
    assert len({parse_route("10.0.0.0/8"), parse_route("10.0.0.0/8 metric 0 table 254")}) == 1
