"""The control socket, where wg(8) finds userspace implementations, so that `wg show` works.

See https://www.wireguard.com/xplatform/. `set` is not supported: the configuration comes from the
file.
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
    """Serve a Unix socket while the block runs. Only this user may connect, as it shows keys.

    Replaces an existing socket: as we hold the device, that socket's process must have been killed.

    Raises:
        FileExistsError: the path exists and is not a socket, so it is not deleted.
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
        with contextlib.suppress(FileExistsError):  # another program made it
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
        # A connection may send several requests, as with other implementations.
        while request := await reader.readuntil(b"\n\n"):
            known = request == b"get=1\n\n"
            writer.write((get() if known else f"errno={errno.EOPNOTSUPP}\n\n").encode())
            await writer.drain()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        pass  # the client has disconnected, or sent an invalid request
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
