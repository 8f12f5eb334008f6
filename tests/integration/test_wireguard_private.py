"""The WireGuard example without root: a tunnel for one command, and a proxy into a tunnel."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..helpers import need, ordinary_python
from .test_examples import EXAMPLES
from .test_run_jobs import PROMPT, READER, continue_and_end, shell, type_in
from .test_wireguard import INNER, KINDS, Side, endpoint, joined, start, until

SIZE = 100_000_000
INSIDE = INNER[4][1]
INSIDE6 = INNER[6][1]

# What is behind the tunnel: HTTP on port 80, an echo of datagrams on port 7, and names on port 53.
# Prints each name that is asked for.
SERVER = f"""
import hashlib, http.server, socket, struct, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str({SIZE}))
        self.end_headers()
        block = bytes(range(256)) * 400
        for _ in range({SIZE} // len(block) + 1):
            left = {SIZE} - _ * len(block)
            self.wfile.write(block[:left])
    def do_PUT(self):
        left, digest = int(self.headers["Content-Length"]), hashlib.sha256()
        while left:
            data = self.rfile.read(min(left, 1 << 20))
            digest.update(data)
            left -= len(data)
        text = digest.hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *words):
        pass

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

def echo():
    sock = socket.create_server(("::", 7), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        one, _ = sock.accept()
        one.close()

def udp(port, answer):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("::", port))
    while True:
        data, source = sock.recvfrom(65535)
        sock.sendto(answer(data), source)

def names(data):
    labels, at = [], 12
    while data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]].decode())
        at += 1 + data[at]
    kind = data[at + 1 : at + 3]
    print(".".join(labels), flush=True)
    head = data[:2] + bytes([0x81, 0x80, 0, 1, 0, kind == b"\\0\\1", 0, 0, 0, 0])
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\1\\0\\4" + socket.inet_aton("{INSIDE}")
    return head + data[12 : at + 5] + (record if kind == b"\\0\\1" else b"")

for port, answer in ((7, bytes), (53, names)):
    threading.Thread(target=udp, args=(port, answer), daemon=True).start()
