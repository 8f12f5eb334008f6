"""The WireGuard example's control socket: what it answers, and which files it deletes."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
from wireguard import control


async def ask(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request)
    answer = await reader.readuntil(b"\n\n")
    writer.close()
    await writer.wait_closed()
    return answer


async def test_get_is_answered_and_everything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "wg0.sock"
    async with control.serve(path, lambda: "errno=0\n\n"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert await ask(path, b"get=1\n\n") == b"errno=0\n\n"
        assert (await ask(path, b"set=1\n\n")).startswith(b"errno=")
    assert not path.exists()


async def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "wg0.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with control.serve(path, lambda: "errno=0\n\n"):
        assert await ask(path, b"get=1\n\n") == b"errno=0\n\n"


@pytest.mark.parametrize("kind", ["file", "fifo", "folder", "link"])
async def test_a_path_that_is_not_a_socket_is_left_alone(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / "precious", tmp_path / "target"
    match kind:
        case "file":
            path.write_text("precious")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            target.write_text("precious")
            path.symlink_to(target)
    before = path.lstat()
    with pytest.raises(FileExistsError, match="not a socket, so it is left alone"):
        async with control.serve(path, lambda: "errno=0\n\n"):
            pass
    assert path.lstat() == before


async def test_a_file_that_somebody_puts_in_its_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "wg0.sock"
    async with control.serve(path, lambda: "errno=0\n\n"):
        path.unlink()
        path.write_text("precious")
    assert path.read_text() == "precious"
