"""`aiotun run`: a command whose whole network goes through the program."""

import asyncio
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..commandline import COMMAND, in_terminal
from ..helpers import need, ordinary_python
from .internet import (
    CONNECT,
    HOST4,
    HOST6,
    NET4,
    NET6,
    NameServer,
    echo_server,
    internet_fixture,  # noqa: F401 - tests have it as `internet`
    python,
    run,
    with_resolv_conf,
)
from .test_wireguard import until


class Udp(asyncio.DatagramProtocol):
    """Answers with what it got, and the address that it came from."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(data + b" from %d" % addr[1], addr)


@contextlib.asynccontextmanager
async def udp_server(there: aiotun.Namespace, host: str, port: int) -> AsyncIterator[None]:
    transport, _ = await there.create_datagram_endpoint(Udp, local_addr=(host, port))
    try:
        yield
    finally:
        transport.close()


FAIL = """
import socket
try:
    socket.create_connection(({host!r}, {port}), 10)
except OSError as error:
    print(error.errno)
"""

# --- TCP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [NET4, NET6])
async def test_a_connection_reaches_the_hosts_network(
    internet: aiotun.Namespace, host: str
) -> None:
    async with echo_server(internet, host):
        ended = await python(CONNECT.format(host=host, port=80))
    assert (ended.status, ended.out, ended.err) == (0, "hello\n", "")


async def test_an_ordinary_user_needs_no_root(internet: aiotun.Namespace) -> None:
    command, env = ordinary_python()
    code = CONNECT.format(host=NET4, port=80)
    async with echo_server(internet, NET4):
        ended = await run(
            "--", command[-1], "-c", code, command=[*command, "-m", "aiotun"], env=env
        )
    assert (ended.status, ended.out, ended.err) == (0, "hello\n", "")


@pytest.mark.parametrize(
    ("host", "port", "code"),
    [
        (NET4, 81, errno.ECONNREFUSED),
        (NET6, 81, errno.ECONNREFUSED),
        ("203.0.113.99", 80, errno.EHOSTUNREACH),
    ],
)
async def test_a_refusal_outside_is_the_same_refusal_inside(
    internet: aiotun.Namespace, host: str, port: int, code: int
) -> None:
    ended = await python(FAIL.format(host=host, port=port))
    assert (ended.status, ended.out) == (0, f"{code}\n")


async def test_what_the_host_has_no_route_to_is_unreachable() -> None:
    ended = await python(FAIL.format(host="192.0.2.1", port=80))
    assert int(ended.out) in (errno.ENETUNREACH, errno.EHOSTUNREACH)


async def test_a_large_stream_comes_through_whole(internet: aiotun.Namespace) -> None:
    code = """
import hashlib, os, socket, threading
data = os.urandom(1 << 20) * 16
with socket.create_connection(('203.0.113.2', 80), 10) as s:
    def send():
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
    back = hashlib.sha256()
    while more := s.recv(1 << 16):
        back.update(more)
print(back.digest() == hashlib.sha256(data).digest())
"""
    async with echo_server(internet, NET4):
        ended = await python(code)
    assert (ended.out, ended.err) == ("True\n", "")


# --- What can't be reached -----------------------------------------------------------------------


@pytest.mark.parametrize(("host", "code"), [(HOST4, errno.EHOSTUNREACH), (HOST6, errno.EACCES)])
async def test_the_hosts_own_addresses_are_out_of_reach(
    internet: aiotun.Namespace, host: str, code: int
) -> None:
    """Administratively prohibited, which Linux calls differently for IPv4 and IPv6."""
    async with await asyncio.start_server(lambda r, w: w.close(), host, 80):
        ended = await python(FAIL.format(host=host, port=80))
    assert ended.out == f"{code}\n"


async def test_the_hosts_loopback_can_be_reached_when_asked_for(
    internet: aiotun.Namespace,
) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 80):
        inside = await python(FAIL.format(host="127.0.0.1", port=80))
        asked = await python(
            CONNECT.format(host="10.99.99.99", port=80), "--host-loopback", "10.99.99.99"
        )
    assert inside.out == f"{errno.ECONNREFUSED}\n"  # the command's own 127.0.0.1
    assert asked.out == "hello\n"


async def test_denied_and_allowed(internet: aiotun.Namespace) -> None:
    fail, connect = FAIL.format(host=NET4, port=80), CONNECT.format(host=NET4, port=80)
    async with echo_server(internet, NET4):
        denied = await python(fail, "--log", "--deny", f"{NET4}:80")
        others = await python(connect, "--deny", f"{NET4}:81")
        allowed = await python(connect, "--allow", "203.0.113.0/24")
        not_allowed = await python(fail, "--allow", "192.0.2.0/24")
    assert denied.out == not_allowed.out == f"{errno.EHOSTUNREACH}\n"
    assert denied.err == f"aiotun: tcp {NET4}:80 denied\n"
    assert others.out == allowed.out == "hello\n"


# --- UDP and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [(NET4, NET4), (NET6, NET6)])
async def test_all_hosts_see_a_client_at_one_port(
    internet: aiotun.Namespace, hosts: tuple[str, str]
) -> None:
    code = f"""
