"""repack.py SDIST TIME: writes a source distribution again, with the same bytes on every machine.

setuptools keeps each file's time, mode, owner and place in the folder. All of these depend on the
checkout and on the umask of whoever builds.
"""

import gzip
import io
import sys
import tarfile
from pathlib import Path


def repacked(archive: bytes, time: int) -> bytes:
    """Return a .tar.gz with the same files, sorted, from that time, of nobody."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        # The name and the time in gzip's own header are left out.
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            executable = member.isdir() or member.mode & 0o100
            member.mode = 0o755 if executable else 0o644
            member.mtime, member.uid, member.gid = time, 0, 0
            member.uname = member.gname = ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return packed.getvalue()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_bytes(repacked(path.read_bytes(), int(sys.argv[2])))