server = Server(("::", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def tunnelled(kind: str, folder: Path) -> Iterator[tuple[Side, "subprocess.Popen[str]", Path]]:
    """The near side (not started), a server behind the other, and a configuration for everything.

    Whoever may not read the folder of the test reads the configuration all the same.
    """
    with joined(folder) as (a, b):
        start(kind, b, a, None)
        path = a.config(b, endpoint(b))
        text = path.read_text().replace("DNS = 192.0.2.53", f"DNS = {INSIDE}, lan.example")
        lines = [line for line in text.splitlines() if not line.startswith("AllowedIPs")]
        path.write_text("\n".join([*lines, "AllowedIPs = 0.0.0.0/0, ::/0"]) + "\n")
        command = [*b.prefix(), sys.executable, "-c", textwrap.dedent(SERVER)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "ready\n"
                yield a, server, path
            finally:
                server.kill()


def ours(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / "wireguard"), str(path), *words]


def curl(*words: str) -> list[str]:
    return [need("curl"), "-sS", "--max-time", "50", *words]


def digest_of_download(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, timeout=55)
    assert done.returncode == 0, done.stderr
    return len(done.stdout), hashlib.sha256(done.stdout).hexdigest()


EXPECTED = (
    SIZE,
    hashlib.sha256((bytes(range(256)) * 400 * (SIZE // 102_400 + 1))[:SIZE]).hexdigest(),
)


def asked_names(server: "subprocess.Popen[str]") -> set[str]:
    server.kill()
    assert server.stdout is not None
    return set(server.stdout.read().split())


# --- One command ---------------------------------------------------------------------------------


@KINDS
def test_a_command_in_the_tunnel_downloads_100_mb(kind: str, tmp_path: Path) -> None:
    with tunnelled(kind, tmp_path) as (_, server, path):
        command = ours(path, "--", *curl("http://files.example.org/"))
        assert digest_of_download(command) == EXPECTED
        assert asked_names(server) == {"files.example.org"}


def test_a_command_in_the_tunnel_uploads_100_mb(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 100
    (tmp_path / "data").write_bytes(data)
    with tunnelled("ours", tmp_path) as (_, _, path):
        words = ("-T", str(tmp_path / "data"), f"http://[{INSIDE6}]/data")
        done = subprocess.run(ours(path, "--", *curl(*words)), capture_output=True, text=True)
    assert done.stdout == hashlib.sha256(data).hexdigest(), done.stderr


def test_a_command_of_an_ordinary_user(tmp_path: Path) -> None:
    python, env = ordinary_python()
    with tunnelled("ours", tmp_path) as (_, _, path):
        # An ordinary user can read neither the folder of the test nor, perhaps, this checkout.
        config = Path("/run/aiotun-user/wg.conf")
        config.write_text(path.read_text())
        config.chmod(0o644)
        words = ["--", need("ping"), "-c", "3", "-i", "0.2", INSIDE]
        command = [*python, str(EXAMPLES / "wireguard"), str(config), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "3 received" in done.stdout, done.stderr


def test_nothing_but_the_command_is_touched(tmp_path: Path) -> None:
    def shown() -> str:
        words = ["ip", "-o", "addr"], ["ip", "route", "show", "table", "all"]
        return "".join(
            subprocess.run(each, capture_output=True, text=True).stdout for each in words
        )

    with tunnelled("ours", tmp_path) as (_, _, path):
        before = shown()
        command = ours(path, "--", "sh", "-c", "echo ready; read line; exit 5")
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert shown() == before
            process.communicate("\n")
        assert process.returncode == 5


def test_ctrl_z_stops_it_and_fg_continues_it(tmp_path: Path) -> None:
    with tunnelled("ours", tmp_path) as (_, _, path), shell() as running:
        words = " ".join(ours(path, "--"))
        type_in(running, f"{words} {READER}\n")
        running.read_until("ready")
        type_in(running, "\x1a")  # Ctrl-Z
        running.read_until("Stopped")
        running.read_until(PROMPT)
        continue_and_end(running, "wireguard")


# --- The network outside changes -----------------------------------------------------------------


QUICK = ("--reject-after", "2", "--rekey-timeout", "0.3", "--rekey-attempt", "60")
ASKED = f"echo ready; while read line; do ping -q -c 1 -w 15 {INSIDE} >&2; echo status $?; done"


@contextlib.contextmanager
def asking(how: str, path: Path) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], None]]]:
    """Our process, and a function that gets an answer from inside the tunnel."""
    if how == "proxy":
        with proxied(path, *QUICK) as (address, process):
            through = ("-x", f"socks5h://{address}", "-T", "-", f"http://{INSIDE}/data")

            def send() -> None:
                done = subprocess.run(curl("-H", "Content-Length: 1", *through), input=b"x")
                assert done.returncode == 0

            yield process, send
        return
    command = ours(path, *QUICK, "--", "sh", "-c", ASKED)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        stdin, stdout = process.stdin, process.stdout

        def ping() -> None:
            stdin.write("\n")
            stdin.flush()
            assert stdout.readline() == "status 0\n"

        try:
            yield process, ping
            process.communicate()
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["proxy", "command"])
def test_the_link_goes_down_and_the_address_is_another(how: str, tmp_path: Path) -> None:
    with tunnelled("ours", tmp_path) as (a, _, path), asking(how, path) as (_, ask):
        ask()
        for number, words in enumerate(("link set va down", "addr flush dev va scope global")):
            a.run("ip", *words.split())
            moved = f"192.0.2.{77 + number}/24"
            a.run("ip", "link", "set", "va", "up")
            a.run("ip", "addr", "flush", "dev", "va", "scope", "global")
            a.run("ip", "addr", "add", moved, "dev", "va")
            ask()


def stop_for(seconds: float, process: "subprocess.Popen[str]") -> None:
    over = time.monotonic() + seconds
    process.send_signal(signal.SIGSTOP)
    until(lambda: time.monotonic() > over)
    process.send_signal(signal.SIGCONT)


@KINDS
@pytest.mark.parametrize("how", ["proxy", "command"])
def test_a_process_that_was_stopped_for_longer_than_a_session_lives(
    how: str, kind: str, tmp_path: Path
) -> None:
    """As on a machine that was suspended: our timers are late, and the session is too old."""
    with tunnelled(kind, tmp_path) as (_, _, path), asking(how, path) as (process, ask):
        for _ in range(2):
            ask()
            stop_for(2.5, process)
        ask()


# --- The proxy -----------------------------------------------------------------------------------


@contextlib.contextmanager
def proxied(path: Path, *words: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = ours(path, *words, "--proxy", "127.0.0.1:0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("ready ").strip(), process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)
    assert process.returncode == 0


@KINDS
@pytest.mark.parametrize("scheme", ["socks5h", "http"])
def test_100_mb_both_ways_through_the_proxy(kind: str, scheme: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 100
    (tmp_path / "data").write_bytes(data)
    with tunnelled(kind, tmp_path) as (_, server, path), proxied(path) as (address, _):
        through = ["-p", "-x", f"{scheme}://{address}"]
        assert digest_of_download(curl(*through, "http://files.example.org/")) == EXPECTED
        words = (*through, "-T", str(tmp_path / "data"), f"http://[{INSIDE6}]/data")
        done = subprocess.run(curl(*words), capture_output=True, text=True)
        assert done.stdout == hashlib.sha256(data).hexdigest(), done.stderr
        assert asked_names(server) == {"files.example.org"}


@pytest.mark.parametrize("target", [f"{INSIDE}:81", f"[{INSIDE6}]:81"])
def test_the_proxy_says_that_a_connection_was_refused(target: str, tmp_path: Path) -> None:
    with tunnelled("ours", tmp_path) as (_, _, path), proxied(path) as (address, _):
        words = ("-x", f"socks5h://{address}", f"http://{target}/")
        done = subprocess.run(curl(*words), capture_output=True, text=True)
    assert "(5)" in done.stderr  # RFC 1928, section 6


def test_datagrams_through_the_proxy(tmp_path: Path) -> None:
    with tunnelled("ours", tmp_path) as (_, _, path), proxied(path) as (address, _):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as control:
            control.sendall(b"\5\1\0")
            assert control.recv(2) == b"\5\0"
            control.sendall(b"\5\3\0\1" + bytes(6))
            reply = control.recv(10)
            assert reply[:4] == b"\5\0\0\1"
            relay = (socket.inet_ntoa(reply[4:8]), struct.unpack("!H", reply[8:])[0])
            assert relay[0] == "127.0.0.1"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(10)
                for packed in (
                    b"\1" + socket.inet_aton(INSIDE),
                    b"\4" + socket.inet_pton(socket.AF_INET6, INSIDE6),
                    b"\3\x11files.example.org",
                ):
                    sock.sendto(bytes(3) + packed + b"\0\7" + b"hello", relay)
                    data, source = sock.recvfrom(1000)
                    assert source == relay
                    assert data[3] in (1, 4)
                    assert data.endswith(b"\0\7hello")
                # A fragment is dropped, and so is what is no request.
                sock.sendto(bytes(2) + b"\1\1" + socket.inet_aton(INSIDE) + b"\0\7no", relay)
                sock.sendto(b"", relay)
                sock.sendto(bytes(3) + b"\1" + socket.inet_aton(INSIDE) + b"\0\7" + b"yes", relay)
                assert sock.recv(1000).endswith(b"yes")
        # The association ends with its connection.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.1)
            sock.connect(relay)
            for _ in range(100):
                try:
                    sock.send(b"x")
                    sock.recv(100)
                except TimeoutError:
                    continue
                except ConnectionRefusedError:
                    break
            else:
                pytest.fail("the port is still there")


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"GET http://example.org/ HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"CONNECT nonsense HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"\5\1\2", b"\5\xff"),
        (b"\5\1\0\5\2\0\1" + bytes(6), b"\5\0\5\7\0"),
        (b"\5\1\0\5\1\0\7" + bytes(6), b"\5\0\5\x08\0"),
    ],
)
async def test_what_a_client_may_not_say(data: bytes, answer: bytes, tmp_path: Path) -> None:
    from _proxy import Proxy

    import aiotun

    async def resolve(name: str) -> list[str]:
        raise OSError(name)

    async with (
        aiotun.new_namespace() as ns,
        await Proxy(ns, resolve).serve("127.0.0.1", 0) as server,
    ):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(data)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(answer)
        writer.close()
