"""The kernel's own view of interfaces, and unprivileged children; none of it uses aiotun's code."""

import array
import contextlib
import ctypes
import difflib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from aiotun._kernel import abi
from aiotun._kernel.abi import Iff, Ioctl

from ..helpers import REAL_ROOT, SLOWER, ip, need, ordinary_python

# The uid of an ordinary user's child, as the namespace sees it.
ORDINARY = 65534 if REAL_ROOT else 0

_ETHTOOL_GTXCSUM, _ETHTOOL_GTSO = 0x16, 0x1E  # ethtool.h


# --- Looking -------------------------------------------------------------------------------------


def resident_kib() -> int:
    """How much memory this process takes.

    The C library gives back what is free first: after thousands of tests that is several megabytes,
    which come and go.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def names() -> list[str]:
    """The interfaces of this thread's namespace, without `lo`."""
    return sorted(name for _, name in socket.if_nameindex() if name != "lo")


def children_of(pid: int) -> set[int]:
    """The processes that a process has started and not waited for."""
    found = set()
    # Not every kernel has /proc/PID/task/TID/children.
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
    return found


def link(name: str) -> Any:
    """What `ip -d link` shows of one interface."""
    (only,) = ip("-d", "link", "show", "dev", name)
    return only


def is_up(name: str) -> bool:
    return "UP" in link(name)["flags"]


def forward(*ports: str) -> bool:
    """Whether a bridge forwards to these ports: some time after each has a carrier."""
    states = (link(port)["linkinfo"]["info_slave_data"]["state"] for port in ports)
    return all(state == "forwarding" for state in states)


def tun_data(name: str) -> Any:
    """The attributes that netlink gives for TUN and TAP devices only."""
    return link(name)["linkinfo"]["info_data"]


def addresses(name: str) -> set[str]:
    """The addresses of an interface as aiotun writes them."""
    found = set()
    for shown in ip("addr", "show", "dev", name):
        for each in shown.get("addr_info", []):
            own, length = each["local"], each["prefixlen"]
            far = each.get("address")
            found.add(f"{own} peer {far}/{length}" if far else f"{own}/{length}")
    return found


def routes(name: str) -> list[Any]:
    """All routes through an interface, except those that the kernel added by itself."""
    found = ip("-4", "route", "show", "table", "all") + ip("-6", "route", "show", "table", "all")
    return [
        {key: value for key, value in each.items() if key not in ("dev", "flags", "pref")}
        for each in found
        if each.get("dev") == name and each.get("protocol") != "kernel"
    ]


def state(name: str) -> dict[str, Any]:
    """Everything that iproute2 shows of an interface's link, addresses and routes.

    Except what depends on whether a program is attached: the kernel updates that up to a second
    later (linkwatch). The queueing discipline is left out, too: it appears when the link first goes
    up.
    """
    (shown,) = ip("-d", "addr", "show", "dev", name)
    found = ip("-4", "route", "show", "table", "all") + ip("-6", "route", "show", "table", "all")
    addresses = shown.pop("addr_info")
    for key in ("operstate", "qdisc"):
        shown.pop(key, None)
    shown["flags"] = sorted({*shown["flags"]} - {"NO-CARRIER", "LOWER_UP"})
    for each in found:
        each["flags"] = sorted({*each.get("flags", ())} - {"linkdown"})
    return {
        "link": shown,
        # In the order of the kernel's list: the first IPv4 address of a network is the primary.
        "addresses": addresses,
        # The kernel owns the table 'local'. When a link first gets a carrier, the kernel adds
        # routes there, for multicast and for an existing IPv6 address. They come at any time and
        # stay.
        "routes": [
            each for each in found if each.get("dev") == name and each.get("table") != "local"
        ],
    }


def changes(name: str, before: dict[str, Any]) -> list[str]:
    """How an interface differs from the result of `state` before: lines with a - or a +."""
    diff = difflib.unified_diff(_lines(before), _lines(state(name)), n=0, lineterm="")
    return [line for line in diff if line[0] in "+-" and line[:3] not in ("+++", "---")]


def _lines(shown: dict[str, Any]) -> list[str]:
    lines = [f"{key}={value}" for key, value in sorted(shown["link"].items())]
    lines += [f"address {json.dumps(each, sort_keys=True)}" for each in shown["addresses"]]
    return lines + [f"route {json.dumps(each, sort_keys=True)}" for each in shown["routes"]]


def tun_flags(name: str) -> Iff:
    """The driver's flags in sysfs, which is mounted again to show this namespace."""
    script = 'mount -t sysfs sysfs /sys && exec cat "/sys/class/net/$1/tun_flags"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Iff(int(done.stdout, 16))


