"""The examples that make connections of packets: `intercept.py` and `tun2socks.py`."""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..helpers import need
from .internet import HOST4, NET4
from .kernel import another_namespace
from .test_examples import EXAMPLES

SERVER = """
import http.server, hashlib
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(bytes(range(256)) * 40960)
    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(hashlib.sha256(data).hexdigest().encode())
    def log_message(self, *words):
        pass
server = http.server.ThreadingHTTPServer(("0.0.0.0", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""
BODY = bytes(range(256)) * 40960


@contextlib.contextmanager
def internet() -> Iterator[list[str]]:
    """Another namespace behind the default route, with a web server.

    Yields what goes before a command that is to run there.
    """
    ip = need("ip")
    with another_namespace("ip link set lo up") as there:
        for words in (
            f"link add wan0 type veth peer name lan0 netns {there}",
            f"addr add {HOST4}/24 dev wan0",
            "link set wan0 up",
            f"route add default via {NET4}",
        ):
            subprocess.run([ip, *words.split()], check=True)
        inside = [need("nsenter"), f"--net={there}"]
        for words in (f"addr add {NET4}/24 dev lan0", "link set lan0 up"):
            subprocess.run([*inside, ip, *words.split()], check=True)
        with subprocess.Popen(
            [*inside, sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            try:
                yield inside
            finally:
                server.kill()


def test_intercept_shows_and_carries_every_connection() -> None:
    with internet():
        words = [need("curl"), "-sS", "--max-time", "30", f"http://{NET4}/"]
        done = subprocess.run(
            [sys.executable, "-W", "error", str(EXAMPLES / "intercept.py"), *words],
            capture_output=True,
            timeout=50,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == BODY
    assert done.stderr.decode().startswith(f"{NET4} port 80: ")


@contextlib.contextmanager
def tun2socks(proxy: str) -> Iterator[None]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "tun2socks.py")]
    options = ["--proxy", proxy, "--name", "socks0", "--address", "198.18.0.1/24"]
    with subprocess.Popen(
        [*command, *options, "--route", "198.51.100.0/24"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready socks0\n"
            yield
        finally:
            process.terminate()
            process.wait(10)


# A SOCKS5 server of its own, with CONNECT only. It leads 198.51.100.1 to the server behind the
# default route, and says of other hosts what their last number is.
SOCKS = f"""
import asyncio, socket, struct

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()

async def client(reader, writer):
    _, count = await reader.readexactly(2)
    await reader.readexactly(count)
    writer.write(b"\\5\\0")
    _, command, _, kind = await reader.readexactly(4)
    host, port = await reader.readexactly(4), struct.unpack("!H", await reader.readexactly(2))[0]
    if command != 1 or host[-1] != 1:
        writer.write(b"\\5" + host[-1:] + b"\\0\\1" + bytes(6))
        writer.close()
        return
    far_reader, far_writer = await asyncio.open_connection("{NET4}", port)
    writer.write(b"\\5\\0\\0\\1" + bytes(6))
    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
    writer.close()

async def main():
    server = await asyncio.start_server(client, "127.0.0.1", 1080)
    print("ready", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture
def socks_server() -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", SOCKS], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.kill()


def test_connections_leave_through_the_proxy(socks_server: None, tmp_path: Path) -> None:
    data = os.urandom(10_000_000)
    (tmp_path / "data").write_bytes(data)
    curl = [need("curl"), "-sS", "--max-time", "30"]
    with internet(), tun2socks("socks5://127.0.0.1:1080"):
        down = subprocess.run([*curl, "http://198.51.100.1/"], capture_output=True)
        up = subprocess.run(
            [*curl, "-T", str(tmp_path / "data"), "http://198.51.100.1/"], capture_output=True
        )
    assert down.stdout == BODY, down.stderr
    assert up.stdout.decode() == hashlib.sha256(data).hexdigest(), up.stderr


@pytest.mark.parametrize(
    ("number", "said"),
    [(3, "Network is unreachable"), (4, "No route to host"), (5, "Connection refused")],
)
def test_what_the_proxy_refuses_is_refused(socks_server: None, number: int, said: str) -> None:
    code = f"import socket; socket.create_connection(('198.51.100.{number}', 80), 10)"
    with internet(), tun2socks("socks5://127.0.0.1:1080"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said in done.stderr


# --- Against a SOCKS server that others wrote ----------------------------------------------------

FAR = "198.51.100.1"  # the device's route leads there

DANTE = f"""
logoutput: stderr
internal: {NET4} port = 1080
external: {NET4}
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks block {{ from: 0.0.0.0/0 to: 0.0.0.0/0 port = 25 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
"""
UDP_ECHO = f"""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(({FAR!r}, 7))
print("ready", flush=True)
while True:
    data, client = sock.recvfrom(65535)
    sock.sendto(data, client)
"""


@contextlib.contextmanager
def dante(tmp_path: Path) -> Iterator[str]:
    """Dante in another namespace, where `FAR` is, with a web server and an echo server."""
    program = need("danted")
    (tmp_path / "danted.conf").write_text(DANTE)
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(internet())
        words = f"{need('ip')} addr add {FAR}/32 dev lan0"
        subprocess.run([*inside, *words.split()], check=True)
        echo = [*inside, sys.executable, "-c", UDP_ECHO]
        options = ["-f", str(tmp_path / "danted.conf"), "-p", str(tmp_path / "danted.pid")]
        for command in (echo, [*inside, program, *options]):
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            stack.enter_context(process)
            stack.callback(process.terminate)  # Dante's children end with it
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "ready" in line or "running" in line:
                    break
            else:
                raise AssertionError("".join(said))
        yield f"socks5://{NET4}:1080"


def test_connections_leave_through_dante(tmp_path: Path) -> None:
    data = os.urandom(10_000_000)
    (tmp_path / "data").write_bytes(data)
    curl = [need("curl"), "-sS", "--max-time", "30"]
    refused = f"import socket; socket.create_connection(({FAR!r}, 81), 10)"
    forbidden = f"import socket; socket.create_connection(({FAR!r}, 25), 10)"
    with dante(tmp_path) as proxy, tun2socks(proxy):
        down = subprocess.run([*curl, f"http://{FAR}/"], capture_output=True)
        up = subprocess.run(
            [*curl, "-T", str(tmp_path / "data"), f"http://{FAR}/"], capture_output=True
        )
        failed = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
            for code in (refused, forbidden)
        ]
    assert down.stdout == BODY, down.stderr
    assert up.stdout.decode() == hashlib.sha256(data).hexdigest(), up.stderr
    assert "Connection refused" in failed[0]
    assert "No route to host" in failed[1]  # Linux has no better error for "prohibited"


def test_datagrams_leave_through_dante(tmp_path: Path) -> None:
    code = f"""
import socket
for size in (1, 512, 1400):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.sendto(bytes(size), ({FAR!r}, 7))
    data, source = sock.recvfrom(65535)
    print(len(data), *source)
"""
    with dante(tmp_path) as proxy, tun2socks(proxy):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{size} {FAR} 7" for size in (1, 512, 1400)], done.stderr


@pytest.mark.parametrize(("command", "told"), [([], "Runs a command"), (["nosuch"], "nosuch")])
def test_intercept_says_what_is_wrong_in_a_line(command: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "intercept.py", *command], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_intercept_says_how_to_use_it(words: list[str]) -> None:
    program = EXAMPLES / "intercept.py"
    done = subprocess.run(
        [sys.executable, program, *words], capture_output=True, text=True, check=False
    )
    assert "python examples/intercept.py curl" in done.stderr
