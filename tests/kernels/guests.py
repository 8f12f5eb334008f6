"""Guests that run parts of the tests on another kernel, and what they print."""

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import cpio
from ..helpers import ROOT
from .fetching import Kernel

__all__ = ["Part", "Result", "boot"]

_HERE = Path(__file__).parent
# What QEMU emulates for each of Debian's architectures.
_MACHINES = {
    "amd64": ["qemu-system-x86_64", "-cpu", "max"],
    "arm64": ["qemu-system-aarch64", "-machine", "virt", "-cpu", "max,pauth-impdef=on"],
}
_CONSOLES = {"amd64": "ttyS0", "arm64": "ttyAMA0"}
_MEMORY = 2048  # MiB


@dataclass(frozen=True)
class Part:
    """One line of the table: a name, and the command that the guest runs."""

    name: str
    command: str


@dataclass
class Result:
    """What came of a part.

    Attributes:
        status: its exit status; None if the guest never got so far.
        seconds: how long it took in the guest.
        output: what it printed.
    """

    status: int | None = None
    seconds: int = 0
    output: str = ""

    def __str__(self) -> str:
        """A cell of the table."""
        if self.status is None:
            return "not run"
        counts = re.findall(
            r"(\d+) (passed|failed|error)", self.output.splitlines()[-1:][0] if self.output else ""
        )
        said = "ok" if self.status == 0 else f"status {self.status}"
        if counts:
            said = ", ".join(f"{count} {word}" for count, word in counts)
        return f"{said} ({self.seconds} s)"


async def boot(
    kernel: Kernel, architecture: str, parts: list[Part], limit: float, log: Path
) -> dict[str, Result]:
    """Boot a guest, run the parts in it, and return their results by name.

    Cancellation ends the guest.

    Args:
        limit: after so many seconds the guest is ended, and the parts that are left were not run.
        log: the file that gets all that the guest prints.
    """
    results = {part.name: Result() for part in parts}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "initramfs")
        _write(image, _files(kernel, architecture, parts))
        if kernel.user_mode:
            command = _user_mode(kernel, image)
        else:
            command = _qemu(kernel, architecture, image)
        with log.open("w") as copy:
            current = None
            async for line in _lines("timeout", str(limit), *command):
                copy.write(line)
                copy.flush()
                if match := re.match(r"=== (.+): status (\d+) after (\d+) s$", line):
                    result = results[match[1]]
                    result.status, result.seconds = int(match[2]), int(match[3])
                    current = None
                elif line.startswith("=== ") and line[4:].strip() in results:
                    current = results[line[4:].strip()]
                elif current is not None:
                    current.output += line
    return results


def _qemu(kernel: Kernel, architecture: str, image: Path) -> list[str]:
    program = _MACHINES[architecture][0]
    if shutil.which(program) is None:
        raise FileNotFoundError(f"{program} is missing; install qemu-system")
    return [
        *_MACHINES[architecture],
        *("-accel", "tcg,thread=multi", "-smp", str(os.cpu_count() or 1), "-m", str(_MEMORY)),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel.image), "-initrd", str(image)),
        *("-append", f"console={_CONSOLES[architecture]} quiet panic=-1 random.trust_cpu=on"),
    ]


# In the guests' own root, because Debian's newer kernels need its C library. The guest's memory is
# a file in /tmp.
_IN_ROOT = """
root=$1 kernel=$2 image=$3
shift 3
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
mount --bind "$kernel" "$root/mnt"
mount --bind "$image" "$root/run"
mount -t tmpfs tmp "$root/tmp"
exec chroot "$root" /usr/bin/env -i HOME=/tmp TMPDIR=/tmp PATH=/usr/bin /mnt/linux.uml "$@"
"""


def _user_mode(kernel: Kernel, image: Path) -> list[str]:
    root = ROOT / ".foreign/amd64/root"
    return [
        *("unshare", "--map-root-user", "--mount", "sh", "-euc", _IN_ROOT, "sh"),
        *(str(root), str(kernel.image.parent), str(image.parent)),
        *(f"mem={_MEMORY}M", f"initrd=/run/{image.name}", "con=null", "con0=fd:0,fd:1"),
        *("console=tty0", "quiet", "panic=-1"),
    ]


def _files(kernel: Kernel, architecture: str, parts: list[Part]) -> Iterator[bytes]:
    """The archive of a guest: Debian's programs, aiotun and its tests, modules, and the parts."""
    yield from cpio.tree(ROOT / ".foreign" / architecture / "root")
    modules = kernel.modules / "usr/lib/modules"
    yield cpio.entry("usr/lib/modules", b"", 0o040755)
    yield from cpio.tree(modules, "usr/lib/modules")
    script = "".join(f"part {part.name!r} {part.command}\n" for part in parts)
    yield cpio.entry("parts", script.encode(), 0o100644)
    yield cpio.entry("init", (_HERE / "init").read_bytes(), 0o100755)
    yield cpio.END


def _write(path: Path, pieces: Iterator[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(pieces)


async def _lines(*command: str) -> AsyncIterator[str]:
    """What a program prints, line by line. Ends the program when the caller stops reading."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=1 << 24,  # bytes of a line
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            yield line.decode(errors="replace").replace("\r", "")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