import socket
s = socket.socket(socket.{"AF_INET6" if ":" in hosts[0] else "AF_INET"}, socket.SOCK_DGRAM)
s.settimeout(10)
for port in (3478, 3479):
    s.sendto(b'where', ({hosts[0]!r}, port))
    data, source = s.recvfrom(1000)
    print(source[0], source[1], data.decode().split()[-1])
"""
    async with udp_server(internet, hosts[0], 3478), udp_server(internet, hosts[1], 3479):
        ended = await python(code)
    (first, second) = (line.split() for line in ended.out.splitlines())
    assert (first[:2], second[:2]) == ([hosts[0], "3478"], [hosts[1], "3479"])
    assert first[2] == second[2]


@pytest.mark.parametrize("host", [NET4, NET6])
async def test_datagrams_larger_than_the_path_outside(
    internet: aiotun.Namespace, host: str
) -> None:
    """The device inside has a larger MTU than the cable outside, where they are fragments."""
    code = f"""
import socket
s = socket.socket(socket.{"AF_INET6" if ":" in host else "AF_INET"}, socket.SOCK_DGRAM)
s.settimeout(10)
for size in (1472, 1473, 9000, 60000, 65000):
    s.sendto(bytes(size), ({host!r}, 7))
    print(len(s.recv(65535)) - size > 0)
"""
    async with udp_server(internet, host, 7):
        ended = await python(code)
    assert (ended.out, ended.err) == ("True\n" * 5, "")


async def test_names_are_asked_of_the_hosts_name_servers(
    internet: aiotun.Namespace, tmp_path: Path
) -> None:
    transport, server = await internet.create_datagram_endpoint(NameServer, local_addr=(NET4, 53))
    outer = with_resolv_conf(tmp_path / "resolv.conf", f"nameserver {NET4}\nsearch lan.example\n")
    code = (
        "import socket; print(socket.gethostbyname('www.example.org'));"
        "print(open('/etc/resolv.conf').read())"
    )
    ended = await run("--", sys.executable, "-c", code, command=[*outer, *COMMAND])
    transport.close()
    assert ended.out == f"{NET4}\nnameserver 198.18.0.53\nsearch lan.example\n\n"
    assert set(server.asked) == {"www.example.org"}


async def test_long_answers_come_over_tcp(internet: aiotun.Namespace, tmp_path: Path) -> None:
    outer = with_resolv_conf(tmp_path / "resolv.conf", f"nameserver {NET4}\n")
    code = CONNECT.format(host="198.18.0.53", port=53)
    async with echo_server(internet, NET4, 53):
        ended = await run("--", sys.executable, "-c", code, command=[*outer, *COMMAND])
    assert ended.out == "hello\n"


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -15 $$"], 143),
        (["/no/such/program"], 127),
        (["/"], 126),
    ],
)
async def test_the_exit_status_is_the_commands(command: list[str], status: int) -> None:
    ended = await run("--", *command)
    assert ended.status == status


async def test_the_command_has_its_own_descriptor_limit() -> None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ended = await run("--", "sh", "-c", "ulimit -Sn")
    assert ended.out == f"{soft}\n"


async def test_it_has_nothing_but_its_own_interfaces() -> None:
    code = "import socket; print(*(name for _, name in socket.if_nameindex()))"
    ended = await python(code)
    assert ended.out == "lo tun0\n"


def test_it_imports_only_what_it_needs() -> None:
    """The start's time is mostly that of imports."""
    code = "import aiotun.cli, sys; aiotun.cli.main(['run', 'true']); print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    ours = {each for each in loaded if each.startswith("aiotun._cli.")}
    others = {"demo", "describe", "doctor", "dump", "listen", "networkd", "probe", "tuntap"}
    assert "aiotun._cli.run" in ours
    assert ours & {f"aiotun._cli.{each}" for each in others} == set()
    assert loaded & {"aiotun.testing", "aiotun.decode"} == set()


