"""examples/dhcp_server.py: real clients on a real bridge, and two hundred simulated clients."""

import contextlib
import http.server
import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from ..helpers import ip, need
from . import dhcp, kernel
from .dhcp import Message, Opt, Type, Wire
from .programs import booting, cpu_seconds, example, running, wait_for

A, B = dhcp.mac_of(1001), dhcp.mac_of(1002)
FIRST, SECOND = IPv4Address("10.85.0.10"), IPv4Address("10.85.0.11")
QUICK = ["--probe", "0.05"]  # nothing on these bridges takes longer to answer


@pytest.fixture(autouse=True)
def bridge() -> None:
    dhcp.add_bridge()


def addresses(place: str, name: str = "eth0") -> list[str]:
    """The IPv4 addresses of an interface in another namespace."""
    shown = json.loads(kernel.inside(place, "ip", "-j", "-4", "addr", "show", "dev", name))
    return [each["local"] for link in shown for each in link["addr_info"]]


# --- Frames by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_answers_arp_and_ping(number: signal.Signals) -> None:
    with dhcp.serving() as server, dhcp.host() as place:
        kernel.inside(place, "ip", "addr", "add", "10.85.0.200/24", "dev", "eth0")
        kernel.inside(place, "ping", "-c", "3", "-i", "0.01", "-W", "5", str(dhcp.SERVER))
        neighbour = kernel.inside(place, "ip", "-j", "neigh", "show", str(dhcp.SERVER))
        assert json.loads(neighbour)[0]["lladdr"] == dhcp.SERVER_MAC.hex(":")
        (line,) = [line for line in server.end(number) if line.startswith("counters")]
    assert "ping 3" in line
    assert "dhcp0" not in kernel.names()


def test_a_client_from_discover_to_release() -> None:
    given = ["--router", "10.85.0.2", "--dns", "9.9.9.9", "--dns", "1.1.1.1", "--lease", "500"]
    with dhcp.serving(*QUICK, *given) as server, Wire() as wire:
        assert wire.lease(A) == FIRST
        renewal = Message(Type.REQUEST, 3, A, ciaddr=FIRST)
        answer = wire.ask(renewal, dhcp.SERVER)  # renewing
        assert (answer.type, answer.yiaddr) == (Type.ACK, FIRST)
        assert answer.options[Opt.ROUTER] == IPv4Address("10.85.0.2").packed
        assert answer.options[Opt.DNS] == bytes((9, 9, 9, 9, 1, 1, 1, 1))
        assert answer.options[Opt.LEASE_TIME] == (500).to_bytes(4, "big")
        assert wire.ask(renewal).type is Type.ACK  # rebinding
        assert wire.ask(Message(Type.INFORM, 4, B, ciaddr=SECOND), dhcp.SERVER).type is Type.ACK
        wire.send(Message(Type.RELEASE, 5, A, ciaddr=FIRST), dhcp.SERVER)
        options = {Opt.REQUESTED_ADDRESS: FIRST.packed}
        wire.send(Message(Type.DISCOVER, 6, B, options=options))
        assert wire.answer().yiaddr == FIRST
        assert wire.ask(dhcp.request(B, FIRST)).type is Type.ACK
        wire.send(Message(Type.DECLINE, 7, B, options=options))
        assert wire.lease(B) == SECOND
        found = dhcp.counters(server)
    assert (found["release"], found["decline"], found["blocked"]) == (1, 1, 1)
    assert found["ack_sent"] == 6


