"""The examples, run as their users run them: as programs, on both loops."""

import asyncio
import contextlib
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator

import pytest

from ..helpers import ROOT, ip, wait_until

EXAMPLES = ROOT / "examples"
NETWORKS = ["--address", "10.0.0.1/24", "--address", "10.7.0.1/16", "--address", "fd00::1/64"]

each_example = pytest.mark.parametrize("name", ["ping_responder.py", "udp_echo.py"])
each_loop = pytest.mark.parametrize("uvloop", [False, True], ids=["on asyncio", "on uvloop"])
# The test's own loop does not matter to the program that it watches.
pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


@contextlib.asynccontextmanager
async def example(
    name: str, *args: str, uvloop: bool = False, stop: int = signal.SIGTERM
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start one, wait until it serves, and see it end well."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--name", "ex0", *args]
    if uvloop:
        command.append("--uvloop")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"ready ex0\n"
        yield process
        process.send_signal(stop)
        out, err = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, out, err) == (0, b"", b"")
        assert "ex0" not in [name for _, name in socket.if_nameindex()]
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ping(address: str, payload: bytes = bytes(56)) -> bool:
    """One echo request by a raw socket; whether its answer comes within half a second."""
    six = ":" in address
    loop = asyncio.get_running_loop()
    family, protocol = (socket.AF_INET6, 58) if six else (socket.AF_INET, 1)
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        sock.setblocking(False)
        message = struct.pack("!BBHHH", 128 if six else 8, 0, 0, 77, 1) + payload
        if not six:
            total = sum(
                struct.unpack(f"!{(len(message) + 1) // 2}H", message + b"\0" * (len(message) % 2))
            )
            while total > 0xFFFF:
                total = (total & 0xFFFF) + (total >> 16)
            message = message[:2] + struct.pack("!H", total ^ 0xFFFF) + message[4:]
        await loop.sock_sendto(sock, message, (address, 0))
        answer = b"\x81\0" if six else b"\0\0"
        try:
            async with asyncio.timeout(0.5):
                while True:
                    data, sender = await loop.sock_recvfrom(sock, 65536)
                    data = data if six else data[20:]
                    if data[:2] == answer and sender[0] == address:
                        assert data[4:] == message[4:]
                        return True
        except TimeoutError:
            return False


@each_example
@each_loop
async def test_pings(name: str, uvloop: bool) -> None:
    async with example(name, *NETWORKS, uvloop=uvloop):
        for address in ("10.0.0.2", "10.0.0.254", "10.7.9.9", "fd00::2", "fd00::ffff:1"):
            assert await ping(address)
        for size in (0, 1, 57, 1400):
            assert await ping("10.0.0.3", bytes([7] * size))
            assert await ping("fd00::3", bytes([7] * size))
        assert not await ping("10.0.0.3", bytes(3000))  # in fragments, which are no packet yet
        ip("route", "add", "10.99.0.0/24", "dev", "ex0")
        assert not await ping("10.99.0.1")  # of none of its networks
        assert await ping("10.0.0.4")


@each_example
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@each_loop
async def test_signals(name: str, number: int, uvloop: bool) -> None:
    async with example(name, *NETWORKS, uvloop=uvloop, stop=number):
        pass


@each_example
async def test_down_and_up(name: str) -> None:
    async with example(name, "--address", "10.0.0.1/24"):
        assert await ping("10.0.0.2")
        ip("link", "set", "ex0", "down")
        ip("link", "set", "ex0", "up")
        assert await ping("10.0.0.2")


async def echo(sock: socket.socket, data: bytes, address: tuple[str, int]) -> bytes | None:
    """Send a datagram; give what comes back within half a second."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendto(sock, data, address)
    try:
        async with asyncio.timeout(0.5):
            answer, sender = await loop.sock_recvfrom(sock, 65536)
    except TimeoutError:
        return None
    assert sender[:2] == address
    return answer


@each_loop
@pytest.mark.parametrize("address", ["10.0.0.9", "10.7.200.1", "fd00::9"])
async def test_udp_echo(address: str, uvloop: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    async with example("udp_echo.py", *NETWORKS, "--port", "4007", uvloop=uvloop):
        for _ in range(20):
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                for data in (b"", b"x", b"odd", bytes(range(256)), b"." * 1400):
                    assert await echo(sock, data, (address, 4007)) == data
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            assert await echo(sock, b"other port", (address, 4008)) is None
            assert await echo(sock, bytes(4000), (address, 4007)) is None  # in fragments
            assert await echo(sock, b"still there", (address, 4007)) == b"still there"


async def run(name: str, *args: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / name), *args,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert out == b""
    return process.returncode, err.decode()


@each_example
async def test_what_goes_wrong_is_one_line(name: str) -> None:
    for args, said in (
        (["--name", "lo"], "not a TUN device"),
        (["--name", "much-too-long-name"], "1 to 15"),
    ):
        status, err = await run(name, *args)
        assert (status, err.count("\n")) == (1, 1)
        assert said in err
    async with example(name):
        status, err = await run(name, "--name", "ex0")
        assert status == 1
        assert "another program holds the only queue of ex0" in err


@each_example
async def test_wrong_arguments(name: str) -> None:
    for args in (["--address", "10.0.0.1/33"], ["--nonsense"]):
        assert (await run(name, *args))[0] == 2
    for port in ("0", "65536", "seven"):
        assert (await run("udp_echo.py", "--port", port))[0] == 2


async def test_help_says_what_it_is() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "ping_responder.py"), "--help", stdout=-1
    )
    out, _ = await process.communicate()
    assert b"Answers pings" in out
    await wait_until(lambda: process.returncode == 0)
