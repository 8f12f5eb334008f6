"""The WireGuard example with wireguard-go and wg(8), and with itself.

The example is in the test's own namespace and the other end in another; a veth pair connects them.
`Side` is either end, so that each test is written once.
"""

import base64
import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _running import QUEUE
from wireguard.crypto import LABEL_MAC1, hash_, mac
from wireguard.messages import INITIATION

from ..helpers import ip, need
from .kernel import another_namespace
from .test_examples import EXAMPLES, run
from .test_offload import TCP_CLIENT, TCP_SERVER

KINDS = pytest.mark.parametrize(
    "kind", ["ours", pytest.param("wireguard-go", marks=pytest.mark.peers)]
)
# The addresses outside of the tunnel, and inside.
OUTER = {
    4: ("192.0.2.1", "192.0.2.2", "198.51.100.2"),
    6: ("2001:db8::1", "2001:db8::2", "2001:db8:1::2"),
}
INNER = {4: ("10.66.0.1", "10.66.0.2", "10.66.0.3"), 6: ("fd66::1", "fd66::2", "fd66::3")}
_ETH_P_ALL = 3  # if_ether.h; packets that we send appear with this number only
QUICK = ["--rekey-after", "2", "--rekey-timeout", "1", "--keepalive-timeout", "1"]