def test_answers_go_where_they_can_be_heard() -> None:
    relay, relay_mac = IPv4Address("10.85.0.254"), dhcp.mac_of(254)
    with dhcp.serving(*QUICK) as server, Wire() as wire:
        wire.send(Message(Type.DISCOVER, 1, A))
        assert wire.frame()[:6] == A
        wire.send(Message(Type.DISCOVER, 1, A, broadcast=True))
        assert wire.frame()[:6] == dhcp.ALL
        wire.send(Message(Type.DISCOVER, 1, B, giaddr=relay), dhcp.SERVER, relay_mac)
        frame = wire.frame()
        assert (frame[:6], frame[30:34], frame[36:38]) == (relay_mac, relay.packed, b"\0\x43")
        wire.send(dhcp.request(A, SECOND))  # not what was offered
        assert wire.frame()[:6] == dhcp.ALL
        found = dhcp.counters(server)
    assert (found["relayed"], found["nak_sent"]) == (1, 1)


def test_an_address_that_somebody_has_is_not_offered() -> None:
    with dhcp.serving(*QUICK) as server, dhcp.host() as place, Wire() as wire:
        for address in (FIRST, SECOND):
            kernel.inside(place, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        assert wire.lease(A) == SECOND + 1
        assert dhcp.counters(server)["in_use"] == 2


def test_bad_messages_do_no_harm() -> None:
    """Invalid messages of every kind, from a fixed seed; then an ordinary client."""
    noise = random.Random(85)
    good = Message(Type.DISCOVER, 1, B).pack(1)
    with dhcp.serving(*QUICK) as server, Wire() as wire:
        for _ in range(300):
            data = bytearray(good)
            for _ in range(5):
                data[noise.randrange(len(data))] = noise.randrange(256)
            macs, ends = (B, dhcp.ALL), (dhcp.NOBODY, dhcp.EVERYBODY)
            frame = dhcp.frames.udp(macs, ends, (68, 67), bytes(data[: noise.randrange(300)]))
            wire.sock.send(frame)
            damaged = bytearray(frame)
            damaged[noise.randrange(12, len(frame))] ^= 0xFF
            wire.sock.send(damaged)
        wire.send(Message(Type.DISCOVER, 99, A))
        while (answer := wire.answer()).xid != 99:
            pass
        assert answer.type is Type.OFFER
        found = dhcp.counters(server)
    assert found["malformed"] > 300


def test_a_range_that_is_exhausted() -> None:
    network = ["--address", "10.85.0.1/24", "--range", "10.85.0.10-10.85.0.11"]
    with dhcp.serving(*QUICK, network=network) as server, Wire() as wire:
        assert [wire.lease(mac) for mac in (A, B)] == [FIRST, SECOND]
        wire.send(Message(Type.DISCOVER, 1, dhcp.mac_of(3)))
        wire.send(Message(Type.RELEASE, 2, A, ciaddr=FIRST))
        assert wire.lease(dhcp.mac_of(3)) == FIRST
        assert dhcp.counters(server)["exhausted"] == 1


# --- Many ----------------------------------------------------------------------------------------


def test_a_new_client_is_answered_when_its_probe_is_over() -> None:
    with dhcp.serving("--probe", "0.3") as server, Wire() as wire:
        start = time.monotonic()
        assert wire.ask(Message(Type.DISCOVER, 1, A)).type is Type.OFFER
        assert 0.3 <= time.monotonic() - start < 0.8
        server.end()


def test_two_hundred_clients_at_once(tmp_path: Path) -> None:
    with dhcp.serving("--leases", str(tmp_path / "leases.db")) as server, Wire() as wire:
        leases = dhcp.lease_many(wire, 200)
        assert len(set(leases.values())) == 200
        assert dhcp.counters(server)["ack_sent"] == 200


def test_a_thousand_renewals_a_second(tmp_path: Path) -> None:
    """Measures the server's CPU time per renewal: the time to answer depends on the load.

    On an idle machine it answers 2,000 a second, 99% of them within 20 ms.
    """
    with dhcp.serving("--leases", str(tmp_path / "leases.db")) as server, Wire() as wire:
        leases = dhcp.lease_many(wire, 200)
        before = cpu_seconds(server.process.pid)
        _, took = dhcp.renewals(wire, leases, 1200, 3000)
        used = cpu_seconds(server.process.pid) - before
        assert len(took) == 3000
        assert used / 3000 < 0.001
        assert "nak_sent" not in dhcp.counters(server)


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_loses_no_lease_and_gives_none_twice(tmp_path: Path, seed: int) -> None:
    """Killed while it grants: every client keeps its address, and no other client gets it."""
    file = str(tmp_path / "leases.db")
    told: dict[bytes, IPv4Address] = {}
    wanted = random.Random(seed).randrange(20, 180)
    with Wire() as wire:
        with dhcp.serving(*QUICK, "--leases", file) as server:
            for number in range(200):
                wire.send(Message(Type.DISCOVER, 1, dhcp.mac_of(number)))
            while len(told) < wanted:
                answer = wire.answer()
                if answer.type is Type.OFFER:
                    wire.send(dhcp.request(answer.chaddr, answer.yiaddr))
                else:
                    told[answer.chaddr] = answer.yiaddr
            server.process.kill()
            server.process.wait()
        # The answers that it had sent before it was killed count, too.
        wire.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                answer = wire.answer()
                if answer.type is Type.ACK:
                    told[answer.chaddr] = answer.yiaddr
        wire.sock.settimeout(10)
        with dhcp.serving(*QUICK, "--leases", file) as server:
            for mac, address in told.items():
                answer = wire.ask(Message(Type.REQUEST, 9, mac, ciaddr=address), dhcp.SERVER)
                assert (answer.type, answer.yiaddr) == (Type.ACK, address)
            everybody = {**dhcp.lease_many(wire, 200)}
            server.end()
    assert len(set(everybody.values())) == 200
    assert told.items() <= everybody.items()


# --- Other people's clients ----------------------------------------------------------------------


@pytest.mark.peers
def test_udhcpc_gets_renews_and_releases_a_lease(tmp_path: Path) -> None:
    program = need("udhcpc")
    script = str(dhcp.hook(tmp_path))
    command = [program, "-f", "-R", "-i", "eth0", "-s", script, "-t", "5", "-T", "1"]
    with dhcp.serving("--router", "10.85.0.2") as server, dhcp.host() as place:
        with running(["nsenter", f"--net={place}", *command]) as client:
            client.expect("hook bound 10.85.0.10 10.85.0.2")
            assert addresses(place) == ["10.85.0.10"]
            kernel.inside(place, "ping", "-c", "1", "-W", "5", str(dhcp.SERVER))
            client.process.send_signal(signal.SIGUSR1)  # renew
            client.expect("hook renew 10.85.0.10")
            client.process.send_signal(signal.SIGUSR2)  # release
            client.expect("hook deconfig")
            client.process.send_signal(signal.SIGUSR1)  # and ask again
            client.expect("hook bound 10.85.0.10")
        found = dhcp.counters(server)
    assert found["release"] == 1
    assert found["ack_sent"] >= 3  # more if the machine is slow: the client asks again
    assert found.get("nak_sent", 0) == 0


@pytest.mark.peers
def test_dhclient_gets_renews_keeps_and_releases_a_lease(tmp_path: Path) -> None:
    """ISC's client: a lease, renewals by itself, the same lease after a restart, and a release."""
    program = need("dhclient")
    (tmp_path / "conf").write_text("timeout 10;\n")
    files = {"-sf": dhcp.hook(tmp_path), "-cf": tmp_path / "conf"}
    files |= {"-lf": tmp_path / "leases", "-pf": tmp_path / "pid"}
    words = [str(word) for pair in files.items() for word in pair]
    with dhcp.serving("--lease", "6") as server, dhcp.host() as place:
        command = ["nsenter", f"--net={place}", program, *words]
        with running([*command, "-d", "eth0"]) as client:
            client.expect("hook BOUND 10.85.0.10")
            assert addresses(place) == ["10.85.0.10"]
            client.expect("hook RENEW 10.85.0.10")
        with running([*command, "-d", "eth0"]) as client:
            client.expect("hook REBOOT 10.85.0.10")
        with running([*command, "-d", "-r", "eth0"]) as client:
            client.expect("hook RELEASE")
            client.wait()
        wait_for(lambda: addresses(place) == [])
        found = dhcp.counters(server)
    assert found["release"] == 1
    assert found["ack_sent"] >= 3
    assert (found["discover"], found.get("nak_sent", 0)) == (1, 0)


@contextlib.contextmanager
def web_server(address: str, page: bytes) -> Iterator[list[str]]:
    """Serve one page; yields the list of requested paths."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer((address, 80), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.peers
def test_a_machine_boots_from_the_network(tmp_path: Path) -> None:
    """QEMU's iPXE gets a lease and boots the file that the server named, over HTTP."""
    ip("addr", "add", "10.85.0.2/24", "dev", "br0")
    script = b"#!ipxe\necho booted from ${filename} as ${net0/ip}\n"
    boot = ["--boot-file", "http://10.85.0.2/boot.ipxe", "--router", "10.85.0.2"]
    with dhcp.serving(*boot) as server, web_server("10.85.0.2", script) as asked:
        kernel.make("q0", "tap")
        ip("link", "set", "q0", "master", "br0", "up")
        netdev = "tap,ifname=q0,script=no,downscript=no"
        # Its screen on a serial line.
        screen = ["-machine", "graphics=off", "-serial", "stdio"]
        with booting(netdev, "02:00:00:00:00:97", *screen) as machine:
            machine.expect("booted from http://10.85.0.2/boot.ipxe as 10.85.0.10", 40)
        assert asked == ["/boot.ipxe"]
        assert dhcp.counters(server)["ack_sent"] == 1


# --- Failures ------------------------------------------------------------------------------------


GOOD = {"--bridge": "br0", "--address": "10.85.0.1/24", "--range": "10.85.0.10-10.85.0.20"}


@pytest.mark.parametrize(
    ("option", "value", "status", "said"),
    [
        ("--bridge", "nothing0", 1, "nothing0"),
        ("--name", "lo", 1, "lo"),
        ("--name", "a/b", 1, "a/b"),
        ("--address", "10.85.0.256/24", 2, "10.85.0.256"),
        ("--address", "fd85::1/64", 2, "fd85::1/64"),
        ("--range", "10.85.0.10", 2, "--range"),
        ("--range", "10.85.0.20-10.85.0.10", 2, "--range"),
        ("--range", "10.86.0.10-10.86.0.20", 2, "not in 10.85.0.0/24"),
        ("--range", "10.85.0.10-10.85.0.255", 2, "broadcast"),
        ("--lease", "0", 2, "--lease"),
        ("--lease", "nan", 2, "--lease"),
        ("--probe", "11", 2, "--probe"),
        ("--mac", "03:00:00:00:00:01", 2, "--mac"),
        ("--boot-file", "x" * 128, 2, "--boot-file"),
        ("--leases", "/nothing/leases.db", 1, "unable to open"),
        ("--leases", __file__, 1, "not a database"),
    ],
)
def test_invalid_options_are_refused_with_a_reason(
    option: str, value: str, status: int, said: str
) -> None:
    words = [word for pair in {**GOOD, option: value}.items() for word in pair]
    done = subprocess.run(
        example("dhcp_server.py", *words), capture_output=True, text=True, timeout=20
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert kernel.names() == ["br0"]


def test_a_second_server_on_the_same_file_is_refused(tmp_path: Path) -> None:
    file = ["--leases", str(tmp_path / "leases.db")]
    words = [word for pair in GOOD.items() for word in pair]
    with dhcp.serving(*file) as server:
        second = example("dhcp_server.py", *words, *file)
        done = subprocess.run(second, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert "locked" in done.stderr
        server.end()


def test_a_tap_that_is_deleted_is_one_line() -> None:
    with dhcp.serving() as server:
        ip("link", "del", "dev", "dhcp0")
        assert "dhcp0" in server.wait(1)[-1]
