"""check_dist.py ARCHIVE...: finds traces of the machine that built an sdist or a wheel.

That is a RUNPATH or RPATH in a C module, and a path of the checkout, of the interpreter or of the
user. Prints a line for each and exits with 1.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


def contents(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file of an archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)
        return
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as sdist:
        for member in sdist:
            if (file := sdist.extractfile(member)) is not None:
                yield member.name, file.read()


def paths() -> set[str]:
    """Return the folders of this machine that no archive may name."""
    found = {os.getcwd(), os.path.expanduser("~"), sys.prefix, sys.base_prefix}
    # Folders that every machine has say nothing.
    return {path for path in found if path.count("/") > 1 or path.startswith("/root")}


def run_path(module: bytes) -> list[str]:
    """Return the lines of a shared object's dynamic section that name a search path."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(module)
        file.flush()
        command = ["readelf", "--dynamic", "--wide", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.strip() for line in said.splitlines() if "(RUNPATH)" in line or "(RPATH)" in line]


def traces(archive: Path) -> Iterator[str]:
    """Yield a line for each trace that an archive has of this machine."""
    for name, data in contents(archive):
        if data.startswith(b"\x7fELF"):
            for line in run_path(data):
                yield f"{archive.name}: {name} has a search path: {line}"
        for path in sorted(paths()):
            if path.encode() + b"/" in data:
                yield f"{archive.name}: {name} names {path}, a folder of this machine"


if __name__ == "__main__":
    found = [line for each in sys.argv[1:] for line in traces(Path(each))]
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)
