"""Small helpers that several tests share. None of them uses aiotun's own code."""

import asyncio
import functools
import ipaddress
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiotun

from . import _isolation

ROOT = Path(__file__).parent.parent

# Programs that the tests run, and the Debian package of each.
PACKAGES = {
    "bash": "bash",
    "busybox": "busybox-static",
    "cc": "gcc",
    "chromium": "chromium",
    "curl": "curl",
    "danted": "dante-server",
    "dhclient": "isc-dhcp-client",
    "groff": "groff-base",
    "ip": "iproute2",
    "make": "make",
    "nsenter": "util-linux",
    "passt": "passt",
    "ping": "iputils-ping",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "setsid": "util-linux",
    "slirp4netns": "slirp4netns",
    "ssh": "openssh-client",
    "sysctl": "procps",
    "systemd-analyze": "systemd",
    "tcpdump": "tcpdump",
    "tshark": "tshark",
    "udhcpc": "udhcpc",
    "unshare": "util-linux",
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
}

# False for the root of a user namespace, who is an ordinary user outside of it.
REAL_ROOT = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


# How many times slower than usual this machine is, if it is emulated. The tests wait longer then,
# and carry less.
SLOWER = int(os.environ.get("AIOTUN_TESTS_SLOWER", "1"))


async def wait_until(
    predicate: Callable[[], bool],
    timeout: float = 5.0,  # noqa: ASYNC109 - it cancels nothing, it only stops waiting
) -> None:
    """Let the loop run until `predicate` returns true: the kernel or a thread needs time for it.

    Calls it at every turn of the loop at first, and after 50 turns every 2 ms.
    """
    deadline = time.monotonic() + timeout * SLOWER
    turns = 0
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {predicate}")
        turns += 1
        await asyncio.sleep(0 if turns < 50 else 0.002)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071), the slow and obvious way."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) % 2:
        total += data[-1] << 8
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def make_icmp_echo(
    src: str, dst: str, ident: int = 1, seq: int = 1, payload: bytes = b"ping"
) -> bytes:
    """An echo request from `src` to `dst`: ICMP, or ICMPv6 if they are IPv6 addresses."""
    source, destination = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    addresses = source.packed + destination.packed
    if source.version == 4:
        body = struct.pack("!BBHHH", 8, 0, 0, ident, seq) + payload
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 1, 0)
        value = checksum(head + addresses)
        return head[:10] + struct.pack("!H", value) + addresses + body
    body = struct.pack("!BBHHH", 128, 0, 0, ident, seq) + payload
    value = checksum(addresses + struct.pack("!II", len(body), 58) + body)
    body = body[:2] + struct.pack("!H", value) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), 58, 64) + addresses + body


def udp_burst(address: str, port: int, count: int, size_bytes: int = 32) -> list[bytes]:
    """Send `count` numbered datagrams at once in this thread's namespace; return their payloads.

    If the receiver's buffer is full, the kernel drops datagrams and the sender does not notice:
    this is how a sender sees a slow reader.
    """
    payloads = [struct.pack("!I", number).ljust(size_bytes, b".") for number in range(count)]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for payload in payloads:
            sock.sendto(payload, (address, port))
    return payloads


def need(program: str) -> str:
    """Return the path of a program that the test runs; skip the test if this machine lacks it.

    In CI that skip is a failure, because its reason begins with "missing:" (see conftest.py). Every
    helper that runs a command asks this first, so that a missing program can't look like a fault.
    An ordinary user's PATH may lack the sbin folders, so the search continues there.
    """
    found = shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"missing: {program}; install {PACKAGES.get(program, program)}")
    return found


def fetched(program: str, why: str) -> str:
    """Return the path of a program that tools/peers.sh has put into benchmarks/build/peers.

    Skips the test for the reason `why` if it is not there.
    """
    folder = ROOT / "benchmarks" / "build" / "peers"
    for found in folder.glob(f"*/bin/{program}"):
        return str(found)
    pytest.skip(why)


def ip(*args: str) -> Any:
    """Run iproute2 in this thread's namespace and return its output, parsed; [] for none."""
    command = [need("ip"), "-j", *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return json.loads(done.stdout) if done.stdout.strip() else []


@functools.cache
def ordinary_python() -> tuple[list[str], dict[str, str]]:
    """Return a command that starts Python as an ordinary user (nobody), and its environment.

    Skips the test if this process can't become another user, or if that user may not make
    namespaces. The interpreter, its packages and this checkout may be in a folder that only root
    can enter (a home folder), so they are mounted under the private /run as well.
    """
    if not REAL_ROOT:
        pytest.skip("already run by an ordinary user, who can't become another user")
    user = [need("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    trial = subprocess.run([*user, "unshare", "-rn", "true"], capture_output=True, text=True)
    if trial.returncode != 0:
        pytest.skip(f"missing: user namespaces for ordinary users ({trial.stderr.strip()})")
    package = Path(aiotun.__file__).parent.parent
    places = {
        "base": Path(sys.base_prefix),
        "packages": Path(sysconfig.get_path("purelib")),
        "source": package,
    }
    for name, place in places.items():
        target = Path("/run/aiotun-user", name)
        target.mkdir(parents=True, exist_ok=True)
        _isolation.bind(str(place), str(target))
        places[name] = target
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/",
        "PYTHONPATH": f"{places['source']}:{places['packages']}",
        "PYTHONDONTWRITEBYTECODE": "1",
        # A Python that is built as a shared library looks for that library in its installed place.
        "LD_LIBRARY_PATH": str(places["base"] / "lib"),
    }
    return [*user, str(places["base"] / "bin" / version)], env
