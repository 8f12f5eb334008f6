"""The text of networkd's files; integration/test_networkd.py uses them in networkd."""

import ipaddress
import pwd
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun import LinkAddress, Route, cli, networkd_units

PLAIN_NETDEV = """\
# Install this as /etc/systemd/network/50-tun0.netdev; see systemd.netdev(5).

[NetDev]
Name=tun0
Kind=tun
"""

PLAIN_NETWORK = """\
# Install this as /etc/systemd/network/50-tun0.network; see systemd.network(5).

[Match]
Name=tun0

[Link]
# There is no carrier until a program attaches. The boot must not wait for it.
RequiredForOnline=no

[Network]
ConfigureWithoutCarrier=yes
"""


def test_a_name_alone_gives_both_files() -> None:
    assert networkd_units("tun0") == {
        "50-tun0.netdev": PLAIN_NETDEV,
        "50-tun0.network": PLAIN_NETWORK,
    }


def settings(text: str) -> list[tuple[str, list[str]]]:
    """Each section of a file with its lines, as networkd parses them."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("["):
            found.append((line, []))
        elif line and not line.startswith("#"):
            found[-1][1].append(line)
    return found


def parts(name: str, mode: Any = "tun", **options: Any) -> dict[str, list[list[str]]]:
    """The lines that the options add to a plain device's, by section."""
    units = networkd_units(name, mode, **options)
    assert list(units) == [f"50-{name}.netdev", f"50-{name}.network"]
    plain = ["RequiredForOnline=no", "ConfigureWithoutCarrier=yes"]
    found: dict[str, list[list[str]]] = {}
    for text in units.values():
        for title, lines in settings(text):
            lines = [line for line in lines if line not in plain]
            if lines and title not in ("[NetDev]", "[Match]"):
                found.setdefault(title, []).append(lines)
    return found


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, None),
        ({"multi_queue": True}, ["MultiQueue=yes"]),
        ({"multi_queue": False}, None),
        ({"queues": 4}, ["MultiQueue=yes"]),
        ({"packet_info": True}, ["PacketInfo=yes"]),
        ({"offload": "raw"}, ["VNetHeader=yes"]),
        ({"offload": "off"}, None),
        ({"vnet_header": True}, ["VNetHeader=yes"]),
        ({"vnet_header": True, "packet_info": True}, ["PacketInfo=yes", "VNetHeader=yes"]),
        ({"owner": "nobody-here", "group": "a.b$"}, ["User=nobody-here", "Group=a.b$"]),
        ({"owner": 0, "group": 12}, ["User=0", "Group=12"]),
        ({"persist": True}, None),
    ],
)
@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_device_options_become_lines_of_the_netdev_file(
    mode: str, options: dict[str, Any], lines: list[str] | None
) -> None:
    expected = {} if lines is None else {f"[{mode.capitalize()}]": [lines]}
    assert parts("x", mode, **options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mtu": 1400}, {"[Link]": [["MTUBytes=1400"]]}),
        ({"mtu": 1280}, {"[Link]": [["MTUBytes=1280"]]}),
        (
            {"mtu": 1279},
            {
                "[Link]": [["MTUBytes=1279"]],
                "[Network]": [["LinkLocalAddressing=no", "IPv6AcceptRA=no"]],
            },
        ),
        (
            {"ipv6_autoconf": False},
            {"[Network]": [["LinkLocalAddressing=no", "IPv6AcceptRA=no"]]},
        ),
        (
            {"ipv6_autoconf": True},
            {"[Network]": [["LinkLocalAddressing=ipv6", "IPv6AcceptRA=yes"]]},
        ),
        ({"up": False}, {"[Link]": [["ActivationPolicy=manual"]]}),
        (
            {"mac": "02:00:00:00:00:0A", "bridge": "br-1.5"},
            {"[Link]": [["MACAddress=02:00:00:00:00:0a"]], "[Network]": [["Bridge=br-1.5"]]},
        ),
        (
            {"addresses": ["10.0.0.1/24", "10.0.0.9/32", "10.1.0.1 peer 10.1.0.2/30"]},
            {
                "[Address]": [
                    ["Address=10.0.0.1/24"],
                    ["Address=10.0.0.9/32"],
                    ["Address=10.1.0.1/30", "Peer=10.1.0.2/30"],
                ]
            },
        ),
        (
            {"addresses": ["fd00::1/64", "fe80::1/64", "fd01::1 peer fd02::1/128"]},
            {
                "[Address]": [
                    ["Address=fd00::1/64", "DuplicateAddressDetection=none"],
                    ["Address=fe80::1/64", "DuplicateAddressDetection=none"],
                    ["Address=fd01::1/128", "Peer=fd02::1/128", "DuplicateAddressDetection=none"],
                ]
            },
        ),
        (
            {
                "addresses": [
                    LinkAddress(ipaddress.IPv4Interface("10.0.0.1/8"), None, scope)
                    for scope in ("link", "site", "host", "7")
                ]
            },
            {
                "[Address]": [
                    ["Address=10.0.0.1/8", f"Scope={scope}"] for scope in ("link", 200, "host", 7)
                ]
            },
        ),
        (
            {
                "routes": [
                    "default",
                    "::/0",
                    "10.2.0.0/16 via 10.0.0.2 metric 5 table 100",
                    "fd01::/16 via fd00::2 metric 1024 table 254",
                    "10.3.0.0/16 via 172.31.1.1 onlink",
                ]
            },
            {
                "[Route]": [
                    ["Destination=0.0.0.0/0"],
                    ["Destination=::/0"],
                    ["Destination=10.2.0.0/16", "Gateway=10.0.0.2", "Metric=5", "Table=100"],
                    ["Destination=fd01::/16", "Gateway=fd00::2"],
                    ["Destination=10.3.0.0/16", "Gateway=172.31.1.1", "GatewayOnLink=yes"],
                ]
            },
        ),
    ],
)
def test_link_options_become_lines_of_the_network_file(
    options: dict[str, Any], expected: dict[str, list[list[str]]]
) -> None:
    assert parts("x", "tap", **options) == expected


