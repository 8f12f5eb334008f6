"""`aiotun.netstack.pipe`: bytes both ways between two connections."""

import asyncio
import contextlib
import hashlib
import random
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aiotun.netstack import PipeStats, pipe

from ..helpers import wait_until

LOCAL = "127.0.0.1"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

SMALL = 16 * 1024  # of the sockets' buffers where a test fills them


class Piped(NamedTuple):
    """The far ends of two connections, the near ends that are piped, and the pipe."""

    left: socket.socket
    right: socket.socket
    a: Streams
    b: Streams
    stats: PipeStats
    task: "asyncio.Task[None]"


async def connection(**options: Any) -> tuple[socket.socket, Streams]:
    """A TCP connection: the far end as a socket, the near end as streams."""
    with socket.create_server((LOCAL, 0)) as listener:
        if options:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        near = socket.socket()
        if options:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    far.setblocking(False)
    near.setblocking(False)
    return far, await asyncio.open_connection(sock=near)


@contextlib.asynccontextmanager
async def piped(**options: Any) -> AsyncIterator[Piped]:
    """Two connections and a pipe between them; with any option, their buffers are small."""
    left, a = await connection(**options)
    right, b = await connection(**options)
    stats = PipeStats()
    task = asyncio.create_task(pipe(a, b, stats=stats))
    with left, right:
        try:
            yield Piped(left, right, a, b, stats, task)
        finally:
            task.cancel()
            await asyncio.wait([task])
            for _, writer in (a, b):
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def recv_all(sock: socket.socket) -> bytes:
    loop, parts = asyncio.get_running_loop(), []
    while data := await loop.sock_recv(sock, 1 << 20):
        parts.append(data)
    return b"".join(parts)


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(10):
        return await awaitable


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def fill(sock: socket.socket) -> int:
    """Send until there is no room; return how many bytes went."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(65536))
    return sent


async def fill_all(p: Piped) -> int:
    """Send from the left until nothing moves any more: the right does not read."""
    sent, quiet = 0, 0
    while quiet < 20:
        more = fill(p.left)
        sent += more
        quiet = 0 if more else quiet + 1
        await asyncio.sleep(0.001)
    return sent


class TestBytes:
    async def test_both_ways_at_once_and_they_are_counted(self) -> None:
        there, back = random.Random(1).randbytes(3_000_000), random.Random(2).randbytes(2_000_000)
        loop = asyncio.get_running_loop()
        async with piped() as p:

            async def send(sock: socket.socket, data: bytes) -> None:
                await loop.sock_sendall(sock, data)
                sock.shutdown(socket.SHUT_WR)

            got = await within(
                asyncio.gather(
                    recv_all(p.right), recv_all(p.left), send(p.left, there), send(p.right, back)
                )
            )
            assert [hashlib.sha256(data).digest() for data in got[:2]] == [
                hashlib.sha256(data).digest() for data in (there, back)
            ]
            await within(p.task)
            assert p.stats == PipeStats(len(there), len(back))
            assert p.a[1].is_closing()
            assert p.b[1].is_closing()

    async def test_what_a_reader_holds_already_is_passed_on(self) -> None:
        left, a = await connection()
        right, b = await connection()
        with left, right:
            left.send(b"early")
            left.shutdown(socket.SHUT_WR)
            right.shutdown(socket.SHUT_WR)
            assert await within(a[0].readexactly(1)) == b"e"
            await within(pipe(a, b))
            assert await within(recv_all(right)) == b"arly"


class TestHalfClose:
    async def test_one_way_ends_and_the_other_goes_on(self) -> None:
        loop = asyncio.get_running_loop()
        async with piped() as p:
            p.left.send(b"question")
            p.left.shutdown(socket.SHUT_WR)
            assert await within(recv_all(p.right)) == b"question"
            for _ in range(3):
                p.right.send(b"answer")
                assert await within(loop.sock_recv(p.left, 100)) == b"answer"
            assert not p.task.done()
            p.right.close()
            assert await within(recv_all(p.left)) == b""
            await within(p.task)

    async def test_an_end_while_the_other_buffer_is_full_is_passed_on_when_it_drains(self) -> None:
        async with piped(small=True) as p:
            sent = await fill_all(p)
            p.left.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.02)
            assert not p.task.done()
            assert len(await within(recv_all(p.right))) == sent  # and then the end
            p.right.shutdown(socket.SHUT_WR)
            assert await within(recv_all(p.left)) == b""
            await within(p.task)
            assert p.stats == PipeStats(sent, 0)

    async def test_half_closed_and_stalled_connections_cost_no_processor_time(self) -> None:
        async with piped(small=True) as stalled, piped() as half, piped() as idle:
            await fill_all(stalled)
            half.left.shutdown(socket.SHUT_WR)
            assert await within(recv_all(half.right)) == b""
            before = time.process_time()
            await asyncio.sleep(0.3)  # nothing must happen, so there is nothing to wait for
            assert time.process_time() - before < 0.05
            assert not any(each.task.done() for each in (stalled, half, idle))

    async def test_tls_which_has_no_half_close_ends_whole(
        self, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
    ) -> None:
        """The plain side's end closes the TLS connection, after what was written."""
        accept, connect = certificate
        accepted: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda *streams: accepted.set_result(streams), LOCAL, 0, ssl=accept
        )
        port = server.sockets[0].getsockname()[1]
        far = await asyncio.open_connection(LOCAL, port, ssl=connect, server_hostname="localhost")
        near = await accepted
        left, a = await connection()
        with left:
            task = asyncio.create_task(pipe(a, near))
            left.send(b"secret")
            left.shutdown(socket.SHUT_WR)
            assert await within(far[0].read()) == b"secret"
            far[1].close()
            assert await within(recv_all(left)) == b""
            await within(task)
            await far[1].wait_closed()
        server.close()
        await server.wait_closed()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder: Path = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(cert), "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("missing: openssl; install openssl")
    accept = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accept.load_cert_chain(cert, key)
    connect = ssl.create_default_context(cafile=str(cert))
    return accept, connect