def test_as_a_program_it_loads_only_a_part_of_pyroute2() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "aiotun", "run", "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "pyroute2.netlink.rtnl" in done.stderr
    assert "pyroute2.ndb" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_signals_are_passed_on(number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 3' {int(number)}; echo ready; while :; do sleep 0.1; done"
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "run", "--", "sh", "-c", script, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, _ = await process.communicate()
    assert (process.returncode, out) == (3, b"got\n")


def test_killed_it_leaves_nothing() -> None:
    words = [*COMMAND, "run", "--", "sh", "-c", "echo ready; exec cat"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        children = children_of(process.pid)
        assert children
        process.kill()
        process.stdin.close()  # the command itself goes on until it has no more input
        until(lambda: not any(is_alive(pid) for pid in children), 5)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def test_the_terminal_is_the_commands() -> None:
    """Ctrl-C reaches the command, which may go on; Ctrl-Z stops both, and both continue."""
    inner = "sh -c 'echo ready; exec sleep 60'"
    script = f"trap 'echo interrupted' INT; {inner}; echo on; read line; echo end"
    with in_terminal("run", "--", "sh", "-c", script) as running:
        running.read_until("ready")
        os.write(running.out_fd, b"\x03")
        running.read_until("interrupted")
        running.read_until("on")
        os.write(running.out_fd, b"line\n")
        running.read_until("end")
        assert running.end() == 0


# --- Faults and recording ------------------------------------------------------------------------


async def test_delay_is_added_in_each_direction(internet: aiotun.Namespace) -> None:
    code = f"""
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
times = []
for _ in range(5):
    began = time.monotonic()
    s.sendto(b'x', ({NET4!r}, 7))
    s.recv(100)
    times.append(time.monotonic() - began)
print(min(times))
"""
    async with udp_server(internet, NET4, 7):
        ended = await python(code, "--delay", "50")
    assert 0.1 <= float(ended.out) < 0.2


async def test_drop_loses_packets_in_each_direction(internet: aiotun.Namespace) -> None:
    """With 5 % each way, 9.75 % of the requests have no answer."""
    code = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
came = 0
for number in range(4000):
    s.sendto(b'x', ({NET4!r}, 7))
    s.settimeout(0)
    try:
        while s.recv(100):
            came += 1
    except BlockingIOError:
        pass
    if number % 20 == 0:
        s.settimeout(0.02)
        try:
            while s.recv(100):
                came += 1
        except TimeoutError:
            pass
s.settimeout(1)
try:
    while s.recv(100):
        came += 1
except TimeoutError:
    print(came)
"""
    async with udp_server(internet, NET4, 7):
        ended = await python(code, "--drop", "5", "--seed", "1")
    assert abs(int(ended.out) / 4000 - 0.9025) < 0.015


async def test_what_is_recorded_can_be_read_by_tshark(
    internet: aiotun.Namespace, tmp_path: Path
) -> None:
    path = tmp_path / "run.pcapng"
    async with echo_server(internet, NET4):
        await python(CONNECT.format(host=NET4, port=80), "--write", str(path))
    words = ("-r", str(path), "-Y", "tcp.flags.syn==1", "-T", "fields", "-e", "ip.dst")
    shark = await asyncio.create_subprocess_exec(need("tshark"), *words, stdout=subprocess.PIPE)
    out, _ = await shark.communicate()
    assert out.split() == [NET4.encode(), b"198.18.0.1"]


async def test_the_log_has_a_line_for_each_connection(internet: aiotun.Namespace) -> None:
    code = f"""
import socket
with socket.create_connection(({NET4!r}, 80), 10) as s:
    s.sendall(b'GET / HTTP/1.1\\r\\nHost: www.example.org\\r\\n\\r\\n')
    s.shutdown(socket.SHUT_WR)
    s.makefile().read()
"""
    async with echo_server(internet, NET4):
        ended = await python(code, "--log")
    line = r"aiotun: tcp 203\.0\.113\.2:80 www\.example\.org 41 bytes up, 41 down, \d+\.\d\d s\n"
    assert re.fullmatch(line, ended.err), ended.err
