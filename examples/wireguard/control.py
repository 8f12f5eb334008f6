"""The control socket: where wg(8) looks for peers that are no kernel's, so that `wg show` works.

https://www.wireguard.com/xplatform/, but for `set`: the configuration is what the file says.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

__all__ = ["FOLDER", "serve"]

FOLDER = Path("/var/run/wireguard")


@contextlib.asynccontextmanager
async def serve(path: Path, get: Callable[[], str]) -> AsyncIterator[None]:
    """Answer at a Unix socket while the block runs; only this user may ask, for keys are told."""
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_answer(reader, writer, get))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    _make_way(path)
    before = os.umask(0o077)
    try:
        server = await asyncio.start_unix_server(connected, path)
    finally:
        os.umask(before)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
        _make_way(path)


def _make_way(path: Path) -> None:
    """Have the folder there, and in it no socket: who left one was killed, the device is ours."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.unlink(missing_ok=True)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, get: Callable[[], str]
) -> None:
    try:
        # As in the implementations: a connection may ask several times.
        while request := await reader.readuntil(b"\n\n"):
            known = request == b"get=1\n\n"
            writer.write((get() if known else f"errno={errno.EOPNOTSUPP}\n\n").encode())
            await writer.drain()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        pass  # they have hung up, or talk nonsense
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
