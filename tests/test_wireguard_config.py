"""The WireGuard example's configuration file: what wg(8) accepts, and errors that name the line."""

import base64
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from wireguard import config
from wireguard.config import ConfigError, parse

from .helpers import need

KEY = "aGFsbG8gaGFsbG8gaGFsbG8gaGFsbG8gaGFsbG8gaGE="
GOOD = f"""
[Interface]  # comments
privatekey = {KEY}
ListenPort = 51820
Address = 10.0.0.1/24, fd00::1/64
DNS = 192.0.2.53
MTU = 1400

[Peer]
PublicKey={KEY}
PresharedKey = {KEY}
AllowedIPs = 10.0.0.2, 10.1.0.1/16
AllowedIPs = fd00::2/128
Endpoint = [2001:db8::1]:51821
PersistentKeepalive = 25
"""
MINIMAL = f"[Interface]\nPrivateKey = {KEY}\n"
PEER = f"{MINIMAL}[Peer]\nPublicKey = {KEY}\n"


def test_every_key_is_read() -> None:
    found = parse(GOOD.encode())
    (peer,) = found.peers
    assert (found.listen_port, found.mtu, len(found.addresses)) == (51820, 1400, 2)
    assert found.ignored == ["DNS"]
    assert [str(net) for net in peer.allowed_ips] == ["10.0.0.2/32", "10.1.0.0/16", "fd00::2/128"]
    assert (peer.endpoint, peer.keepalive) == (("2001:db8::1", 51821, 0, 0), 25)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[Peer]", "[Pear]"), "line 9"),
        ((f"privatekey = {KEY}", "privatekey = short"), "line 3: privatekey: not a key"),
        (("GE=\nListenPort", "GF=\nListenPort"), "line 3: privatekey: not a key"),
        ((f"PublicKey={KEY}", "PublicKey=\u00e9"), "line 10: PublicKey: not a key"),
        (("MTU = 1400", "MTU = 14000000"), "line 7: MTU"),
        (("MTU = 1400", "MTU = 0x580"), "line 7: MTU: 0x580 is not a number from 576 to 65535"),
        (("MTU = 1400", "MTU = 1_400"), "line 7: MTU: 1_400 is not a number"),
        (("MTU = 1400", "MTU"), "not KEY = VALUE"),
        (("fd00::2/128", "fd00::2/129"), "line 13"),
        (("[2001:db8::1]:51821", "2001:db8::1"), "line 14: Endpoint: 2001:db8::1 is not ["),
        (("[2001:db8::1]:51821", "[2001:db8::1]:0"), "line 14"),
        (("[2001:db8::1]:51821", "[2001:db8::1]:70000"), "line 14: Endpoint: 70000 is not"),
        ((f"privatekey = {KEY}", ""), "no PrivateKey"),
        ((f"PublicKey={KEY}", ""), "no PublicKey"),
        (("ListenPort", "ListenSport"), "unknown here"),
    ],
)
def test_an_error_names_the_line_and_shows_no_key(change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(*change).encode())
    assert said in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("number", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
def test_a_key_of_small_order_is_an_error_of_the_file(number: int) -> None:
    """With such a key the shared secret is public, so handshakes are refused."""
    key = base64.b64encode(number.to_bytes(32, "little")).decode()
    with pytest.raises(ConfigError, match="line 4: PublicKey: not a peer's key"):
        parse(f"{MINIMAL}[Peer]\nPublicKey = {key}\n".encode())


def test_a_missing_key_that_a_command_may_set_names_the_command() -> None:
    text = "[Interface]\nPostUp = wg set %i private-key /etc/wireguard/key\nDNS = 192.0.2.53\n"
    with pytest.raises(ConfigError) as caught:
        parse(text.encode())
    assert "no PrivateKey; PostUp may set it, but commands are not run here" in str(caught.value)
    assert "DNS" not in str(caught.value)


# --- What wg(8) accepts --------------------------------------------------------------------------

ACCEPTED = {
    "Latin-1 in a comment": MINIMAL.encode() + b"# caf\xe9\nListenPort = 5 # \xff\n",
    "NEL in a comment": f"{MINIMAL}# a\u0085[b\nListenPort = 5\n".encode(),
    "U+2028 in a comment": f"{MINIMAL}# a\u2028b\nListenPort = 5\n".encode(),
    "controls in a comment": MINIMAL.encode() + b"# a\x0cb\x0bc\x1cd\x1de\rf\nListenPort = 5\n",
    "CR LF": f"{MINIMAL}ListenPort = 5\n".replace("\n", "\r\n").encode(),
    "blanks in a section": f"{MINIMAL}ListenPort=5\n".replace(
        "[Interface]", "[ Inter\tface ]"
    ).encode(),
    "blanks in a key and a value": f"{MINIMAL}Listen Port = 0 \x0c0 \x0b5\n".encode(),
    "blanks in a base64 key": f"{MINIMAL}ListenPort=5\n".replace("gaGF", "g aG F").encode(),
    "leading zeros in a port": f"{MINIMAL}ListenPort = 00000005\n".encode(),
    "a mark that is OFF": f"{MINIMAL}ListenPort = 5\nFwMark = OFF\n".encode(),
    "a mark with leading zeros": f"{MINIMAL}ListenPort = 5\nFwMark = 010\n".encode(),
    "a hexadecimal mark": f"{MINIMAL}ListenPort = 5\nFwMark = 0x00ff\n".encode(),
    "a keepalive that is Off": f"{PEER}PersistentKeepalive = Off\n".encode(),
    "a keepalive with leading zeros": f"{PEER}PersistentKeepalive = 0025\n".encode(),
    "blanks in allowed IPs": f"{PEER}AllowedIPs = 10.0.0. 0 / 08 , fd00 ::/ 8\n".encode(),
    "blanks in an endpoint": f"{PEER}Endpoint = [ ::1 ] : 0051820\n".encode(),
    "a service as the port": f"{PEER}Endpoint = 127.0.0.1:ntp\n".encode(),
}
ALL_ACCEPTED = pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())


