"""The examples as users run them: in their own processes, reached through the kernel's sockets."""

import contextlib
import importlib
import ipaddress
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..helpers import ROOT, checksum, ip, make_icmp_echo, ordinary_python

EXAMPLES = ROOT / "examples"
PING, UDP = "ping_responder.py", "udp_echo.py"

# Two networks of each version. The example has all their addresses except the first of each.
ADDRESSES = ["10.81.0.1/24", "10.82.0.129/25", "fd81::1/64", "fd82::1/120"]
OPTIONS = ["--name", "ex0", *(word for each in ADDRESSES for word in ("--address", each))]
REACHED4 = ["10.81.0.2", "10.81.0.77", "10.81.0.254", "10.82.0.130"]
REACHED6 = ["fd81::2", "fd81::ffff:ffff:ffff:ffff", "fd82::ff"]

SO_NO_CHECK = 11  # asm-generic/socket.h
LOOPS = pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
BOTH = pytest.mark.parametrize("example", [PING, UDP])


@dataclass
class Service:
    """An example that serves."""

    process: subprocess.Popen[str]
    name: str

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """End it as a user would, check that it exits with 0, and return its stderr."""
        self.process.send_signal(number)
        out, said = self.process.communicate(timeout=10)
        assert self.process.returncode == 0, said
        assert out == ""
        assert self.name not in [name for _, name in socket.if_nameindex()]
        return said

    def wait_for_state(self, wanted: str) -> None:
        wait_for_state(self.process.pid, wanted)


def wait_for_state(pid: int, wanted: str) -> None:
    """Wait until the kernel shows a process's main thread in this state (proc_pid_stat(5))."""
    deadline = time.monotonic() + 10
    while True:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if found == wanted:
            return
        assert time.monotonic() < deadline, f"{found}, not {wanted}"
        time.sleep(0.001)


