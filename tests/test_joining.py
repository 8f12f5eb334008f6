"""How `aiotun run` joins two connections."""

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from aiotun._cli.joining import End, join

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Joined:
    """A client and a server, each at the far end of one of the connections."""

    def __init__(self, ends: tuple[End, End], client: Streams, server: Streams) -> None:
        self.ends, self.client, self.server = ends, client, server
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.task = asyncio.create_task(join(*self.ends))

    async def over(self) -> None:
        assert self.task is not None
        async with asyncio.timeout(10):
            await self.task
        assert all(end.transport.is_closing() for end in self.ends)


async def connection(first: int = 0) -> tuple[End, Streams]:
    """An `End`, and the far end of its connection; TCP, as only that can be reset."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname())
        near, _ = listening.accept()
    near.setblocking(False)
    _, end = await loop.create_connection(lambda: End(first), sock=near)
    return end, await asyncio.open_connection(sock=far)


@pytest.fixture
async def joined() -> AsyncIterator[Joined]:
    (a, client), (b, server) = await connection(10), await connection()
    made = Joined((a, b), client, server)
    try:
        yield made
    finally:
        if made.task is not None:
            made.task.cancel()
            await asyncio.wait([made.task])
        for end in made.ends:
            end.transport.abort()
        for _, writer in (client, server):
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def test_what_comes_before_they_are_joined_is_kept(joined: Joined) -> None:
    joined.server[1].write(b"banner")
    joined.client[1].write(b"question")
    joined.client[1].write_eof()
    a, b = joined.ends
    while (a.received, b.received) != (8, 6):  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    joined.begin()
    assert await joined.client[0].readexactly(6) == b"banner"
    assert await joined.server[0].read() == b"question"
    joined.server[1].write(b"answer")
    joined.server[1].close()
    assert await joined.client[0].read() == b"answer"
    await joined.over()
    assert (a.received, b.received, bytes(a.first)) == (8, 12, b"question")


async def test_bytes_both_ways_with_slow_readers(joined: Joined) -> None:
    joined.begin()
    data = os.urandom(1 << 20) * 8

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    async def receive(reader: asyncio.StreamReader) -> bytes:
        digest = hashlib.sha256()
        while more := await reader.read(10_000):
            digest.update(more)
        return digest.digest()

    _, _, one, other = await asyncio.gather(
        send(joined.client[1]),
        send(joined.server[1]),
        receive(joined.client[0]),
        receive(joined.server[0]),
    )
    assert one == other == hashlib.sha256(data).digest()
    await joined.over()


async def test_a_reader_that_does_not_read_stops_the_sender(joined: Joined) -> None:
    joined.begin()
    joined.client[1].transport.set_write_buffer_limits(0)

    async def send() -> None:
        for _ in range(1000):
            joined.client[1].write(bytes(1 << 20))
            await joined.client[1].drain()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(send(), 2)
    held = joined.ends[1].transport.get_write_buffer_size()
    assert 0 < held < 1 << 20


@pytest.mark.parametrize("early", [True, False])
async def test_a_reset_is_passed_on(joined: Joined, early: bool) -> None:
    if not early:
        joined.begin()
    sock = joined.server[1].get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    joined.server[1].transport.abort()
    if early:
        await joined.ends[1].lost
        joined.begin()
    with pytest.raises(ConnectionResetError):
        await joined.client[0].read()
    await joined.over()


async def test_cancellation_resets_both(joined: Joined) -> None:
    joined.begin()
    await asyncio.sleep(0)
    assert joined.task is not None
    joined.task.cancel()
    for reader, _ in (joined.client, joined.server):
        with pytest.raises(ConnectionResetError):
            await reader.read()
