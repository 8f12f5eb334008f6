"""The control socket: where wg(8) looks for peers that are no kernel's, so that `wg show` works.

https://www.wireguard.com/xplatform/, but for `set`: the configuration is what the file says.
"""

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

__all__ = ["FOLDER", "serve"]

FOLDER = Path("/var/run/wireguard")


@contextlib.asynccontextmanager
async def serve(path: Path, get: Callable[[], str]) -> AsyncIterator[None]:
    """Answer at a Unix socket while the block runs; only this user may ask, for keys are told.

    A socket that is there already is replaced: its process was killed, since we have the device.

    Raises:
        FileExistsError: the path is there and is not a socket, so it is not ours to delete.
    """
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_answer(reader, writer, get))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    path.parent.mkdir(mode=0o700, exist_ok=True)
    _unlink_socket(path)
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
        with contextlib.suppress(FileExistsError):  # somebody put a file of theirs there meanwhile
            _unlink_socket(path)


def _unlink_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode  # of a symbolic link itself, not of what it points to
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "not a socket, so it is left alone", str(path))
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