def test_the_bridge_is_not_left_to_be_found_out() -> None:
    assert "# This needs a .netdev file" in networkd_units("x", "tap", bridge="br0")["50-x.network"]


@pytest.mark.parametrize(
    ("option", "value", "default"),
    [
        ("txqueuelen", 0, None),
        ("txqueuelen", 1000, None),
        ("gso_max_segs", 45, None),
        ("gso_max_size", 65_536, None),
        ("netns", "blue", None),
        ("exclusive", True, False),
        ("napi", True, False),
        ("napi", "threaded", False),
        ("carrier", False, None),
        ("carrier", True, None),
        ("sndbuf", 1, None),
        ("persist", False, None),
    ],
)
def test_options_that_networkd_lacks_are_refused(
    option: str, value: object, default: object
) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=rf"networkd .*{option}"):
        networkd_units("x", **options)
    assert parts("x", **{option: default}) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"up": False, "routes": ["default"]}, "up=False or the routes"),
        ({"mtu": 1279, "addresses": ["fd00::1/64"]}, "fd00::1/64: IPv6 needs at least 1280"),
        ({"mtu": 68, "routes": ["fd00::/64"]}, "fd00::/64: IPv6 needs at least 1280"),
        ({"mtu": 67}, "68 to 65535"),
        ({"owner": "a b"}, "not a valid user or group name"),
        ({"owner": ""}, "not a valid user or group name"),
        ({"owner": "1000"}, "a number as an int"),
        ({"group": "-x"}, "not a valid user or group name"),
        ({"group": "x\n[Link]"}, "not a valid user or group name"),
        ({"group": "x\n"}, "not a valid user or group name"),
        ({"owner": -1}, "owner must be 0"),
        ({"addresses": ["10.0.0.1/24\nGateway=10.0.0.2"]}, "not a valid address"),
        ({"routes": ["default\nvia"]}, "not a valid route"),
    ],
)
def test_networkd_units_refuses_invalid_values(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        networkd_units("x", **options)


@pytest.mark.parametrize(
    ("mode", "options", "said"),
    [
        ("tun", {"mac": "02:00:00:00:00:01"}, "open_tap"),
        ("tun", {"bridge": "br0"}, "open_tap"),
        ("tap", {"vnet_header": 1}, "vnet_header must be True or False"),
        ("tap", {"owner": 1.0}, "owner must be an int"),
        ("tap", {"addresses": "10.0.0.1/24"}, "a list"),
        ("tap", {"colour": "blue"}, "colour"),
    ],
)
def test_networkd_units_refuses_arguments_of_the_wrong_type(
    mode: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        networkd_units("x", mode, **options)


@pytest.mark.parametrize("mode", ["TUN", "", None, "bridge"])
def test_networkd_units_refuses_other_modes(mode: Any) -> None:
    with pytest.raises(ValueError, match="mode must be 'tun' or 'tap'"):
        networkd_units("x", mode)


NAMES = [
    "tun%d",
    "tun*",
    "tun?",
    "a[b]",
    "!tun0",
    "a'b",
    'a"b',
    "a\\",
    "12",
    "0",
    "é",
    "a=b",
    "a;b",
]


@pytest.mark.parametrize("name", [*NAMES, "", "a" * 16, "all", "a b", "a\n", ".", "a/b"])
def test_names_that_networkd_would_take_for_something_else(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        networkd_units(name)
    with pytest.raises(ValueError, match="name"):
        networkd_units("x", "tap", bridge=name)


@pytest.mark.parametrize("name", ["t", "1a", "a1", "-x", "tun0.5", "a_b", "a@b", "+a", "a" * 15])
def test_unusual_names_are_written_as_they_are(name: str) -> None:
    units = networkd_units(name)
    assert f"\nName={name}\n" in units[f"50-{name}.netdev"]
    assert f"\nName={name}\n" in units[f"50-{name}.network"]


def test_a_name_is_needed() -> None:
    name: Any = None
    with pytest.raises(TypeError, match="an interface name must be a str"):
        networkd_units(name)


def test_users_are_not_looked_up_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(pwd, "getpwnam", forbidden)
    assert parts("x", owner="root") == {"[Tun]": [["User=root"]]}


EVIL = "1\n[Link]\nMACAddress=02:00:00:00:00:02"


@pytest.mark.parametrize("field", ["scope", "metric", "table"])
def test_a_value_forced_past_its_class_carries_nothing_in(field: str) -> None:
    address = LinkAddress(ipaddress.IPv4Interface("10.0.0.1/8"))
    route = Route(ipaddress.IPv4Network("10.0.0.0/8"))
    object.__setattr__(address if field == "scope" else route, field, EVIL)
    with pytest.raises(ValueError, match="not a valid value for"):
        networkd_units("x", addresses=[address], routes=[route])


texts = st.text(st.sampled_from("a1.-\n\r\\ =[]#;%\x00\x85\u2028$"), max_size=12)


@given(name=texts, owner=texts, scope=texts, bridge=texts)
def test_no_value_becomes_more_than_a_value(name: str, owner: str, scope: str, bridge: str) -> None:
    address = LinkAddress(ipaddress.IPv4Interface("10.0.0.1/8"))
    object.__setattr__(address, "scope", scope)
    # Each with the number of lines that it may add: a heading, a comment (of the bridge), settings.
    cases: list[tuple[dict[str, Any], int]] = [
        ({"name": name}, 0),
        ({"name": "x", "owner": owner}, 2),
        ({"name": "x", "addresses": [address]}, 3),
        ({"name": "x", "bridge": bridge}, 2),
    ]
    plain = "".join(networkd_units("x", "tap").values())
    for options, more in cases:
        try:
            text = "".join(networkd_units(mode="tap", **options).values())
        except ValueError:
            continue
        lines = [line for line in text.splitlines() if line]
        assert len(lines) == len([line for line in plain.splitlines() if line]) + more
        assert not any(line.endswith("\\") for line in lines)


# --- The command ---------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["networkd", *words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("tun0", {}),
        ("dev tun0 mode tun", {}),
        ("mode tap name tun0", {"mode": "tap"}),
        (
            "tun0 user joe group 5 multi_queue pi vnet_hdr mtu 1400",
            {
                "owner": "joe",
                "group": 5,
                "multi_queue": True,
                "packet_info": True,
                "vnet_header": True,
                "mtu": 1400,
            },
        ),
        (
            "mode tap bridge br0 mac 02:00:00:00:00:01 down tun0",
            {"mode": "tap", "bridge": "br0", "mac": "02:00:00:00:00:01", "up": False},
        ),
        ("tun0 mode tap master br0", {"mode": "tap", "bridge": "br0"}),
        ("tun0 ipv6_autoconf off", {"ipv6_autoconf": False}),
        ("ipv6_autoconf on tun0", {"ipv6_autoconf": True}),
        (
            "address 10.0.0.1/24 addr 10.1.0.1 peer 10.1.0.2/32 tun0 route default via 10.0.0.2 "
            "metric 5 table 6 route 10.2.0.0/16 address fd00::1/64 route 10.3.0.0/16 via 10.9.0.1 "
            "onlink metric 7",
            {
                "addresses": ["10.0.0.1/24", "10.1.0.1 peer 10.1.0.2/32", "fd00::1/64"],
                "routes": [
                    "default via 10.0.0.2 metric 5 table 6",
                    "10.2.0.0/16",
                    "10.3.0.0/16 via 10.9.0.1 onlink metric 7",
                ],
            },
        ),
    ],
)
def test_the_command_takes_the_same_options(
    words: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = networkd_units("tun0", **options)
    assert said(capsys, *words.split()) == (0, "\n".join(expected.values()), "")

    (tmp_path / "50-tun0.netdev").write_text("older, and longer\n" * 100)
    status, out, _ = said(capsys, *words.split(), "--write", str(tmp_path))
    assert status == 0
    assert out.splitlines() == [str(tmp_path / name) for name in expected]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "the device's name is missing"),
        ("tun0 tun1", "unknown argument 'tun1'"),
        ("tun0 dev tun1", "expected one device name, got 'tun0' and 'tun1'"),
        ("tun0 mtu 1400 mtu 1401", "'mtu' is given twice: '1400' and '1401'"),
        ("tun0 mtu", "'mtu' needs a value"),
        ("tun0 ipv6_autoconf no", "'ipv6_autoconf' must be 'on' or 'off', got 'no'"),
        ("tun0 ipv6_autoconf on ipv6_autoconf off", "'ipv6_autoconf' is given twice"),
        ("tun0 ipv6_autoconf on mtu 1000", "at least 1280"),
        ("tun0 mtu many", "'mtu' must be a number of bytes, got 'many'"),
        ("tun0 route default via", "'via' needs a value"),
        ("tun0 address here", "'here' is not a valid address"),
        ("tun0 address 10.0.0.1", "write '10.0.0.1/24'"),
        ("tun0 mode bridge", "mode must be 'tun' or 'tap'"),
        ("tun0 bridge br0", "a TUN device can't have a bridge; add 'mode tap'"),
        ("tun0 mac 02:00:00:00:00:01", "a TUN device can't have a mac; add 'mode tap'"),
        ("tun0 netns blue", "no setting for 'netns'"),
        ("tun0 down route default", "leave out 'down' or the routes"),
        ("tun%d", "without '%d'"),
    ],
)
def test_invalid_arguments_of_the_command_are_one_line(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = said(capsys, *words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("aiotun: ")
    assert expected in err
    assert "=" not in err  # no arguments of Python


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = tmp_path / "nothing"
    status, out, err = said(capsys, "tun0", "--write", str(where))
    assert (status, out) == (1, "")
    assert err == f"aiotun: {where}/50-tun0.netdev: No such file or directory\n"


def test_the_help_knows_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        said(capsys, "--help")
    text = capsys.readouterr().out
    for word in ("dev", "mode", "user", "group", "multi_queue", "pi", "vnet_hdr", "mtu", "address",
                 "route", "mac", "bridge", "ipv6_autoconf", "down", "--write"):  # fmt: skip
        assert f"\n  {word}" in text
    assert all(len(line) <= 80 for line in text.splitlines())