def ask(fd: int, request: Ioctl) -> int:
    """Make an ioctl on a queue whose result is an int."""
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def may_leave_to_us(name: str) -> tuple[bool, bool]:
    """Whether the kernel may leave checksums, and TCP segmentation, to the program."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for command in (_ETHTOOL_GTXCSUM, _ETHTOOL_GTSO):
            value = array.array("I", [command, 0])
            request = struct.pack("@16sP16x", name.encode(), value.buffer_info()[0])
            fcntl.ioctl(asker, abi.Siocgif.ETHTOOL, request)
            found.append(bool(value[1]))
    return found[0], found[1]


# --- Making --------------------------------------------------------------------------------------


def make(name: str, mode: str = "tun", *more: str) -> None:
    """Make a persistent device, as root would with iproute2."""
    ip("tuntap", "add", "dev", name, "mode", mode, *more)


@contextlib.contextmanager
def held(name: str, flags: Iff = Iff.TUN | Iff.NO_PI, queues: int = 1) -> Iterator[list[int]]:
    """Hold queues of a device by hand, as another program would."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open(abi.NODE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            fcntl.ioctl(fds[-1], Ioctl.TUNSETIFF, abi.IFREQ.pack(name.encode(), flags))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def another_namespace(first: str = "true") -> Iterator[str]:
    """Make another network namespace and yield its path; a shell command prepares it."""
    with subprocess.Popen(
        ["unshare", "-n", "sh", "-c", f"{first} && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield f"/proc/{holder.pid}/ns/net"


def inside(path: str, *command: str) -> str:
    """Run a command in another namespace and return its output."""
    words = [need("nsenter"), f"--net={path}", need(command[0]), *command[1:]]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Children ------------------------------------------------------------------------------------

_PRELUDE = """
import asyncio, json, os, sys
import aiotun

async def opened(opener):
    device = await opener
    await device.aclose()

def attempt(opener):
    '''Open and close a device, and print what came of it.'''
    try:
        asyncio.run(opened(opener))
    except aiotun.AiotunError as error:
        said = {
            "class": type(error).__name__,
            "errno": getattr(error, "errno", None),
            "strerror": getattr(error, "strerror", None),
            "filename": getattr(error, "filename", None),
        }
    else:
        said = {"class": None}
    print(json.dumps(said))

"""


def child(code: str, *, prefix: Sequence[str] = (), fds: Sequence[int] = ()) -> Any:
    """Run code in a new Python process in this namespace; return its last line, parsed as JSON."""
    command = [*prefix, sys.executable]
    return _child(command, None, code, fds)


def ordinary_child(code: str, *, prefix: Sequence[str] = (), fds: Sequence[int] = ()) -> Any:
    """Run code as a user without any privilege.

    A user namespace has no other user, so there the child stays the same user, without
    capabilities.
    """
    if REAL_ROOT:
        python, env = ordinary_python()
        return _child([*prefix, *python], env, code, fds)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    return _child([*prefix, *drop, sys.executable], None, code, fds)


def _child(command: list[str], env: dict[str, str] | None, code: str, fds: Sequence[int]) -> Any:
    program = _PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [*command, "-W", "error", "-c", program],
        env=env,
        pass_fds=fds,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30 * SLOWER,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def ipv6_switched_off() -> Iterator[None]:
    """Disable IPv6 for interfaces that are made in this namespace inside the block."""
    setting = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
    with open(setting, "w") as file:
        file.write("1")
    try:
        yield
    finally:
        with open(setting, "w") as file:
            file.write("0")


def with_node(how: str) -> list[str]:
    """Return a command prefix: the command after it sees another /dev/net/tun, or none.

    Args:
        how: ``"none"``; a ``"directory"``; a ``"loop"`` of links; ``"nodev"``: a node on a mount
            where devices don't work; ``"closed"`` to ordinary users (mode 0600); or ``"dead"``: a
            node without a driver.
    """
    without = {
        "none": "true",
        "directory": "mkdir /dev/net/tun",
        "loop": "ln -s tun /dev/net/tun",
        "nodev": "mknod -m 0666 /dev/net/tun c 10 200",
    }
    if how in without:
        if how == "nodev" and not REAL_ROOT:
            pytest.skip("only the machine's own root can make device nodes")
        script = f"mount -t tmpfs -o mode=0755,nodev none /dev/net && {without[how]}"
    else:
        if not REAL_ROOT:
            pytest.skip("only the machine's own root can make device nodes")
        number = {"closed": "10 200", "dead": f"10 {_free_minor()}"}[how]
        mode = {"closed": "0600", "dead": "0666"}[how]
        # /run is private to this run, and devices work there.
        script = (
            f"mount -t tmpfs -o mode=0755 none /dev/net && mknod -m {mode} /dev/net/tun c {number}"
        )
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh"]


def _free_minor() -> int:
    with open("/proc/misc") as file:
        taken = {int(line.split()[0]) for line in file}
    return next(number for number in range(254, 0, -1) if number not in taken)


# --- Where namespaces are forbidden ---------------------------------------------------------------

# sched.h
CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000

# prctl(2), seccomp(2): give EPERM to a system call, if its first argument passes a test; then run a
# command.
_FILTER = """
import ctypes, os, struct, sys

number = NUMBERS[os.uname().machine]
code = [
    (0x20, 0, 0, 0),               # load the number of the system call
    (0x15, 0, 3, number),          # another one: allow
    (0x20, 0, 0, 16),              # load its first argument
    (TEST),
    (0x06, 0, 0, 0x00050000 | 1),  # EPERM
    (0x06, 0, 0, 0x7FFF0000),      # allow
]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
head = struct.pack("HP", len(code), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.create_string_buffer(head)) == 0  # PR_SET_SECCOMP
os.execvp(sys.argv[1], sys.argv[1:])
"""


def without_unshare(flags: int) -> list[str]:
    """A command prefix: what follows it may not unshare(2) with any of these flags."""
    numbers = {"x86_64": 272, "aarch64": 97}
    return _without(numbers, f"0x45, 0, 1, {flags}")  # none of these: allow


def without_mount() -> list[str]:
    """A command prefix: what follows it may not mount(2)."""
    return _without({"x86_64": 165, "aarch64": 40}, "0x35, 0, 1, 0")  # always true


def _without(numbers: dict[str, int], test: str) -> list[str]:
    text = _FILTER.replace("NUMBERS", str(numbers)).replace("TEST", test)
    return [sys.executable, "-ISc", text]


def limited(setting: str, value: int) -> list[str]:
    """A command prefix: what follows it runs in a user namespace with this limit."""
    script = f'echo {value} >/proc/sys/user/{setting} && exec "$@"'
    return ["unshare", "-Ur", "sh", "-c", script, "sh"]
