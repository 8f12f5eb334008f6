"""Compares the VPN examples with wireguard-go and OpenVPN: throughput, time, round trips, loss.

A veth pair with an MTU of 1,500 joins two namespaces. Each contender runs at both ends during the
whole benchmark, and they take turns. All may use all cores; wireguard-go uses several. Unlike on a
real path, both ends, the sender and the receiver share the cores. So compare the figures with each
other, not with the speed of a line.

`python -m benchmarks vpn` runs without a network. So `python -m benchmarks.vpn` builds the newest
wireguard-go for it beforehand.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ._harness import (
    HERE,
    BenchError,
    Row,
    Table,
    child,
    compiled,
    expect,
    in_turn,
    output_of,
    processor_time,
    wait_ready,
)

SECONDS = 2.0  # of TCP, a turn
PINGS = 2000  # a turn
UDP_SECONDS = 60.0
OFFERED = 1.0  # Gbit/s of UDP, in datagrams of 1,300 bytes
OUTER = "192.0.2"
EXAMPLES = HERE.parent / "examples"
NEWEST = HERE / "build" / "wireguard"
MODULE = "golang.zx2c4.com/wireguard@latest"

# Measures from the first byte to the last, so that connecting does not count.
RECEIVER = """
    import socket, sys, time
    family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    with socket.create_server((sys.argv[1], int(sys.argv[2])), family=family) as server:
        print("ready", flush=True)
        sock, _ = server.accept()
    buffer = bytearray(1 << 20)
    got, start = 0, 0.0
    while count := sock.recv_into(buffer):
        start = start or time.perf_counter()
        got += count
    print(got, time.perf_counter() - start)
"""
SENDER = """
    import socket, sys, time
    data, end = bytes(1 << 20), time.monotonic() + float(sys.argv[3])
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as sock:
        while time.monotonic() < end:
            sock.sendall(data)
"""
UDP_RECEIVER = """
    import socket, struct, sys
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    sock.bind((sys.argv[1], 5202))
    print("ready", flush=True)
    buffer, got = bytearray(65536), 0
    while True:
        sock.settimeout(None if not got else 3)
        try:
            count = sock.recv_into(buffer)
        except TimeoutError:
            break
        if count == 1:
            break
        got += 1
    print(got)
"""
# Sends what is due every millisecond or so. If it did not get the core for long, it does not catch
# up: a burst as fast as a loop can send would exceed the rate that it is asked for.
UDP_SENDER = """
    import contextlib, socket, sys, time
    address, rate, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((address, 5202))
    data, sent, due = bytes(1300), 0, 0.0
    last = start = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        due = min(due + (now - last) * rate, rate / 50)
        last = now
        while due >= 1:
            sock.send(data)
            sent += 1
            due -= 1
        time.sleep(0.001)
    time.sleep(0.5)
    with contextlib.suppress(ConnectionRefusedError):  # the receiver ends at the first
        for _ in range(5):
            sock.send(b".")
    print(sent)
