"""The parts of `aiotun run` that need no network: names of servers, access, name servers."""

import ssl
import struct
from pathlib import Path

import pytest

from aiotun import cli
from aiotun._cli.access import Access, Place, is_of_this_machine
from aiotun._cli.arguments import UsageError
from aiotun._cli.resolvers import Resolvers
from aiotun._cli.server_names import server_name


def client_hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    if name is None:
        context.verify_mode = ssl.CERT_NONE
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def in_records(hello: bytes, size: int) -> bytes:
    """Cut the handshake of one TLS record into records of this size."""
    body = hello[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(hello[:3] + struct.pack("!H", len(each)) + each for each in pieces)


# --- Names of servers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["example.org", "xn--bcher-kva.example", "a" * 60 + ".example"])
def test_the_name_of_a_tls_server(name: str) -> None:
    assert server_name(client_hello(name)) == name
    assert server_name(in_records(client_hello(name), 50)) == name


def test_a_client_hello_without_a_name() -> None:
    assert server_name(client_hello(None)) is None


def test_a_client_hello_that_has_come_in_part() -> None:
    whole = client_hello("example.org")
    names = [server_name(whole[:length]) for length in range(len(whole))]
    assert set(names) == {None, "example.org"}
    assert names == sorted(names, key=bool)  # first none, then the name


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "example.org"),
        (b"POST /a HTTP/1.1\r\nA: b\r\nhOST:example.org:8080 \r\n\r\n", "example.org:8080"),
        (b"GET / HTTP/1.0\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: exam", None),
        (b"SSH-2.0-OpenSSH_9.2\r\nHost: no\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: \x1b[2J\r\n\r\n", None),
        (b"", None),
        (b"\x16", None),
        (b"\x16\x03\x01\x00\x00", None),
    ],
)
def test_the_name_of_an_http_server(data: bytes, name: str | None) -> None:
    assert server_name(data) == name


def test_any_bytes_have_a_name_or_none() -> None:
    whole = client_hello("example.org")
    for at in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            server_name(bytes(changed))


# --- What may be reached -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "has", "has_not"),
    [
        ("192.0.2.1", [("192.0.2.1", 1), ("192.0.2.1", 80)], [("192.0.2.2", 80)]),
        ("192.0.2.1:80", [("192.0.2.1", 80)], [("192.0.2.1", 81)]),
        ("10.1.2.3/8", [("10.9.9.9", 5)], [("11.0.0.1", 5), ("a00::1", 5)]),
        ("[2001:db8::1]:443", [("2001:db8::1", 443)], [("2001:db8::1", 80)]),
        ("2001:db8::/32", [("2001:db8:5::1", 1)], [("2001:db9::1", 1), ("32.1.13.184", 1)]),
        (":25", [("192.0.2.1", 25), ("2001:db8::1", 25)], [("192.0.2.1", 26)]),
        ("localhost", [("127.0.0.1", 1)], [("127.0.0.2", 1)]),
    ],
)
def test_places(text: str, has: list[tuple[str, int]], has_not: list[tuple[str, int]]) -> None:
    place = Place.parse(text)
    assert all(place.has(each) for each in has)
    assert not any(place.has(each) for each in has_not)


@pytest.mark.parametrize(
    "text", ["", "192.0.2.1:99999", "192.0.2", "[::1", "a b", "1.2.3.4/33", "a..b"]
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(UsageError):
        Place.parse(text)


def test_deny_is_stronger_than_allow() -> None:
    net, host = Place.parse("10.0.0.0/8"), Place.parse("10.0.0.1")
    assert Access().permits(("192.0.2.1", 1))
    assert not Access(deny=(host,)).permits(("10.0.0.1", 1))
    assert Access(deny=(host,)).permits(("10.0.0.2", 1))
    both = Access(deny=(host,), allow=(net,))
    assert [both.permits((each, 1)) for each in ("10.0.0.1", "10.0.0.2", "11.0.0.1")] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_of_this_machine(host: str) -> None:
    assert is_of_this_machine(host)


# --- Name servers --------------------------------------------------------------------------------


def test_the_name_servers_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# none\nnameserver\t192.0.2.1\nnameserver fe80::1%eth0\nsearch a b\n;\n")
    resolvers = Resolvers(path)
    assert resolvers.servers == ["192.0.2.1", "fe80::1%eth0"]
    assert resolvers.text("198.18.0.53") == "nameserver 198.18.0.53\nsearch a b\n"
    path.write_text("nameserver 192.0.2.33 # new\nnameserver junk\noptions ndots:2 rotate\n")
    assert resolvers.servers == ["192.0.2.33"]
    assert resolvers.text("198.18.0.53") == "nameserver 198.18.0.53\noptions ndots:2 rotate\n"
    path.unlink()
    assert resolvers.servers == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "give a command to run"),
        (["run", "--host-loopback", "here", "--", "true"], "--host-loopback needs an IP address"),
        *(
            (["run", "--host-loopback", each, "--", "true"], "can't reach this machine by that")
            for each in ("127.0.0.1", "::1", "0.0.0.0", "224.0.0.1", "fe80::1", "198.18.0.1")
        ),
        (["run", "--host-loopback", "198.18.0.53", "--", "true"], "can't reach this machine"),
        (["run", "--deny", "a..b", "--", "true"], "can't find the address of 'a..b'"),
    ],
)
def test_wrong_arguments_of_run(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