@dataclass
class Side:
    """One end: its keys and its namespace."""

    index: int  # in OUTER and INNER
    netns: str | None
    folder: Path
    private: str = ""
    public: str = ""
    process: "subprocess.Popen[str] | None" = None
    said: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        # wg(8) finds an interface by the name of a socket. All workers of xdist use that folder.
        return f"wg{self.index}{os.environ.get('PYTEST_XDIST_WORKER', '')}"

    def prefix(self) -> list[str]:
        return [] if self.netns is None else ["nsenter", f"--net={self.netns}"]

    def run(self, *command: str) -> str:
        words = [*self.prefix(), need(command[0]), *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def config(self, other: "Side", endpoint: str | None, *, addresses: bool = True) -> Path:
        lines = ["[Interface]", f"PrivateKey = {self.private}", "ListenPort = 51820"]
        if addresses:
            own = [f"{INNER[v][self.index]}/{size}" for v, size in ((4, 24), (6, 64))]
            lines += [f"Address = {', '.join(own)}", "DNS = 192.0.2.53"]
        lines += ["[Peer]", f"PublicKey = {other.public}", f"PresharedKey = {PSK}"]
        far = [INNER[4][other.index] + "/32", INNER[6][other.index] + "/128"]
        lines += [f"AllowedIPs = {', '.join(far)}"]
        if endpoint:
            lines += [f"Endpoint = {endpoint}"]
        path = self.folder / f"{self.name}.conf"
        path.write_text("\n".join(lines) + "\n")
        return path

    def ping(self, address: str, count: int = 3) -> None:
        self.run("ping", "-c", str(count), "-i", "0.05", "-w", "15", address)

    def status(self) -> list[str]:
        """wg(8)'s status of the only peer: key, psk, endpoint, allowed, handshake, rx, tx, …"""
        return self.run("wg", "show", self.name, "dump").splitlines()[1].split("\t")

    def handshake(self) -> int:
        return int(self.status()[4])


PSK = "cHJlc2hhcmVkIHByZXNoYXJlZCBwcmVzaGFyZWQgcHI="


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[tuple[Side, Side]]:
    """Two sides whose namespaces are connected; nothing runs yet."""
    need("wg")
    with another_namespace("ip link set lo up") as there:
        ip("link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", there)
        sides = Side(0, None, folder), Side(1, there, folder)
        for side, device in zip(sides, ("va", "vb"), strict=True):
            side.run("ip", "link", "set", device, "up")
            side.run("ip", "addr", "add", f"{OUTER[4][side.index]}/24", "dev", device)
            side.run("ip", "addr", "add", f"{OUTER[6][side.index]}/64", "dev", device, "nodad")
            make_keys(side)
        try:
            yield sides
        finally:
            for side in sides:
                if side.process is not None:
                    kill(side)


def make_keys(side: Side) -> None:
    side.private = side.run("wg", "genkey").strip()
    side.public = subprocess.run(
        ["wg", "pubkey"], input=side.private, capture_output=True, text=True, check=True
    ).stdout.strip()


def kill(side: Side) -> None:
    assert side.process is not None
    side.process.kill()
    side.process.communicate()
    side.process = None
    # A killed process leaves its socket, and then we could not see when the next one is ready.
    Path("/var/run/wireguard", f"{side.name}.sock").unlink(missing_ok=True)


def endpoint(side: Side, version: int = 4) -> str:
    address = OUTER[version][side.index]
    return f"[{address}]:51820" if version == 6 else f"{address}:51820"


def start(kind: str, side: Side, other: Side, to: str | None, *args: str) -> None:
    """Start a peer of that kind; `to` is the other's endpoint if it is known."""
    if kind == "ours":
        start_ours(side, other, to, *args)
    else:
        start_go(side, other, to)


def start_ours(side: Side, other: Side, to: str | None, *args: str) -> None:
    start_with(side, side.config(other, to), *args)


def start_with(side: Side, config: Path, *args: str, before: Sequence[str] = ()) -> None:
    """Start the example with a configuration."""
    command = [*side.prefix(), *before, sys.executable, "-W", "error", str(EXAMPLES / "wireguard")]
    side.process = subprocess.Popen(
        [*command, str(config), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert side.process.stdout is not None
    assert side.process.stderr is not None
    first = side.process.stdout.readline()
    assert first == f"ready {side.name}\n", side.process.stderr.read()
    assert side.process.stderr.readline() == "note: DNS is ignored\n"


def start_go(side: Side, other: Side, to: str | None) -> None:
    start_program([need("wireguard-go"), "-f", side.name], side, other, to)


def start_program(command: list[str], side: Side, other: Side, to: str | None) -> None:
    """Start a WireGuard that makes its interface and is then configured by wg(8) and ip(8)."""
    side.process = subprocess.Popen(
        [*side.prefix(), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    socket_ = Path("/var/run/wireguard", f"{side.name}.sock")
    until(socket_.is_socket)
    side.run("wg", "setconf", side.name, str(side.config(other, to, addresses=False)))
    for version, size in ((4, 24), (6, 64)):
        own = f"{INNER[version][side.index]}/{size}"
        side.run("ip", "addr", "add", own, "dev", side.name, *(["nodad"] if size == 64 else []))
    side.run("ip", "link", "set", side.name, "mtu", "1420", "up")


def end(side: Side, number: signal.Signals = signal.SIGTERM) -> str:
    """End the example as a user would, and return its stderr."""
    assert side.process is not None
    side.process.send_signal(number)
    out, said = side.process.communicate(timeout=10)
    status, side.process = side.process.returncode, None
    assert (status, out) == (0, ""), said
    assert side.name not in side.run("ip", "-o", "link")
    assert not Path("/var/run/wireguard", f"{side.name}.sock").exists()
    return said


def until(predicate: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, predicate
        time.sleep(0.005)


def transfer(source: Side, target: Side, version: int, size: int) -> None:
    """Send TCP through the tunnel, and check that the data arrive intact."""
    args = [INNER[version][target.index], "5000", str(size)]
    python = [sys.executable, "-c"]
    with subprocess.Popen(
        [*target.prefix(), *python, textwrap.dedent(TCP_SERVER), *args], stdout=subprocess.PIPE
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            sent = source.run(*python, textwrap.dedent(TCP_CLIENT), *args)
            got, _ = server.communicate(timeout=30)
        finally:
            server.kill()
    assert got.decode() == sent
    assert got.split()[0] == str(size).encode()


@KINDS
@pytest.mark.parametrize("version", [4, 6], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("first", ["initiator", "responder"])
def test_pings_pass_both_ways_with_another_wireguard(
    kind: str, version: int, first: str, tmp_path: Path
) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b, version) if first == "initiator" else None)
        start(kind, b, a, endpoint(a, version) if first == "responder" else None)
        sides = (a, b) if first == "initiator" else (b, a)
        for source, target in (sides, sides[::-1]):
            for inner in (4, 6):
                source.ping(INNER[inner][target.index])
        # Each shows the other to wg(8).
        now = int(time.time())
        for side, other in ((a, b), (b, a)):
            found = side.status()
            assert found[:3] == [other.public, PSK, endpoint(other, version)]
            assert abs(now - int(found[4])) <= 20
            assert int(found[5]) > 1000
            assert int(found[6]) > 1000
        assert end(a) == ""


@KINDS
@pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
def test_100_mb_of_tcp(kind: str, loop: list[str], tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b), *loop)
        start(kind, b, a, None)
        transfer(a, b, 4, 100_000_000)
        transfer(b, a, 6, 100_000_000)
        assert end(a, signal.SIGINT) == ""


@KINDS
def test_rekeying_under_traffic(kind: str, tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b), *QUICK)
        start(kind, b, a, None)
        a.ping(INNER[4][1])
        seen = {b.handshake()}
        deadline = time.monotonic() + 30
        while len(seen) < 4:
            assert time.monotonic() < deadline
            transfer(a, b, 4, 3_000_000)
            transfer(b, a, 4, 3_000_000)
            # No ping is lost.
            a.run("ping", "-c", "10", "-i", "0.01", "-W", "2", "-q", INNER[6][1])
            seen.add(b.handshake())
        assert end(a) == ""


@KINDS
def test_the_peer_is_restarted(kind: str, tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b), "--keepalive-timeout", "1", "--rekey-timeout", "1")
        start(kind, b, a, None)
        a.ping(INNER[4][1])
        kill(b)
        start(kind, b, a, None)
        a.ping(INNER[4][1])
        b.ping(INNER[6][0])
        assert end(a) == ""


@KINDS
def test_ours_is_restarted(kind: str, tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start(kind, b, a, endpoint(a))
        start("ours", a, b, endpoint(b))
        a.ping(INNER[4][1])
        assert end(a) == ""
        start("ours", a, b, endpoint(b))
        a.ping(INNER[4][1])
        b.ping(INNER[4][0])
        assert end(a) == ""


@KINDS
@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_the_endpoint_moves(kind: str, who: str, tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b))
        start(kind, b, a, None)
        a.ping(INNER[4][1])
        mover, stayer, device = (a, b, "va") if who == "ours" else (b, a, "vb")
        if (kind, who) == ("wireguard-go", "theirs"):
            # Debian's wireguard-go keeps using a source address that was removed, so change the
            # port.
            moved = f"{OUTER[4][1]}:51999"
            mover.run("wg", "set", mover.name, "listen-port", "51999")
        else:
            moved = f"192.0.2.{mover.index + 77}:51820"
            mover.run("ip", "addr", "flush", "dev", device, "scope", "global")
            mover.run("ip", "addr", "add", f"{moved.removesuffix(':51820')}/24", "dev", device)
        mover.ping(INNER[4][stayer.index])
        assert stayer.status()[2] == moved
        stayer.ping(INNER[6][mover.index])
        assert end(a) == ""


QUICK_RETRIES = ("--rekey-timeout", "0.3", "--rekey-attempt", "60")


def test_the_network_goes_away_and_comes_back(tmp_path: Path) -> None:
    """In the last case ours sends from its address inside, which would be a loop as an endpoint."""
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b), *QUICK_RETRIES)
        start("ours", b, a, None)
        a.ping(INNER[4][1])
        flush = "addr flush dev va scope global"
        gone = (["link set va down"], [flush], [flush, "route add 192.0.2.0/24 dev va"])
        for number, words in enumerate(gone):
            for each in words:
                a.run("ip", *each.split())
            lost = subprocess.run([need("ping"), "-w", "1", "-i", "0.2", "-q", INNER[4][1]])
            assert lost.returncode != 0
            moved = f"192.0.2.{77 + number}"
            a.run("ip", "link", "set", "va", "up")
            a.run("ip", "addr", "flush", "dev", "va", "scope", "global")
            a.run("ip", "addr", "add", f"{moved}/24", "dev", "va")
            a.ping(INNER[4][1])
            assert b.status()[2] == f"{moved}:51820"
            assert int(b.status()[6]) < 100_000
        assert end(a) == ""


@pytest.mark.parametrize("wrong", ["192.0.2.99", f"{OUTER[6][1]}99"])
def test_a_peers_name_is_looked_up_again(wrong: str, tmp_path: Path) -> None:
    """The name has another address, or one of the other family, where nobody is."""
    hosts = tmp_path / "hosts"
    more = f"{OUTER[4][1]} peer.test\n" if ":" in wrong else ""
    hosts.write_text(f"{wrong} peer.test\n{more}")
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    before = [need("unshare"), "-m", need("sh"), "-c", script, str(hosts)]
    with joined(tmp_path) as (a, b):
        start("ours", b, a, None)
        start_with(a, a.config(b, "peer.test:51820"), *QUICK_RETRIES, before=before)
        if not more:
            lost = subprocess.run([need("ping"), "-w", "1", "-i", "0.2", "-q", INNER[4][1]])
            assert lost.returncode != 0
            hosts.write_text(f"{OUTER[4][1]} peer.test\n")
        a.ping(INNER[4][1])
        assert a.status()[2] == endpoint(b)
        assert end(a) == ""


@KINDS
@pytest.mark.parametrize("first", ["initiator", "responder"])
def test_forged_replayed_and_truncated_messages_change_nothing(
    kind: str, first: str, tmp_path: Path
) -> None:
    """Captures real messages and sends them to the example again, unchanged and damaged."""
    with joined(tmp_path) as (a, b), Wire() as wire:
        if first == "initiator":
            start(kind, b, a, None)
            start("ours", a, b, endpoint(b))
            a.ping(INNER[4][1])
        else:
            start("ours", a, b, None)
            start(kind, b, a, endpoint(a))
            b.ping(INNER[4][0])
        # The other's response or initiation, and data.
        wanted = {2, 4} if first == "initiator" else {1, 4}
        messages = wire.messages(lambda kinds: wanted <= kinds)
        before, handshake = a.status(), a.handshake()
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with source:
            for message in messages:
                for bad in spoilt(message):
                    source.sendto(bad, (OUTER[4][0], 51820))
        a.ping(INNER[4][1])  # so the earlier messages have been read
        after = a.status()
        assert (after[2], a.handshake()) == (before[2], handshake)
        assert end(a) == ""


@KINDS
def test_ours_under_load_asks_for_a_cookie(kind: str, tmp_path: Path) -> None:
    """The other end sends the cookie back and is then accepted."""
    with joined(tmp_path) as (a, b):
        start("ours", a, b, None, "--handshakes", "0")  # always under load
        start(kind, b, a, endpoint(a), *(["--rekey-timeout", "1"] if kind == "ours" else []))
        b.ping(INNER[4][0], count=1)
        a.ping(INNER[4][1])
        said = status_of(a)
        assert "1 under load, answered with a cookie" in said
        assert "latest handshake" in said
        assert end(a) == ""


@KINDS
def test_ours_sends_the_cookie_back(kind: str, tmp_path: Path) -> None:
    """The other end is under load. A forged, truncated or replayed cookie changes nothing."""
    with joined(tmp_path) as (a, b), Wire() as wire:
        start(kind, b, a, None, *(["--handshakes", "0"] if kind == "ours" else []))
        start("ours", a, b, endpoint(b), "--rekey-timeout", "1")
        with Flood(b) if kind == "wireguard-go" else contextlib.nullcontext():
            ping = subprocess.Popen(
                [need("ping"), "-w", "15", "-c", "1", "-q", INNER[4][1]], stdout=subprocess.DEVNULL
            )
            (cookie,) = (m for m in wire.messages(lambda kinds: 3 in kinds) if m[0] == 3)
        assert ping.wait() == 0
        assert wire.sent(lambda message: message[0] == 1 and any(message[-16:]))
        before, handshake = a.status(), a.handshake()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
            for bad in spoilt(cookie):
                source.sendto(bad, (OUTER[4][0], 51820))
        a.ping(INNER[4][1])
        assert (a.status()[2], a.handshake()) == (before[2], handshake)
        assert end(a) == ""


@KINDS
def test_peers_may_use_only_their_own_addresses(kind: str, tmp_path: Path) -> None:
    """One peer's network is inside the other's, and neither may use the other's addresses."""
    with joined(tmp_path) as (a, b), another_namespace("ip link set lo up") as third:
        c = Side(2, third, tmp_path)
        make_keys(c)
        ip("link", "add", "vc", "type", "veth", "peer", "name", "vd", "netns", third)
        for side, device, own in ((a, "vc", "198.51.100.1"), (c, "vd", OUTER[4][2])):
            side.run("ip", "link", "set", device, "up")
            side.run("ip", "addr", "add", f"{own}/24", "dev", device)
        config = a.config(b, endpoint(b))
        more = f"[Peer]\nPublicKey = {c.public}\nPresharedKey = {PSK}\n"
        config.write_text(config.read_text() + more + "AllowedIPs = 10.66.0.0/24, fd66::3/128\n")
        start_with(a, config)
        start("ours", b, a, endpoint(a))
        start(kind, c, a, "198.51.100.1:51820")
        try:
            c.ping(INNER[4][0])
            for version in (4, 6):
                a.ping(INNER[version][1])
                a.ping(INNER[version][2])
            c.run("ip", "addr", "add", f"{INNER[4][1]}/32", "dev", c.name)
            pretend = f"! ping -c 2 -i 0.05 -w 1 -I {INNER[4][1]} {INNER[4][0]} >/dev/null"
            c.run("sh", "-c", pretend)
            a.run("sh", "-c", "! ping -6 -c 1 -w 1 fd66::9 >/dev/null")  # no peer's address
            said = status_of(a, peers=2)
            assert "from an address that is not its own" in said.partition(c.public)[2]
            assert "from an address that is not its own" not in said.partition(c.public)[0]
            assert "1 to nobody's address" in said
        finally:
            kill(c)
        assert end(a) == ""


class Flood:
    """Floods a peer with handshakes from a sender that knows its public key.

    It begins when the peer is under load: until then, the peer would answer others as usual.
    """

    def __init__(self, side: Side) -> None:
        self._mac1_key = hash_(LABEL_MAC1 + base64.b64decode(side.public))
        self._target = (OUTER[4][side.index], 51820)
        self._stop, self._got_cookie = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()
        if not self._got_cookie.wait(20):
            self.__exit__()
            raise AssertionError("the peer sends no cookies")

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        messages = [INITIATION + os.urandom(112) for _ in range(50)]
        messages = [each + mac(self._mac1_key, each) + bytes(16) for each in messages]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while not self._stop.is_set():
                for message in messages:
                    sock.sendto(message, self._target)
                with contextlib.suppress(BlockingIOError):
                    if sock.recv(65535, socket.MSG_DONTWAIT)[0] == 3:
                        self._got_cookie.set()


def status_of(side: Side, peers: int = 1) -> str:
    """The example's output at SIGUSR1."""
    assert side.process is not None
    assert side.process.stderr is not None
    side.process.send_signal(signal.SIGUSR1)
    lines: list[str] = []
    while sum("transfer:" in line for line in lines) < peers or lines[-1] != "\n":
        lines.append(side.process.stderr.readline())
    return "".join(lines)


def spoilt(message: bytes) -> Iterator[bytes]:
    """The message unchanged, with one flipped bit, and truncated."""
    yield message
    digest = hashlib.sha256(message).digest()
    for octet in range(0, len(message), 7):
        bit = bytes([message[octet] ^ 1 << digest[octet % 32] % 8])
        yield message[:octet] + bit + message[octet + 1 :]
        yield message[:octet]


# Both ports, where the IP header is 20 bytes (linux/filter.h): load, compare, load, compare.
_PORTS = [(0x28, 0, 0, 20), (0x15, 0, 3, 51820), (0x28, 0, 0, 22), (0x15, 0, 1, 51820)]
_PORTS += [(0x06, 0, 0, 65535), (0x06, 0, 0, 0)]  # accept, or drop
_SO_ATTACH_FILTER = 26


class Wire:
    """Captures the messages that the other side sends, and keeps those that ours sends."""

    def __init__(self) -> None:
        self._sent: list[bytes] = []
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))

    def __enter__(self) -> "Wire":
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _PORTS))
        program = struct.pack("HP", len(_PORTS), ctypes.addressof(code))
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        self._sock.bind(("va", _ETH_P_ALL))
        self._sock.settimeout(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def messages(self, enough: Callable[[set[int]], bool]) -> list[bytes]:
        found: list[bytes] = []
        while not enough({message[0] for message in found}):
            found += self._one()
        return found

    def sent(self, wanted: Callable[[bytes], bool]) -> bool:
        """Wait until ours sends such a message, if it has not done so already."""
        while not any(map(wanted, self._sent)):
            self._one()
        return True

    def _one(self) -> list[bytes]:
        """Read one packet; return its message if it is for ours."""
        packet, sender = self._sock.recvfrom(65535)
        if sender[2] == socket.PACKET_HOST:
            return [packet[28:]]
        self._sent.append(packet[28:])
        return []


def test_status_at_a_signal(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, endpoint(b))
        start("ours", b, a, None)
        a.ping(INNER[4][1])
        shown = status_of(a)
        for wanted in (
            f"interface: {a.name}\n",
            f"public key: {a.public}\n",
            f"peer: {b.public}\n",
            f"endpoint: {endpoint(b)}\n",
            "latest handshake: ",
        ):
            assert wanted in shown
        assert a.private not in shown
        mode = Path("/var/run/wireguard", f"{a.name}.sock").stat().st_mode
        assert mode & 0o077 == 0
        assert end(a) == ""
        assert end(b) == ""


def test_the_status_shows_packets_that_the_kernel_dropped(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        start("ours", a, b, None)
        assert a.process is not None
        assert a.process.stderr is not None
        a.process.send_signal(signal.SIGSTOP)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
            source.connect((INNER[4][1], 9))
            for _ in range(QUEUE + 500):
                source.send(b"")
        a.process.send_signal(signal.SIGCONT)
        a.process.send_signal(signal.SIGUSR1)
        lines = iter(a.process.stderr.readline, "")
        lost = next(line for line in lines if line.startswith("  lost: "))
        assert 500 <= int(lost.split()[1]) < 520
        assert "the device's queue was full" in lost
        end(a)


def test_routes_to_allowed_ips(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b):
        config = a.config(b, endpoint(b))
        config.write_text(config.read_text() + "AllowedIPs = 10.77.0.0/16, 0.0.0.0/0\n")
        start_again = subprocess.Popen(
            [
                sys.executable,
                str(EXAMPLES / "wireguard"),
                str(config),
                "--control",
                str(config / "s"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        a.process = start_again
        assert start_again.stdout is not None
        assert start_again.stdout.readline() == f"ready {a.name}\n"
        routes = {each["dst"] for each in ip("route", "show", "dev", a.name)}
        assert routes == {"10.66.0.0/24", "10.66.0.2", "10.77.0.0/16"}
        said = end(a)
        assert "no route for 0.0.0.0/0 is made" in said
        assert "no control socket" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [("[Interface]\nPrivateKey = nonsense\n", "line 2: PrivateKey: not a key"), ("", "PrivateKey")],
)
def test_a_wrong_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    path.write_text(text)
    done = run("wireguard", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = run("wireguard", str(tmp_path / "wg0.conf"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"wireguard: {tmp_path}/wg0.conf: No such file or directory\n"
    assert run("wireguard").stderr.endswith("arguments are required: CONFIG\n")


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    with joined(tmp_path) as (a, b), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 51820))
        done = run("wireguard", str(a.config(b, None)))
        assert done.returncode == 1
        assert "another socket is bound to 0.0.0.0:51820" in done.stderr
        assert [name for _, name in socket.if_nameindex() if name.startswith("wg")] == []