"""


class Field:
    """The two namespaces, and the programs in them."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self._stack = stack
        self.folder = folder
        holder = stack.enter_context(
            child("unshare", "-n", "sh", "-c", "echo ready; exec sleep 1d")
        )
        assert holder.stdout is not None
        expect("the other namespace", holder.stdout.readline(), "ready\n")
        self._there = f"/proc/{holder.pid}/ns/net"
        self.names: dict[str, str] = {}  # each contender's network
        self._programs: dict[str, list[int]] = {}  # each contender's processes
        veth = "ip link add va type veth peer name vb netns"
        self.run(0, *veth.split(), self._there)
        self.run(1, "ip", "link", "set", "lo", "up")
        for end, device in enumerate(("va", "vb")):
            address = f"{OUTER}.{end + 1}/24"
            self.run(end, *f"ip addr add {address} dev {device}".split())
            self.run(end, *f"ip link set {device} up".split())

    def prefix(self, end: int) -> list[str]:
        return ["nsenter", f"--net={self._there}"] if end else []

    def run(self, end: int, *command: str, text: str | None = None) -> str:
        done = subprocess.run(
            [*self.prefix(end), *command], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def start(self, end: int, *command: str) -> "subprocess.Popen[str]":
        return self._stack.enter_context(child(*self.prefix(end), *command))

    def enter(self, name: str, end: int, *command: str) -> "subprocess.Popen[str]":
        """Start one end of a contender."""
        process = self.start(end, *command)
        self._programs.setdefault(name, []).append(process.pid)
        return process

    def processor_seconds(self, name: str) -> float:
        """How long both ends of a contender have run so far, in user space and in the kernel."""
        return sum(map(processor_time, self._programs[name]))

    def network(self, name: str) -> tuple[int, str]:
        """Choose a number for a contender, and the first three bytes of its network."""
        number = len(self.names)
        self.names[name] = f"10.90.{number}"
        return number, self.names[name]

    def target(self, name: str, end: int = 1, version: int = 4) -> str:
        if version == 6:
            return f"fd90:{self.names[name].rpartition('.')[2]}::{end + 1}"
        return f"{self.names[name]}.{end + 1}"

    def until(self, what: str, predicate: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not predicate():
            if time.monotonic() > deadline:
                raise BenchError(f"{what} was not ready within 20 s")
            time.sleep(0.02)

    def reaches(self, name: str) -> bool:
        command = ["ping", "-c", "1", "-W", "1", "-q", self.target(name)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- The contenders ------------------------------------------------------------------------------


def wireguard(field: Field, name: str, program: Sequence[str], *, ours: bool) -> None:
    """Start one of the WireGuard programs. All get the same configuration."""
    number, network = field.network(name)
    port = 51820 + number
    private = [field.run(0, "wg", "genkey").strip() for _ in range(2)]
    public = [field.run(0, "wg", "pubkey", text=key).strip() for key in private]
    for end in (0, 1):
        device = f"wg{number}{'ab'[end]}"
        own = [f"{network}.{end + 1}/24", f"{field.target(name, end, 6)}/64"]
        far = f"{network}.{2 - end}/32, {field.target(name, 1 - end, 6)}/128"
        lines = ["[Interface]", f"PrivateKey = {private[end]}", f"ListenPort = {port}"]
        lines += [f"Address = {', '.join(own)}"] * ours
        lines += ["[Peer]", f"PublicKey = {public[1 - end]}", f"AllowedIPs = {far}"]
        lines += [f"Endpoint = {OUTER}.{2 - end}:{port}"]
        path = field.folder / f"{device}.conf"
        path.write_text("\n".join(lines) + "\n")
        if ours:
            wait_ready(field.enter(name, end, *program, str(path)))
            continue
        # Hide its recommendation to use the kernel's WireGuard.
        field.enter(name, end, "sh", "-c", 'exec "$@" 2>/dev/null', "sh", *program, "-f", device)
        control = Path("/var/run/wireguard", f"{device}.sock")
        field.until(name, control.is_socket)
        field.run(end, "wg", "setconf", device, str(path))
        field.run(end, *f"ip addr add {own[0]} dev {device}".split())
        field.run(end, *f"ip addr add {own[1]} dev {device} nodad".split())
        field.run(end, *f"ip link set {device} mtu 1420 up".split())
    field.until(name, lambda: field.reaches(name))


def udp_vpn(field: Field, name: str, options: Sequence[str], mtu: int) -> None:
    number, network = field.network(name)
    port = 4500 + number
    program = [sys.executable, str(EXAMPLES / "udp_vpn.py")]
    keys = field.folder / f"udp_vpn{number}.keys"
    keys.write_text(field.run(0, *program, "key", "bench", f"{network}.1"))
    ends = (["client", "--connect", f"{OUTER}.2:{port}"], ["server", "--bind", f"0.0.0.0:{port}"])
    for end in (1, 0):
        more = ["--key", str(keys), "--address", f"{network}.{end + 1}/24", "--mtu", str(mtu)]
        wait_ready(field.enter(name, end, *program, *ends[end], *more, *options))
    field.until(name, lambda: field.reaches(name))


def openvpn(field: Field, name: str, mtu: int) -> None:
    """Start OpenVPN with TLS, because its static keys have no AEAD, tuned as its manual advises."""
    number, network = field.network(name)
    port = 1194 + number
    prints: list[str] = []
    stem = [str(field.folder / f"openvpn{number}{end}") for end in (0, 1)]
    for each in stem:
        curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9 -subj /CN=bench"
        pair = ["-keyout", f"{each}.key", "-out", f"{each}.crt"]
        field.run(0, "openssl", "req", "-x509", *curve.split(), *pair)
        said = field.run(
            0, "openssl", "x509", "-in", f"{each}.crt", "-noout", "-fingerprint", "-sha256"
        )
        prints.append(said.strip().partition("=")[2])
    for end in (1, 0):
        tls = ["--tls-server", "--dh", "none"] if end else ["--tls-client"]
        field.enter(
            name, end, "openvpn", "--dev", f"ovpn{number}{'ab'[end]}", "--dev-type", "tun",
            "--proto", "udp", "--port", str(port), "--remote", f"{OUTER}.{2 - end}",
            "--ifconfig", f"{network}.{end + 1}", f"{network}.{2 - end}", *tls,
            "--cert", f"{stem[end]}.crt", "--key", f"{stem[end]}.key",
            "--peer-fingerprint", prints[1 - end], "--cipher", "AES-256-GCM",
            "--data-ciphers", "AES-256-GCM", "--tun-mtu", str(mtu), "--mssfix", "0",
            "--sndbuf", "4194304", "--rcvbuf", "4194304", "--txqueuelen", "1000",
            "--fast-io", "--disable-dco", "--verb", "1", "--log", f"{stem[end]}.log",
        )  # fmt: skip
    field.until(name, lambda: field.reaches(name))


def available(program: str, what: str) -> bool:
    if shutil.which(program) is None:
        print(f"vpn: {what} is not installed; skipped")
        return False
    return True


def enter(field: Field, loops: Sequence[str]) -> list[str]:
    """Start all contenders that are installed; return their names."""
    ours = {loop: ["--uvloop"] * (loop == "uvloop") for loop in loops}
    if available("wg", "wireguard-tools"):
        for loop, options in ours.items():
            program = [sys.executable, str(EXAMPLES / "wireguard"), *options]
            wireguard(field, f"wireguard, {loop}", program, ours=True)
        if available("wireguard-go", "wireguard-go"):
            wireguard(field, "wireguard-go", ["wireguard-go"], ours=False)
        if NEWEST.exists():
            wireguard(field, "wireguard-go, newest", [str(NEWEST)], ours=False)
        else:
            print("vpn: the newest wireguard-go is skipped; build it: python -m benchmarks.vpn")
    for loop, options in ours.items():
        udp_vpn(field, f"udp_vpn, {loop}", options, 1420)
        udp_vpn(field, f"udp_vpn, mtu 9000, {loop}", options, 9000)
    if available("openvpn", "openvpn") and available("openssl", "openssl"):
        openvpn(field, "OpenVPN", 1420)
        openvpn(field, "OpenVPN, mtu 9000", 9000)
    return list(field.names)


# --- Measuring -----------------------------------------------------------------------------------


@dataclass
class Turn:
    """What was measured of a contender in one turn."""

    rate: float = 0.0  # of one TCP stream, Gbit/s
    cost: float = 0.0  # of that, processor seconds a GB
    four: float = 0.0  # Gbit/s of four streams
    both: float = 0.0  # of one stream in each direction
    version6: float = 0.0  # of one stream over IPv6; 0 where there is none
    udp: float = 0.0  # Gbit/s of UDP that arrived
    trip: float = 0.0  # microseconds


def throughput(field: Field, name: str, senders: Sequence[int] = (0,), version: int = 4) -> float:
    """Return Gbit/s of TCP streams together, each from the end that is given for it."""
    receivers, sending = [], []
    for place, end in enumerate(senders):
        words = [field.target(name, 1 - end, version), str(5201 + place)]
        code = textwrap.dedent(RECEIVER)
        receiver = field.start(1 - end, sys.executable, "-c", code, *words)
        assert receiver.stdout is not None
        expect("the receiver", receiver.stdout.readline(), "ready\n")
        receivers.append(receiver)
        sending.append((end, [sys.executable, "-c", textwrap.dedent(SENDER), *words, f"{SECONDS}"]))
    started = [field.start(end, *command) for end, command in sending]
    for process in started:
        output_of(process)
    rate = 0.0
    for receiver in receivers:
        got, took = output_of(receiver).split()
        rate += int(got) * 8 / float(took) / 1e9
    return rate


def measure(field: Field, name: str) -> Turn:
    turn, before = Turn(), field.processor_seconds(name)
    turn.rate = throughput(field, name)
    gigabytes = turn.rate / 8 * SECONDS
    turn.cost = (field.processor_seconds(name) - before) / gigabytes
    turn.trip = round_trip(field, name)
    if name.startswith("wireguard"):
        turn.four = throughput(field, name, (0, 0, 0, 0))
        turn.both = throughput(field, name, (0, 1))
        turn.version6 = throughput(field, name, version=6)
        sent, got = datagrams(field, name, OFFERED, SECONDS)
        turn.udp = OFFERED * got / sent
    return turn


def round_trip(field: Field, name: str) -> float:
    """Return the mean round trip in microseconds."""
    with child(str(compiled("pinger.c")), field.target(name), str(PINGS)) as process:
        mean, _, lost = output_of(process).split()
    expect(f"pings that {name} lost", lost, "0")
    return int(mean) / 1000


def datagrams(field: Field, name: str, gbits: float, seconds: float) -> tuple[int, int]:
    """Send datagrams at that rate; return how many were sent, and how many arrived."""
    target, rate = field.target(name), gbits * 1e9 / 8 / 1300
    receiver = field.start(1, sys.executable, "-c", textwrap.dedent(UDP_RECEIVER), target)
    assert receiver.stdout is not None
    expect("the receiver", receiver.stdout.readline(), "ready\n")
    arguments = [target, f"{rate:f}", str(seconds)]
    sent = int(field.run(0, sys.executable, "-c", textwrap.dedent(UDP_SENDER), *arguments))
    return sent, int(output_of(receiver))


def lost(field: Field, name: str, gbits: float) -> tuple[float, int]:
    """Send datagrams at that rate for a minute; return how many were lost, and how many sent."""
    before = kernel_drops(field)
    sent, got = datagrams(field, name, gbits, UDP_SECONDS)
    count = sent - got
    if count:
        after = kernel_drops(field)
        places = [f"{after[each] - before[each]} {each}" for each in after]
        print(f"vpn: {name}: {count} lost, of which the kernel dropped {', '.join(places)}")
    return float(count), sent


def kernel_drops(field: Field) -> dict[str, int]:
    """Return how many packets full queues, of devices and of sockets, have dropped so far."""
    found: dict[str, int] = {}
    for end, place in enumerate(("at the sender's end", "at the receiver's end")):
        devices = field.run(end, "cat", "/proc/net/dev").splitlines()[2:]
        found[f"before a device {place}"] = sum(int(each.split()[12]) for each in devices)
        head, values = [
            line.split()
            for line in field.run(end, "cat", "/proc/net/snmp").splitlines()
            if line.startswith("Udp:")
        ]
        found[f"before a socket {place}"] = int(values[head.index("RcvbufErrors")])
    return found


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        # wg(8) looks for Unix sockets in /run. There must be only ours.
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        for conf in ("all", "default"):  # `isolate` has switched IPv6 off
            Path(f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6").write_text("0")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        field = Field(stack, folder)
        names = enter(field, loops)
        turns = in_turn({name: partial(measure, field, name) for name in names}, runs)
        for loop in loops:
            yield from tables(loop, turns)
        rates = {name: [each.rate for each in turns[name]] for name in names}
        # Measure the others at half of their throughput too, to show what the machine itself loses.
        peers = [
            name for name in ("wireguard-go", "wireguard-go, newest", "OpenVPN") if name in rates
        ]
        for loop in loops:
            ours = [name for name in (f"wireguard, {loop}", f"udp_vpn, {loop}") if name in rates]
            rows: list[Row] = []
            for name in ours + peers:
                half = statistics.median(rates[name]) / 2
                count, sent = lost(field, name, half)
                reached = sent * 1300 * 8 / UDP_SECONDS / 1e9
                label = f"{name.removesuffix(f', {loop}')}: of {sent} ({reached:.2f} Gbit/s)"
                target = 0 if name in ours else None
                rows.append(Row(label, "datagrams", [count], percentile=100, target=target))
            peers = []
            yield Table("vpn", loop, f"lost in {UDP_SECONDS:.0f} s at half the throughput", rows)


# What is compared of WireGuard programs: a field of `Turn`, in words, and its unit. Then how much
# of the other's ours has to be, at least or at most: of wireguard-go as it is packaged, and of the
# newest.
COMPARED: list[tuple[str, str, str, bool, float | None, float | None]] = [
    ("rate", "one TCP stream", "Gbit/s", True, 1.2, 1.1),
    ("cost", "one TCP stream: processor time of both ends", "s/GB", False, None, 0.85),
    ("four", "four TCP streams", "Gbit/s", True, None, 1.0),
    ("both", "a TCP stream in each direction", "Gbit/s", True, None, 1.0),
    ("version6", "one TCP stream over IPv6", "Gbit/s", True, None, 1.0),
    (
        "udp",
        f"delivered of {OFFERED:g} Gbit/s in datagrams of 1,300 bytes",
        "Gbit/s",
        True,
        None,
        1.5,
    ),
    ("trip", f"{PINGS} flood pings, one at a time", "us", False, 1.5, 1.2),
]


def tables(loop: str, turns: dict[str, list[Turn]]) -> Iterator[Table]:
    def values(name: str, what: str) -> list[float]:
        return [getattr(turn, what) for turn in turns[name]]

    ours = f"wireguard, {loop}"
    for what, title, unit, more, *targets in COMPARED if ours in turns else []:
        rows: list[Row] = [Row("wireguard", unit, values(ours, what))]
        for other, target in zip(("wireguard-go", "wireguard-go, newest"), targets, strict=True):
            if other in turns:
                pair = values(ours, what), values(other, what)
                rows.append(Row(other, unit, pair[1]))
                name = f"ours / {other}"
                rows.append(Row(name, unit, *pair, target=target, at_least=more))
        yield Table("vpn", loop, f"WireGuard, {title}", rows)
    rows = []
    for size in ("", ", mtu 9000"):
        mine, other = f"udp_vpn{size}, {loop}", f"OpenVPN{size}"
        rows.append(Row(f"udp_vpn{size}", "Gbit/s", values(mine, "rate")))
        if other in turns:
            pair = values(mine, "rate"), values(other, "rate")
            rows.append(Row(other, "Gbit/s", pair[1]))
            target = 1.2 if size else 2.5
            name = f"ours / {other}"
            rows.append(Row(name, "Gbit/s", *pair, target=target, at_least=True))
    yield Table("vpn", loop, f"AES-256-GCM, one TCP stream for {SECONDS:g} s", rows)


def build() -> None:
    """Build the newest wireguard-go. This needs a Go toolchain and a network."""
    go = shutil.which("go")
    if go is None:
        print("vpn: can't build the newest wireguard-go: there is no Go toolchain")
        return
    NEWEST.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "GOBIN": str(NEWEST.parent)}
    done = subprocess.run(
        [go, "install", MODULE], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"vpn: can't build {MODULE}: {(done.stderr.splitlines() or ['no reason given'])[-1]}")


if __name__ == "__main__":
    build()
