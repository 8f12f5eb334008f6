"""lwIP, another TCP/IP stack: with its own TAP driver on a bridge, and with aiotun's devices."""

import contextlib
import http.client
import importlib.util
import os
import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..helpers import ip, need
from . import dhcp, kernel
from .programs import Program, example, running

pytestmark = pytest.mark.peers

VIRTUAL = "10.85.0.3"  # of examples/virtual_host.py
LEASED = "10.85.0.10"  # the first address of the DHCP server's range
HERE = Path(__file__).parent
HEADERS = Path("/usr/include/lwip")  # Debian's


@pytest.fixture(scope="module")
def lwip_host(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C program, compiled."""
    compiler = need("cc")
    if not (HEADERS / "netif/tapif.h").exists():
        pytest.skip("missing: lwIP; install liblwip-dev")
    made = tmp_path_factory.mktemp("lwip") / "lwip_host"
    source = str(HERE / "lwip_host.c")
    words = ["-Wall", "-Wextra", "-Werror", f"-I{HEADERS}", "-o", str(made), source, "-llwip"]
    done = subprocess.run([compiler, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(made)


@pytest.fixture
def lwip(lwip_host: str) -> Iterator[Program]:
    """An lwIP host on a TAP of the bridge br0, prepared as its documentation says."""
    dhcp.add_bridge()
    kernel.make("lwip0", "tap")
    ip("link", "set", "lwip0", "master", "br0", "up")
    env = {**os.environ, "PRECONFIGURED_TAPIF": "lwip0"}
    with running([lwip_host, str(dhcp.SERVER), VIRTUAL], env=env) as program:
        yield program


def test_a_lease_and_pings_both_ways(lwip: Program) -> None:
    """lwIP asks again and again until the server runs; then it and virtual_host.py ping each other.

    Until lwIP has its lease, virtual_host.py gets no answer.
    """
    words = ["--bridge", "br0", "--name", "virtual0", "--address", f"{VIRTUAL}/24"]
    words += ["--ping", LEASED, "--interval", "0.05"]
    with running(example("virtual_host.py", *words), "ready virtual0") as virtual:
        virtual.expect(f"nobody answers for {LEASED}")
        with dhcp.serving("--probe", "0.1") as server, dhcp.host() as place:
            lwip.expect(f"lease {LEASED}")
            lwip.expect(f"pong {dhcp.SERVER}")
            lwip.expect(f"pong {VIRTUAL}")
            for _ in range(3):
                virtual.expect(f"64 bytes from {LEASED}: icmp_seq=")
            kernel.inside(place, "ip", "addr", "add", "10.85.0.200/24", "dev", "eth0")
            kernel.inside(place, "ping", "-c", "3", "-i", "0.01", "-W", "5", LEASED)
            virtual.end()
            found = dhcp.counters(server)
    assert (found["ack_sent"], found.get("nak_sent", 0)) == (1, 0)
    assert found["ping"] >= 1


# --- examples/lwip_host --------------------------------------------------------------------------

HOST, KERNEL = "10.86.0.2", "10.86.0.1"
WORDS = ["--address", f"{HOST}/24", "--gateway", KERNEL]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which examples/lwip_host finds its module."""
    need("cc")
    if not (HEADERS / "netif/tapif.h").exists():
        pytest.skip("missing: lwIP; install liblwip-dev")
    if importlib.util.find_spec("cffi") is None:
        pytest.skip("missing: cffi; pip install 'aiotun[examples]'")
    folder = str(tmp_path_factory.mktemp("module"))
    done = subprocess.run(example("lwip_host/build.py", folder), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def host(built: dict[str, str]) -> Iterator[Program]:
    with running(example("lwip_host", *WORDS), "ready tap0", env=built) as program:
        yield program


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), 10)


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def get(path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, 80, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def ping(*more: str) -> None:
    words = [need("ping"), "-c", "5", "-i", "0.01", "-W", "5", *more, HOST]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_lwip_answers_pings_and_a_signal_ends_it(host: Program, number: signal.Signals) -> None:
    ping()
    ping("-s", "1472")
    ping("-s", "9000")  # lwIP reassembles fragments
    assert host.end(number) == ["ready tap0"]
    assert kernel.names() == []


def test_lwip_echoes_a_long_stream_and_many_connections(host: Program) -> None:
    """1.5 MB in each direction over one connection; then many connections at once."""
    data = random.Random(7).randbytes(1_500_000)
    with connect(7) as sock:
        writer = threading.Thread(target=send_all, args=[sock, data])
        writer.start()
        found = b"".join(iter(lambda: sock.recv(65536), b""))
        writer.join()
    assert found == data
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(7)) for _ in range(50)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%d" % number)
        for number, sock in enumerate(socks):
            assert sock.recv(100) == b"%d" % number
    assert host.end() == ["ready tap0"]


