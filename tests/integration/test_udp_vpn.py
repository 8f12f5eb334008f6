"""The UDP tunnel example: a server and clients, in namespaces connected by a veth pair."""

import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import udp_vpn
from _mss import clamp_mss
from _tunnel import resolve
from udp_vpn import Client, Session, read_keys

from ..helpers import checksum, ip, need
from .kernel import another_namespace
from .test_examples import EXAMPLES, run
from .test_offload import TCP_CLIENT, TCP_SERVER

EXAMPLE = str(EXAMPLES / "udp_vpn.py")
OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
SERVER = {4: "10.8.0.1", 6: "fd08::1"}
CLIENTS = {4: ["10.8.0.2", "10.8.0.3"], 6: ["fd08::2", "fd08::3"]}


@dataclass
class Place:
    """Two namespaces: the server is in the test's own, the clients in the other."""

    folder: Path
    there: str
    running: list["subprocess.Popen[str]"]

    def prefix(self, there: bool) -> list[str]:
        return ["nsenter", f"--net={self.there}"] if there else []

    def run(self, there: bool, *command: str) -> str:
        words = [*self.prefix(there), need(command[0]), *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start(self, there: bool, *args: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*self.prefix(there), sys.executable, "-W", "error", EXAMPLE, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        assert first.startswith("ready "), process.stderr.read()
        return process

    def server(self, *args: str, bind: str = "0.0.0.0:4500") -> "subprocess.Popen[str]":
        addresses = ["--address", f"{SERVER[4]}/24", "--address", f"{SERVER[6]}/64"]
        keys = ["--key", str(self.folder / "keys")]
        return self.start(False, "server", *keys, *addresses, "--bind", bind, *args)

    def client(self, index: int = 0, *args: str, to: str = "192.0.2.1:4500") -> object:
        addresses = [f"{CLIENTS[4][index]}/24", f"{CLIENTS[6][index]}/64"]
        more = [word for each in addresses for word in ("--address", each)]
        keys = ["--key", str(self.folder / f"key{index}"), "--keepalive", "0.4"]
        name = ["--name", f"c{index}"]
        return self.start(True, "client", *keys, *more, *name, "--connect", to, *args)

    def ping(self, there: bool, address: str, *options: str) -> None:
        self.run(there, "ping", "-c", "3", "-i", "0.05", "-w", "15", *options, address)

    def ping_both_ways(self, index: int = 0) -> None:
        for version in (4, 6):
            bind = ["-I", f"c{index}"]
            self.ping(True, SERVER[version], *bind)
            self.ping(False, CLIENTS[version][index])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with another_namespace("ip link set lo up") as there:
        made = Place(tmp_path, there, [])
        ip("link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", there)
        for index, device in enumerate(("va", "vb")):
            made.run(bool(index), "ip", "link", "set", device, "up")
            for version, size in ((4, 24), (6, 64)):
                own = f"{OUTER[version][index]}/{size}"
                options = ["nodad"] if version == 6 else []
                made.run(bool(index), "ip", "addr", "add", own, "dev", device, *options)
        lines = []
        for index in range(2):
            lines.append(
                made.run(
                    False, sys.executable, EXAMPLE, "key", f"client{index}",
                    CLIENTS[4][index], CLIENTS[6][index],
                )
            )  # fmt: skip
            (tmp_path / f"key{index}").write_text(lines[-1])
        (tmp_path / "keys").write_text("# all of them\n" + "".join(lines))
        try:
            yield made
        finally:
            for process in made.running:
                process.kill()
                process.communicate()


def end(process: object, number: signal.Signals = signal.SIGTERM) -> str:
    assert isinstance(process, subprocess.Popen)
    process.send_signal(number)
    out, said = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, ""), said
    return str(said)


def transfer(place: Place, up: bool, version: int, size: int) -> None:
    """Send TCP through the tunnel, from the client if `up`; check that the data arrive intact."""
    args = [SERVER[version] if up else CLIENTS[version][0], "5000", str(size)]
    server_code, client_code = textwrap.dedent(TCP_SERVER), textwrap.dedent(TCP_CLIENT)
    command = [*place.prefix(not up), sys.executable, "-c", server_code, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            sent = place.run(up, sys.executable, "-c", client_code, *args)
            got, _ = server.communicate(timeout=30)
        finally:
            server.kill()
    assert got == sent
    assert got.split()[0] == str(size)


@pytest.mark.parametrize("version", [4, 6], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
def test_pings_pass_both_ways_and_both_ends_stop_cleanly(
    place: Place, version: int, loop: list[str]
) -> None:
    server = place.server(*loop, bind="0.0.0.0:4500" if version == 4 else "[::]:4500")
    to = f"{OUTER[4][0]}:4500" if version == 4 else f"[{OUTER[6][0]}]:4500"
    client = place.client(0, *loop, to=to)
    place.ping_both_ways()
    assert end(client, signal.SIGINT) == ""
    assert end(server) == ""
    assert "tun0" not in place.run(False, "ip", "-o", "link")


@pytest.mark.parametrize("cipher", ["aes-256-gcm", "chacha20-poly1305"])
def test_100_mb_of_tcp(place: Place, cipher: str) -> None:
    server, client = place.server("--cipher", cipher), place.client(0, "--cipher", cipher)
    place.ping_both_ways()
    transfer(place, True, 4, 100_000_000)
    transfer(place, False, 6, 100_000_000)
    assert end(client) == end(server) == ""


def test_another_cipher_is_no_session(place: Place) -> None:
    server = place.server()
    place.client(0, "--cipher", "chacha20-poly1305")
    deadline = time.monotonic() + 10
    while True:
        server.send_signal(signal.SIGUSR1)
        assert server.stderr is not None
        if "forged" in server.stderr.readline():
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_clients_use_one_server(place: Place) -> None:
    place.server()
    place.client(0)
    place.client(1)
    for version, own in ((4, CLIENTS[4][1]), (6, CLIENTS[6][1])):  # the networks are the same
        place.run(True, "ip", f"-{version}", "rule", "add", "from", own, "table", "7")
        place.run(True, "ip", f"-{version}", "route", "add", "default", "dev", "c1", "table", "7")
    for index in (0, 1, 0):
        place.ping_both_ways(index)


def test_a_client_uses_no_address_but_its_own(place: Place) -> None:
    server = place.server()
    place.client(0)
    place.ping_both_ways()
    place.run(True, "ip", "addr", "add", "10.8.0.3/24", "dev", "c0")
    place.run(True, "sh", "-c", "! ping -c 2 -i 0.05 -w 1 -I 10.8.0.3 10.8.0.1 >/dev/null")
    server.send_signal(signal.SIGUSR1)
    assert server.stderr is not None
    assert "from an address that is not the client's" in server.stderr.readline()


def test_the_server_is_restarted(place: Place) -> None:
    server = place.server()
    place.client()
    place.ping_both_ways()
    server.kill()
    server.communicate()
    place.server()
    place.ping_both_ways()


def test_the_client_is_restarted(place: Place) -> None:
    place.server()
    end(place.client())
    place.client()
    place.ping_both_ways()


def test_the_client_moves(place: Place) -> None:
    place.server()
    place.client()
    place.ping_both_ways()
    place.run(True, "ip", "addr", "flush", "dev", "vb", "scope", "global")
    place.run(True, "ip", "addr", "add", "192.0.2.77/24", "dev", "vb")
    place.ping_both_ways()


def test_a_given_mtu_is_used_and_not_exceeded(place: Place) -> None:
    place.server("--mtu", "1300")
    place.client(0, "--mtu", "1300")
    place.ping_both_ways()
    place.ping(True, SERVER[4], "-s", "1272", "-M", "do")
    place.run(True, "sh", "-c", f"! ping -c 1 -w 1 -s 1273 -M do {SERVER[4]} >/dev/null 2>&1")
    transfer(place, True, 4, 1_000_000)


@pytest.mark.parametrize("smaller", ["client", "server"])
def test_the_mss_is_lowered_by_whose_mtu_is_smaller(place: Place, smaller: str) -> None:
    """For hosts behind the tunnel, which don't know its MTU."""
    mtu = {smaller: "1300"}
    place.server("--name", "s0", "--mtu", mtu.get("server", "1400"))
    place.client(0, "--mtu", mtu.get("client", "1400"))
    place.ping_both_ways()
    place.run(True, *["ip", "route", "replace", "10.8.0.0/24", "dev", "c0", "advmss", "1460"])
    connect = f"import socket; socket.socket().connect_ex(('{SERVER[4]}', 9))"
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as wire:
        wire.bind(("s0", 0x0800))
        wire.settimeout(10)
        place.run(True, sys.executable, "-c", connect)
        packet = wire.recv(65535)
        while packet[9] != 6:
            packet = wire.recv(65535)
    assert packet[33] == 2  # SYN
    assert packet[40:44] == struct.pack("!BBH", 2, 4, 1260)


def test_invalid_messages_change_nothing(place: Place) -> None:
    server = place.server()
    place.client()
    place.ping_both_ways()
    code = """
        import os, socket
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(("192.0.2.1", 4500))
        for kind in range(6):
            for length in (0, 1, 8, 31, 32, 40, 41, 48, 100):
                sock.send(bytes([kind]) * (length > 0) + os.urandom(max(0, length - 1)))
    """
    place.run(True, sys.executable, "-c", textwrap.dedent(code))
    place.ping_both_ways()
    server.send_signal(signal.SIGUSR1)
    assert server.stderr is not None
    said = server.stderr.readline()
    counted = sum(int(each.split()[0]) for each in said.removeprefix("dropped: ").split(", "))
    assert counted >= 54
    assert end(server) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no keys"),
        ("alice 10.0.0.1 short", "line 1"),
        ("\nalice 10.0.0.256 " + "A" * 43 + "=", "line 2"),
        ("alice " + "A" * 43 + "=", "line 1"),
        (f"a 10.0.0.1 {'A' * 43}=\nb 10.0.0.1 {'B' * 42}A=", "twice"),
    ],
)
def test_a_wrong_key_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    args = ["--key", str(path), "--address", "10.8.0.1/24", "--bind", "127.0.0.1:4500"]
    done = run("udp_vpn.py", "server", *args)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "AAAA" not in done.stderr


# --- The pure parts ------------------------------------------------------------------------------


def sessions(cipher: str = "aes-256-gcm") -> tuple[Session, Session]:
    secret = os.urandom(64)
    return tuple(Session(bytes(7), secret, cipher, end, 0.0) for end in (False, True))  # type: ignore[return-value]


def test_each_message_is_taken_once_and_whole() -> None:
    dropped: Counter[str] = Counter()
    one, other = sessions()
    messages = one.seal([b"first", b"second", b"third"], dropped)
    assert other.open(messages[1:], dropped) == ([b"second", b"third"], True)
    assert other.open(messages[:1], dropped) == ([b"first"], False)
    assert other.open(messages, dropped) == ([], False)
    assert dropped == {"replayed": 3}
    (message,) = one.seal([b"fourth"], dropped)
    for octet in range(8, len(message)):
        forged = message[:octet] + bytes([message[octet] ^ 1]) + message[octet + 1 :]
        assert other.open([forged], dropped) == ([], False)
    assert other.open([message], dropped) == ([b"fourth"], True)
    # Nor is a message accepted that was reflected to its sender.
    assert one.open([message], dropped) == ([], False)


def test_messages_older_than_the_replay_window_are_dropped() -> None:
    dropped: Counter[str] = Counter()
    one, other = sessions()
    messages = one.seal([b"packet"] * (udp_vpn.WINDOW + 2), dropped)
    other.open(messages[-1:], dropped)
    packets, newest = other.open(messages[:-1], dropped)
    assert (len(packets), newest) == (udp_vpn.WINDOW - 1, False)
    assert dropped == {"replayed": 2}


def test_no_message_is_sent_after_the_last_counter() -> None:
    dropped: Counter[str] = Counter()
    one, _ = sessions()
    one._sent = udp_vpn.LAST_COUNTER - 1
    assert len(one.seal([b"last"], dropped)) == 1
    assert one.seal([b"one more"], dropped) == []
    assert dropped == {"no session": 1}


class Sock:
    """Keeps what is sent."""

    sent: list[bytes]

    def send_many_nowait(self, messages: list[bytes], address: object) -> int:
        self.sent += messages
        return len(messages)


def test_resolve_takes_host_and_port_and_refuses_anything_else() -> None:
    assert resolve("127.0.0.1:80") == ("127.0.0.1", 80)
    assert resolve("[::1]:80") == ("::1", 80, 0, 0)
    with pytest.raises(ValueError, match="HOST:PORT"):
        resolve("nowhere")


def test_no_answer_is_larger_than_its_question() -> None:
    """Otherwise a replayed HELLO with a forged source address could flood that address."""
    dropped: Counter[str] = Counter()
    client = Client("alice", [bytes([10, 8, 0, 2])], os.urandom(32))
    server = udp_vpn.Server([client], "aes-256-gcm", dropped)
    sock, there = Sock(), ("192.0.2.1", 1)

    def answer(question: bytes) -> bytes:
        sock.sent = []
        server.receive(sock, [question], there, 0.0)  # type: ignore[arg-type]
        (message,) = sock.sent
        assert len(message) <= len(question)
        return message

    hello = udp_vpn.make_hello(client)
    welcome = answer(hello)
    assert (len(hello), len(welcome)) == (udp_vpn.HELLO_BYTES, udp_vpn.WELCOME_BYTES)
    secret = udp_vpn.agree(client.key, hello, welcome, "aes-256-gcm")
    session = Session(welcome[9:16], secret, "aes-256-gcm", False, 0.0)
    answer(session.seal([b""], dropped)[0])  # a keepalive


def test_a_repeated_hello_takes_nothing_away() -> None:
    def main() -> None:
        dropped: Counter[str] = Counter()
        key = os.urandom(32)
        client = Client("alice", [bytes([10, 8, 0, 2])], key)
        server = udp_vpn.Server([client], "aes-256-gcm", dropped)
        sock, here, there = Sock(), ("192.0.2.1", 1), ("192.0.2.9", 9)
        sock.sent = []
        hello = udp_vpn.make_hello(client)

        def take(message: bytes, source: tuple[str, int]) -> list[bytes]:
            return server.receive(sock, [message], source, 0.0)  # type: ignore[arg-type]

        take(hello, here)
        secret = udp_vpn.agree(key, hello, sock.sent[0], "aes-256-gcm")
        ours = Session(sock.sent[0][9:16], secret, "aes-256-gcm", False, 0.0)
        take(ours.seal([b""], dropped)[0], here)
        current = client.current
        assert current is not None
        for _ in range(10):
            take(hello, there)
        assert client.current is current
        assert client.where is not None
        assert client.where[1] == here
        assert len(client.offered) == 4
        assert len(server._sessions) == 5
        for octet in range(len(hello)):
            take(hello[:octet] + bytes([hello[octet] ^ 1]) + hello[octet + 1 :], there)
        assert len(server._sessions) == 5
        assert sum(dropped.values()) == len(hello)
        server.tick(udp_vpn.RENEW_SECONDS * 2 + 1)
        assert not server._sessions

    main()


def syn(version: int, mss: int, before: bytes = b"", flags: int = 2) -> bytes:
    options = before + struct.pack("!BBH", 2, 4, mss)
    options += b"\1" * (-len(options) % 4)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 0, (20 + len(options)) << 2, flags, 1000, 0, 0)
    tcp += options
    ends = bytes(range(8)) if version == 4 else bytes(range(32))
    value = checksum(ends + struct.pack("!HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + value.to_bytes(2, "big") + tcp[18:]
    if version == 4:
        return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + ends + tcp
    return struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + ends + tcp


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("before", [b"", b"\1", b"\4\2", b"\1\4\2", b"\3\3\7"])
@pytest.mark.parametrize("mss", [1460, 65535, 1341])
def test_clamp_mss_lowers_an_mss_that_is_too_large(version: int, before: bytes, mss: int) -> None:
    most = 1400 - (40 if version == 4 else 60)
    assert clamp_mss(syn(version, mss, before), 1400) == syn(version, min(mss, most), before)


@pytest.mark.parametrize("version", [4, 6])
def test_what_has_no_mss_to_lower_stays_as_it_is(version: int) -> None:
    most = 1400 - (40 if version == 4 else 60)
    packet = syn(version, 1460)
    for same in (
        syn(version, most),
        syn(version, 1460, flags=16),
        *(packet[:length] for length in range(40, len(packet) - 1)),
        *(packet[:-4] + bytes([0, *packet[-3:]]) for _ in range(1)),
        *(packet[:-4] + bytes([5, length, *packet[-2:]]) for length in range(6)),
    ):
        assert clamp_mss(same, 1400) == same


def test_read_keys_reads_names_keys_and_addresses(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# nobody\n\nalice 10.8.0.2 fd08::2 {'A' * 43}=  # a comment\n")
    (client,) = read_keys(path)
    assert (client.name, client.key) == ("alice", bytes(32))
    assert [len(each) for each in client.addresses] == [4, 16]


def test_comments_of_a_key_file_may_be_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    text = f"# caf\u00e9\nalice 10.8.0.2 {'A' * 43}= # a\u2028b\n"
    path.write_bytes(text.encode() + b"# \xe9 \x0c \x1c \r \xff\n")
    assert [client.name for client in read_keys(path)] == ["alice"]