@contextlib.contextmanager
def start(
    example: str,
    *args: str,
    command: list[str] | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Service]:
    """Run an example, and wait until it prints that it is ready."""
    process = subprocess.Popen(
        command or [sys.executable, "-W", "error", str(EXAMPLES / example), *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            first = process.stdout.readline()
            if not first.startswith("ready "):
                process.kill()
                raise AssertionError(f"not ready: {first!r}, {process.stderr.read()!r}")
            yield Service(process, first.removeprefix("ready ").rstrip("\n"))
        finally:
            if process.poll() is None:
                process.kill()


def run(example: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run an example that must fail."""
    options.setdefault("args", [sys.executable, str(EXAMPLES / example), *args])
    return subprocess.run(capture_output=True, text=True, timeout=20, **options)


def check_failure(done: subprocess.CompletedProcess[str], status: int, said: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if status == 1:
        assert done.stderr.count("\n") == 1


def wait_for_addresses() -> None:
    """Wait until the kernel uses all addresses of ex0.

    A new IPv6 address is tentative until a kernel work queue has skipped duplicate detection.
    Packets that leave earlier have the source ::1, so their answers don't come back.
    """
    deadline = time.monotonic() + 10
    while any(
        "tentative" in address
        for link in ip("-6", "addr", "show", "dev", "ex0")
        for address in link.get("addr_info", [])
    ):
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Pinger:
    """A raw ICMP socket, for pings of one version."""

    def __init__(self, version: int, ident: int = 0x4242) -> None:
        self.version, self.ident, self._seq = version, ident, 0
        if version == 4:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        else:
            self._sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        self._sock.settimeout(5)
        self._asked: dict[int, tuple[str, bytes]] = {}

    def __enter__(self) -> "Pinger":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def ask(self, address: str, size_bytes: int = 56) -> int:
        """Send a request with this payload size after the ICMP header; return its number."""
        self._seq += 1
        payload = os.urandom(size_bytes)
        request = struct.pack(
            "!BBHHH", 8 if self.version == 4 else 128, 0, 0, self.ident, self._seq
        )
        request += payload
        if self.version == 4:  # the kernel does this for IPv6
            request = request[:2] + checksum(request).to_bytes(2, "big") + request[4:]
        self._sock.sendto(request, (address, 0))
        self._asked[self._seq] = (address, payload)
        return self._seq

    def answer(self) -> int:
        """Wait for an answer, check that it is the one asked for, and return its number."""
        while True:
            packet, sender = self._sock.recvfrom(65535)
            if self.version == 4:
                assert packet[8] == 64
                packet = packet[20:]
            kind, code, _, ident, seq = struct.unpack_from("!BBHHH", packet)
            # The socket receives neighbor discovery and unreachable messages, too.
            if (kind, code, ident) == (0 if self.version == 4 else 129, 0, self.ident):
                break
        # Each number only once.
        number = int(seq)
        address, payload = self._asked.pop(number)
        assert sender[0] == address
        assert packet[8:] == payload
        return number

    def is_answered(self) -> bool:
        """Whether an answer has arrived."""
        return bool(select.select([self._sock], [], [], 0)[0])

    def check(self, address: str, size_bytes: int = 56) -> None:
        """Ping, and check that this ping is the next one that is answered.

        All requests go through one queue and are answered in order, so no earlier request was
        answered.
        """
        number = self.ask(address, size_bytes)
        assert self.answer() == number


@contextlib.contextmanager
def pingers() -> Iterator[tuple[Pinger, Pinger]]:
    with Pinger(4) as four, Pinger(6) as six:
        yield four, six


# --- Pings ---------------------------------------------------------------------------------------


@LOOPS
@BOTH
def test_the_examples_answer_pings_of_every_size(example: str, loop: list[str]) -> None:
    with start(example, *OPTIONS, *loop) as service, pingers() as (four, six):
        assert service.name == "ex0"
        for pinger, addresses in ((four, REACHED4), (six, REACHED6)):
            for address in addresses:
                for size in (0, 1, 56, 57, 1400):
                    pinger.check(address, size)
        # The largest that fit the MTU of 1500.
        four.check("10.81.0.2", 1472)
        six.check("fd81::2", 1452)
        assert service.end() == ""


@LOOPS
def test_many_pings_at_once(loop: list[str]) -> None:
    with start(PING, *OPTIONS, *loop) as service, pingers() as (four, six):
        for pinger, address in ((four, "10.81.0.9"), (six, "fd81::9")):
            # Fewer than the 500 packets that the kernel queues for a TUN device.
            asked = [pinger.ask(address) for _ in range(200)]
            assert [pinger.answer() for _ in asked] == asked
        assert service.end() == ""


@LOOPS
@BOTH
def test_fragments_are_not_answered_and_harmless(example: str, loop: list[str]) -> None:
    with start(example, *OPTIONS, *loop) as service, pingers() as (four, six):
        for pinger, address in ((four, "10.81.0.2"), (six, "fd81::2")):
            for size in (1473, 3000, 20_000):
                pinger.ask(address, size)
                pinger.check(address)
        assert service.end() == ""


@LOOPS
@BOTH
def test_only_its_networks_are_answered(example: str, loop: list[str]) -> None:
    with start(example, *OPTIONS, *loop) as service, pingers() as (four, six):
        ip("route", "add", "10.80.0.0/12", "dev", "ex0")
        ip("-6", "route", "add", "fd80::/12", "dev", "ex0")
        for outside in ("10.80.255.255", "10.81.1.0", "10.82.0.126", "10.82.1.0"):
            four.ask(outside)
            four.check("10.81.0.2")
        for outside in ("fd80::2", "fd81:0:0:1::", "fd82::100"):
            six.ask(outside)
            six.check("fd81::2")
        # Broadcasts are not answered.
        for everybody in ("10.81.0.255", "10.82.0.255"):
            four.ask(everybody)
            four.check("10.81.0.2")
        assert service.end() == ""


def test_a_network_of_two_addresses_has_no_broadcast() -> None:
    with start(PING, "--name", "ex0", "--address", "10.81.0.0/31") as service, Pinger(4) as pinger:
        pinger.check("10.81.0.1")
        assert service.end() == ""


def test_without_options_the_service_answers_on_tun0() -> None:
    with start(PING) as service:
        assert service.name == "tun0"
        addresses = [each["addr_info"] for each in ip("addr", "show", "dev", "tun0")]
        networks = [ipaddress.ip_interface(f"{a['local']}/{a['prefixlen']}") for a in addresses[0]]
        assert networks
        for each in networks:
            with Pinger(each.version) as pinger:
                pinger.check(str(each.ip + 6))
        assert service.end() == ""


def test_two_services_side_by_side() -> None:
    with (
        start(PING, "--name", "ping%d", "--address", "10.81.0.1/24") as first,
        start(UDP, "--name", "ping%d", "--address", "10.82.0.1/24") as second,
        Pinger(4) as pinger,
    ):
        assert (first.name, second.name) == ("ping0", "ping1")
        pinger.check("10.81.0.2")
        pinger.check("10.82.0.2")
        assert first.end() == ""
        pinger.check("10.82.0.2")
        assert second.end() == ""


# --- UDP -----------------------------------------------------------------------------------------


def udp(address: str, port: int = 7) -> socket.socket:
    """A socket for datagrams to and from this address only."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.connect((address, port))
    return sock


def silent(sock: socket.socket) -> bool:
    """Whether this socket has received nothing."""
    sock.setblocking(False)
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    return False


@LOOPS
def test_udp_is_echoed(loop: list[str]) -> None:
    with start(UDP, *OPTIONS, *loop) as service:
        for address in REACHED4 + REACHED6:
            with udp(address) as sock:
                # Up to the largest that fits the MTU of 1500.
                for size in (0, 1, 2, 3, 56, 511, 1399, 1452 if ":" in address else 1472):
                    payload = os.urandom(size)
                    sock.send(payload)
                    assert sock.recv(65535) == payload
        assert service.end() == ""


@LOOPS
@pytest.mark.parametrize("address", ["10.81.0.5", "fd81::5"])
def test_udp_from_many_ports_at_once(address: str, loop: list[str]) -> None:
    with start(UDP, *OPTIONS, *loop) as service, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(udp(address)) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.send(b"%d" % number)
        for number, sock in enumerate(socks):
            assert sock.recv(100) == b"%d" % number
        assert service.end() == ""


@pytest.mark.parametrize("port", [1, 4242, 65535])
def test_udp_on_another_port(port: int) -> None:
    with start(UDP, *OPTIONS, "--port", str(port)) as service:
        for address in ("10.81.0.2", "fd81::2"):
            with udp(address) as standard, udp(address, port) as sock:
                standard.send(b"nobody there")
                sock.send(b"hello")
                assert sock.recv(100) == b"hello"
                assert silent(standard)
        assert service.end() == ""


def test_udp_without_a_checksum() -> None:
    with start(UDP, *OPTIONS) as service, udp("10.81.0.2") as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        for payload in (b"", b"odd", b"even"):
            sock.send(payload)
            assert sock.recv(100) == payload
        assert service.end() == ""


@LOOPS
@pytest.mark.parametrize("address", ["10.81.0.2", "fd81::2"])
def test_udp_fragments_are_not_echoed_and_harmless(address: str, loop: list[str]) -> None:
    with start(UDP, *OPTIONS, *loop) as service, udp(address) as sock:
        for size in (1473, 4000, 60_000):
            sock.send(bytes(size))
            sock.send(b"whole")
            assert sock.recv(65535) == b"whole"
        assert service.end() == ""


@pytest.mark.parametrize(("address", "own"), [("10.81.0.2", "10.81.0.1"), ("fd81::2", "fd81::1")])
def test_udp_from_another_echo_service_is_not_echoed(address: str, own: str) -> None:
    with start(UDP, *OPTIONS) as service, udp(address) as sock:
        with socket.socket(sock.family, socket.SOCK_DGRAM) as other:
            other.bind((own, 7))
            other.sendto(b"echo me", (address, 7))
            sock.send(b"hello")
            assert sock.recv(100) == b"hello"
            assert silent(other)
        assert service.end() == ""


# --- Down, deleted, and the end ------------------------------------------------------------------


@LOOPS
@BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(example: str, loop: list[str], number: signal.Signals) -> None:
    with start(example, *OPTIONS, *loop) as service:
        assert service.end(number) == ""


@LOOPS
def test_a_signal_amid_a_flood_ends_it(loop: list[str]) -> None:
    with start(PING, *OPTIONS, *loop) as service, Pinger(4) as pinger:
        for _ in range(400):
            pinger.ask("10.81.0.2")
        assert service.end() == ""


@LOOPS
def test_a_service_survives_its_link_going_down_and_up(loop: list[str]) -> None:
    with start(UDP, *OPTIONS, *loop) as service, pingers() as (four, six):
        for _ in range(2):
            four.check("10.81.0.2")
            six.check("fd81::2")
            ip("link", "set", "ex0", "down")
            with pytest.raises(OSError, match="unreachable"):
                four.ask("10.81.0.2")
            ip("link", "set", "ex0", "up")
            # The kernel drops a link's IPv6 addresses when it goes down.
            ip("addr", "add", "fd81::1/64", "dev", "ex0")
            wait_for_addresses()
        four.check("10.81.0.2")
        six.check("fd81::2")
        with udp("10.81.0.2") as sock:
            sock.send(b"still here")
            assert sock.recv(100) == b"still here"
        assert service.end() == ""


@LOOPS
@BOTH
def test_answers_that_find_the_link_down_are_counted(example: str, loop: list[str]) -> None:
    with start(example, *OPTIONS, *loop) as service, Pinger(4) as pinger:
        pinger.check("10.81.0.2")
        service.process.send_signal(signal.SIGSTOP)
        service.wait_for_state("T")
        for _ in range(3):
            pinger.ask("10.81.0.2")
        ip("link", "set", "ex0", "down")
        service.process.send_signal(signal.SIGCONT)
        # Packets that are already queued can still be read. When the program sleeps, it has
        # tried to answer all of them.
        service.wait_for_state("S")
        ip("link", "set", "ex0", "up")
        pinger.check("10.81.0.2")
        assert service.end() == "3 answers could not be sent\n"


@LOOPS
@BOTH
def test_an_interface_that_is_deleted_is_one_line(example: str, loop: list[str]) -> None:
    with start(example, *OPTIONS, *loop) as service:
        ip("link", "delete", "ex0")
        out, said = service.process.communicate(timeout=10)
        check_failure(
            subprocess.CompletedProcess([], service.process.returncode, out, said), 1, "ex0"
        )


# --- Failures ------------------------------------------------------------------------------------


@LOOPS
@BOTH
def test_a_name_that_is_busy_is_one_line(example: str, loop: list[str]) -> None:
    with start(PING, "--name", "ex0") as service:
        done = run(example, "--name", "ex0", "--address", "10.85.0.1/24", *loop)
        check_failure(done, 1, "the only queue of ex0 is in use")
        # The other program's interface was not changed.
        assert "10.85.0.1" not in str(ip("addr"))
        assert service.end() == ""


@BOTH
def test_another_kind_of_interface_is_one_line(example: str) -> None:
    check_failure(run(example, "--name", "lo"), 1, "not a TUN device")


@BOTH
def test_a_missing_privilege_is_one_line(example: str) -> None:
    python, env = ordinary_python()
    # Only root may be able to enter the folder of this checkout.
    copies = Path("/run/aiotun-examples")
    shutil.copytree(EXAMPLES, copies, ignore=shutil.ignore_patterns("__pycache__"))
    try:
        done = run(example, args=[*python, str(copies / example), "--name", "ex0"], env=env)
    finally:
        shutil.rmtree(copies)
    check_failure(done, 1, "CAP_NET_ADMIN")
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


@BOTH
def test_a_missing_uvloop_is_one_line(example: str, tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(example, "--uvloop", env={**os.environ, "PYTHONPATH": path})
    check_failure(done, 1, "aiotun[uvloop]")


@pytest.mark.parametrize(
    ("example", "args", "said"),
    [
        (PING, ["--nonsense"], "--nonsense"),
        (PING, ["--name", "much-too-long-name"], "1 to 15"),
        (PING, ["--address", "10.0.0.256/24"], "10.0.0.256/24"),
        (PING, ["--address", "10.0.0.1/33"], "10.0.0.1/33"),
        (PING, ["--address"], "expected one argument"),
        (PING, ["--name", "sixteen-bytes-16"], "sixteen-bytes-16"),
        (PING, ["--name", "a/b"], "a/b"),
        (PING, ["--name", ""], "name"),
        (PING, ["--port", "7"], "--port"),
        (PING, ["more"], "more"),
        (UDP, ["--name", "two words"], "two words"),
        (UDP, ["--address", "home"], "home"),
        (UDP, ["--port", "0"], "1 to 65535"),
        (UDP, ["--port", "65536"], "1 to 65535"),
        (UDP, ["--port", "-7"], "1 to 65535"),
        (UDP, ["--port", "echo"], "1 to 65535"),
        (UDP, ["--port", "\u00b2"], "1 to 65535"),
    ],
)
def test_the_examples_refuse_invalid_arguments(
    example: str, args: Sequence[str], said: str
) -> None:
    check_failure(run(example, *args), 2, said)
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


@pytest.mark.parametrize(("example", "said"), [(PING, "Answers pings"), (UDP, "A UDP echo")])
def test_help_lists_the_options(example: str, said: str) -> None:
    done = run(example, "--help")
    assert done.returncode == 0
    assert said in done.stdout
    for option in ("--name", "--address", "--uvloop"):
        assert option in done.stdout
    assert done.stderr == ""


# --- The examples' pure parts --------------------------------------------------------------------

Echo = Callable[[bytes, int], bytes | None]


def example_module(name: str) -> Any:
    """Import an example as another example would: from its own folder."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


ECHO4: Echo = example_module("udp_echo").echo4
ECHO6: Echo = example_module("udp_echo").echo6


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("10.0.0.1/24", ["10.0.0.0", "10.0.0.254"], ["9.255.255.255", "10.0.0.255", "10.0.1.0"]),
        ("10.0.0.1/30", ["10.0.0.2"], ["10.0.0.3", "10.0.0.4"]),
        ("10.0.0.2/31", ["10.0.0.2", "10.0.0.3"], ["10.0.0.1", "10.0.0.4"]),
        ("10.0.0.2/32", ["10.0.0.2"], ["10.0.0.1", "10.0.0.3"]),
        ("0.0.0.1/0", ["0.0.0.0", "255.255.255.254"], ["255.255.255.255", "::1"]),
        ("fd00::1/120", ["fd00::", "fd00::ff"], ["fcff:" + "ffff:" * 6 + "ffff", "fd00::100"]),
        ("fd00::1/128", ["fd00::1"], ["fd00::", "fd00::2", "0.0.0.1"]),
        ("::a00:1/96", ["::a00:1"], ["10.0.0.1"]),
    ],
)
def test_networks_hold_their_hosts_and_nothing_else(
    network: str, inside: list[str], outside: list[str]
) -> None:
    networks = example_module("_service").Networks([ipaddress.ip_interface(network)])
    assert [each for each in inside if ipaddress.ip_address(each).packed not in networks] == []
    assert [each for each in outside if ipaddress.ip_address(each).packed in networks] == []
    for length in (0, 1, 3, 5, 15, 17):  # the address of a truncated packet
        assert bytes(length) not in networks


def datagram(source: str, target: str, ports: tuple[int, int], data: bytes, hops: int) -> bytes:
    """A UDP datagram in its packet, with all checksums right."""
    ping = make_icmp_echo(source, target)
    length = 8 + len(data)
    head = struct.pack("!HHHH", *ports, length, 0)
    if ping[0] == 0x45:
        pseudo = ping[12:20] + struct.pack("!HH", 17, length)
        start = ping[:2] + struct.pack("!H", 20 + length) + ping[4:8] + bytes((hops, 17, 0, 0))
        start += ping[12:20]
        start = start[:10] + checksum(start).to_bytes(2, "big") + start[12:]
    else:
        pseudo = ping[8:40] + struct.pack("!II", length, 17)
        start = ping[:4] + struct.pack("!HBB", length, 17, hops) + ping[8:40]
    value = checksum(pseudo + head + data) or 0xFFFF  # RFC 768: 0 means no checksum
    return start + head[:6] + value.to_bytes(2, "big") + data


PORTS = st.integers(1, 0xFFFF).filter(lambda port: port != 7)


@pytest.mark.parametrize(
    ("echo", "source", "target"),
    [(ECHO4, "10.0.0.1", "10.0.0.77"), (ECHO6, "fd00::1", "fd00::77")],
)
@given(port=PORTS, data=st.binary(max_size=64), hops=st.integers(0, 255), behind=st.binary())
def test_an_echo_is_the_datagram_turned_round(
    echo: Echo, source: str, target: str, port: int, data: bytes, hops: int, behind: bytes
) -> None:
    packet = datagram(source, target, (port, 7), data, hops)
    expected = datagram(target, source, (7, port), data, 64)
    assert echo(packet + behind, 7) == expected
    assert echo(packet, 8) is None
    assert echo(expected, 7) is None


@pytest.mark.parametrize("ports", [(0, 7), (7, 7), (5, 8), (7, 5)])
def test_ports_that_are_not_echoed(ports: tuple[int, int]) -> None:
    assert ECHO4(datagram("10.0.0.1", "10.0.0.77", ports, b"", 64), 7) is None
    assert ECHO6(datagram("fd00::1", "fd00::77", ports, b"", 64), 7) is None


@pytest.mark.parametrize("fragment", [0x2000, 0x2001, 0x0001, 0x1FFF])
def test_a_fragment_is_not_echoed_even_where_it_looks_whole(fragment: int) -> None:
    packet = datagram("10.0.0.1", "10.0.0.77", (5, 7), b"data", 64)
    assert ECHO4(packet[:6] + b"\x40\0" + packet[8:], 7) is not None  # don't fragment
    assert ECHO4(packet[:6] + fragment.to_bytes(2, "big") + packet[8:], 7) is None


def test_a_datagram_without_a_checksum_is_echoed_without_one() -> None:
    packet = datagram("10.0.0.1", "10.0.0.77", (5, 7), b"data", 64)
    answer = ECHO4(packet[:26] + b"\0\0" + packet[28:], 7)
    assert answer is not None
    assert answer[26:] == b"\0\0data"


@given(st.binary(max_size=80), st.dictionaries(st.integers(0, 47), st.integers(0, 255), max_size=3))
def test_hostile_bytes_never_raise(noise: bytes, changes: dict[int, int]) -> None:
    for source, target in (("10.0.0.1", "10.0.0.77"), ("fd00::1", "fd00::77")):
        packet = datagram(source, target, (5, 7), noise, 64)
        changed = bytes(changes.get(i, byte) for i, byte in enumerate(packet))
        for data in (noise, changed, changed[: len(noise)]):
            for echo in (ECHO4, ECHO6):
                answer = echo(data, 7)
                assert answer is None or len(answer) <= len(data)


@pytest.mark.parametrize(
    "words",
    [
        (PING, "--address", "10.0.0.1"),
        (UDP, "--address", "fd00::1"),
        ("dhcp_server.py", "--address", "10.0.0.1"),
        ("udp_vpn.py", "server", "--key", "nowhere", "--address", "10.0.0.1"),
    ],
    ids=" ".join,
)
def test_an_address_without_its_prefix_length_is_refused(words: tuple[str, ...]) -> None:
    address = words[-1]
    length = 64 if ":" in address else 24
    check_failure(run(*words), 2, f"{address} has no prefix length; write {address}/{length}")