class TestResets:
    @pytest.mark.parametrize("side", ["left", "right"])
    async def test_a_reset_is_passed_on_as_a_reset(self, side: str) -> None:
        loop = asyncio.get_running_loop()
        async with piped() as p:
            breaks, other = (p.left, p.right) if side == "left" else (p.right, p.left)
            breaks.send(b"before")
            assert await within(loop.sock_recv(other, 100)) == b"before"
            reset(breaks)
            with pytest.raises(ConnectionResetError):
                await within(loop.sock_recv(other, 100))
            await within(p.task)
            assert isinstance(p.stats.error, ConnectionResetError)

    async def test_after_a_half_close_too(self) -> None:
        loop = asyncio.get_running_loop()
        async with piped() as p:
            p.left.shutdown(socket.SHUT_WR)
            assert await within(recv_all(p.right)) == b""
            reset(p.right)
            with pytest.raises(ConnectionResetError):
                await within(loop.sock_recv(p.left, 100))
            await within(p.task)

    async def test_while_the_other_side_is_stalled_too(self) -> None:
        """The way that waits for room does not read, and the reset is noticed all the same."""
        loop = asyncio.get_running_loop()
        async with piped(small=True) as p:
            await loop.sock_sendall(p.left, bytes(1000))
            await fill_right(p)
            reset(p.left)
            await within(p.task)
            assert p.stats.error is not None
            with pytest.raises(ConnectionResetError):
                await within(recv_all(p.right))

    async def test_writing_to_a_connection_that_was_closed_here_breaks_both(self) -> None:
        async with piped() as p:
            p.a[1].close()
            await wait_until(lambda: p.a[0].at_eof())
            p.right.send(b"too late")
            await within(p.task)
            assert isinstance(p.stats.error, ConnectionResetError)
            assert p.b[1].is_closing()


async def fill_right(p: Piped) -> None:
    """Have the pipe wait for room at the right, with the left's reader still open."""
    transport = p.b[1].transport
    _, high = transport.get_write_buffer_limits()
    while transport.get_write_buffer_size() <= high:
        with contextlib.suppress(BlockingIOError):
            p.left.send(bytes(4096))
        await asyncio.sleep(0)


class TestCancellation:
    async def test_it_closes_neither_and_loses_nothing(self) -> None:
        loop = asyncio.get_running_loop()
        async with piped() as p:
            p.left.send(b"one")
            assert await within(loop.sock_recv(p.right, 100)) == b"one"
            p.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await p.task
            assert not p.a[1].is_closing()
            assert not p.b[1].is_closing()
            # Both are as good as before, and can be piped again.
            again = asyncio.create_task(pipe(p.a, p.b))
            p.left.send(b"two")
            assert await within(loop.sock_recv(p.right, 100)) == b"two"
            again.cancel()
            await asyncio.wait([again])
            for _, writer in (p.a, p.b):
                writer.close()
                await within(writer.wait_closed())  # not cancelled with the pipe

    async def test_while_the_other_side_is_stalled(self) -> None:
        async with piped(small=True) as p:
            sent = await fill_all(p)
            p.task.cancel()
            await asyncio.wait([p.task])
            p.left.shutdown(socket.SHUT_WR)
            reading = asyncio.create_task(recv_all(p.right))
            rest = await within(p.a[0].read())
            assert p.stats.a_to_b + len(rest) == sent
            p.b[1].write(rest)
            p.b[1].write_eof()
            assert len(await within(reading)) == sent


class TestArguments:
    async def test_invalid_ones_are_told_and_the_connections_stay_usable(self) -> None:
        far, a = await connection()
        other, b = await connection()
        cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
            (None, b, None, TypeError, "two tuples of a reader and a writer, got None"),
            (a, b[1], None, TypeError, "two tuples of a reader and a writer, got <StreamWriter"),
            (a, (b[1], b[0]), None, TypeError, "two tuples"),
            (a, (*b, b[1]), None, TypeError, "two tuples"),
            (a, a, None, ValueError, "twice"),
            (a, b, 5, TypeError, "stats must be a PipeStats, got 5"),
        ]
        for one, two, stats, error, told in cases:
            with pytest.raises(error, match=told):
                await pipe(one, two, stats=stats)
        task = asyncio.create_task(pipe(a, b))
        far.send(b"hello")
        assert await within(asyncio.get_running_loop().sock_recv(other, 100)) == b"hello"
        far.close()
        other.close()
        await within(task)
