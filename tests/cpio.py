"""Archives that the kernel unpacks into its first file system ("newc" of cpio(5))."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["END", "entry", "tree"]


def entry(name: str, data: bytes, mode: int) -> bytes:
    """One file (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    numbers = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0]
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


END = entry("TRAILER!!!", b"", 0)


def tree(root: Path, under: str = "") -> Iterator[bytes]:
    """Everything in a folder, owned by root; folders before what is in them.

    Args:
        under: the folder of the archive that gets it.
    """
    for folder, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            data = b""
            if stat.S_ISLNK(mode):
                data = os.readlink(path).encode()
            elif stat.S_ISREG(mode):
                data = path.read_bytes()
            elif not stat.S_ISDIR(mode):
                continue
            yield entry(str(under / path.relative_to(root)), data, mode)