def test_a_reader_that_waits_slows_the_sender(host: Program) -> None:
    """No client reads the echo, so the echo stops reading: only TCP's windows fill up."""
    with connect(7) as sock:
        sock.settimeout(1)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(1000 * 65536))
        memory = Path(f"/proc/{host.process.pid}/status").read_text()
        (peak,) = [line.split()[1] for line in memory.splitlines() if line.startswith("VmHWM")]
        assert int(peak) < 150_000  # kB; a thousand times 64 KiB would be on top
        # Other connections still work.
        assert get("/") == (200, b"lwIP on aiotun\n")
    host.end()


def test_the_http_server_on_lwip_answers_requests(host: Program) -> None:
    assert get("/") == (200, b"lwIP on aiotun\n")
    assert get("/", "HEAD") == (200, b"")
    assert get("/nothing")[0] == 404
    assert get("/bytes/x")[0] == 404
    assert get("/", "POST")[0] == 405
    status, body = get("/bytes/3000000")
    assert (status, len(body)) == (200, 3_000_000)
    assert body[:512] == bytes(range(256)) * 2
    with connect(80) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400")
    with connect(80) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 9000)
        assert b"HTTP/1.1 400" in sock.recv(100)
    assert host.end() == ["ready tap0"]


def test_clients_that_go_away(host: Program) -> None:
    """Connections are reset while the server reads and while it writes."""
    for path in (b"GET /bytes/100000000 HTTP/1.1\r\n\r\n", b"GET / HT"):
        with connect(80) as sock:
            sock.sendall(path)
            if path.endswith(b"\n\r\n"):
                sock.recv(100_000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with connect(7):
        pass
    assert get("/")[0] == 200
    assert host.end() == ["ready tap0"]


def test_a_tap_that_root_prepared(built: dict[str, str]) -> None:
    """PRECONFIGURED_TAPIF names a TAP that is used unchanged, as in tapif.c."""
    kernel.make("ready0", "tap")
    ip("addr", "add", f"{KERNEL}/24", "dev", "ready0")
    ip("link", "set", "ready0", "up")
    before = kernel.state("ready0")
    env = {**built, "PRECONFIGURED_TAPIF": "ready0"}
    with running(example("lwip_host", *WORDS), "ready ready0", env=env) as program:
        ping()
        assert get("/")[0] == 200
        assert kernel.changes("ready0", before) == []
        program.end()
    assert kernel.changes("ready0", before) == []


def test_a_tap_that_is_deleted_is_one_line(host: Program) -> None:
    with connect(7):
        ip("link", "del", "dev", "tap0")
        assert "tap0" in host.wait(1)[-1]


def test_invalid_options_are_refused_with_a_reason(built: dict[str, str]) -> None:
    def fail(env: dict[str, str], *words: str) -> tuple[int, str]:
        done = subprocess.run(
            example("lwip_host", *words), capture_output=True, text=True, env=env, timeout=20
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    status, said = fail({**os.environ}, *WORDS)
    assert (status, "build.py" in said) == (1, True)
    status, said = fail(built, "--address", f"{HOST}/24", "--gateway", "10.87.0.1")
    assert (status, "must be another host" in said) == (2, True)
    status, said = fail({**built, "PRECONFIGURED_TAPIF": "lo"}, *WORDS)
    assert (status, "lo" in said) == (1, True)