@ALL_ACCEPTED
def test_files_that_wg_accepts_are_accepted(data: bytes) -> None:
    found = parse(data)
    assert len(found.private_key) == 32
    assert found.listen_port == (0 if found.peers else 5)
    assert found.mark in (0, 10, 255)
    for peer in found.peers:
        assert peer.keepalive in (0, 25)
        assert [str(net) for net in peer.allowed_ips] in ([], ["10.0.0.0/8", "fd00::/8"])
        assert peer.endpoint in (None, ("::1", 51820, 0, 0), ("127.0.0.1", 123))


@ALL_ACCEPTED
def test_wg_itself_accepts_it(data: bytes, tmp_path: Path) -> None:
    """wg(8) parses the whole file first, and then reports that the interface does not exist."""
    path = tmp_path / "wg0.conf"
    path.write_bytes(data)
    wg = need("wg")
    done = subprocess.run([wg, "setconf", "none0", str(path)], capture_output=True, text=True)
    assert "Unable to modify interface" in done.stderr


# --- A peer's name -------------------------------------------------------------------------------


class Names:
    """Replaces getaddrinfo: fails this many times with this error."""

    def __init__(self, failures: int, error: int) -> None:
        self.failures, self.error = failures, error
        self.pauses: list[float] = []

    def __call__(self, host: str, port: str, **hints: Any) -> Any:
        if self.failures > 0:
            self.failures -= 1
            raise socket.gaierror(self.error, "not now")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.0.2.1", int(port)))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names(0, socket.EAI_AGAIN)
    monkeypatch.setattr(socket, "getaddrinfo", names)
    monkeypatch.delenv("WG_ENDPOINT_RESOLUTION_RETRIES", raising=False)
    return names


def test_a_name_that_cannot_be_resolved_yet_is_tried_again(
    names: Names, capsys: pytest.CaptureFixture[str]
) -> None:
    names.failures = 15
    assert config.resolve("vpn.test:0051820", names.pauses.append) == ("192.0.2.1", 51820)
    assert names.pauses[:2] == [1.0, 1.2]
    assert (len(names.pauses), max(names.pauses) <= 20) == (15, True)
    assert "vpn.test:0051820: not now; trying again in 1.0 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "retries"), [(None, 15), ("0", 0), ("3", 3)])
def test_resolving_gives_up_after_the_set_retries(
    names: Names, setting: str | None, retries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        monkeypatch.setenv("WG_ENDPOINT_RESOLUTION_RETRIES", setting)
    names.failures = retries + 1
    with pytest.raises(socket.gaierror):
        config.resolve("vpn.test:1", names.pauses.append)
    assert len(names.pauses) == retries


def test_infinite_retries_are_possible(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WG_ENDPOINT_RESOLUTION_RETRIES", "infinity")
    names.failures = 100
    assert config.resolve("vpn.test:1", names.pauses.append) == ("192.0.2.1", 1)
    assert names.pauses[-1] == 20


def test_a_name_that_does_not_exist_is_an_error_at_once(names: Names) -> None:
    names.failures, names.error = 1, socket.EAI_NONAME
    with pytest.raises(socket.gaierror):
        config.resolve("vpn.test:1", names.pauses.append)
    assert names.pauses == []


def test_all_addresses_of_a_name_the_families_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1"]

    def found(host: str, port: str, **hints: Any) -> Any:
        for each in hosts:
            family = socket.AF_INET6 if ":" in each else socket.AF_INET
            address = (each, int(port), 0, 0) if ":" in each else (each, int(port))
            yield family, socket.SOCK_DGRAM, 17, "", address

    monkeypatch.setattr(socket, "getaddrinfo", found)
    looked_up = config.look_up("vpn.test:1")
    assert [each[0] for each in looked_up] == [hosts[0], hosts[3], hosts[1], hosts[2]]
    assert [len(each) for each in looked_up] == [4, 2, 4, 4]
