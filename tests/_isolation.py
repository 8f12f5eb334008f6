"""Moves the whole test run into private namespaces, and verifies that it is in them.

Three steps make sure that no test can touch an interface of the machine:

1. `enter` (outside) replaces the process with ``unshare``, which runs this file as a script;
2. `main` (inside, a fresh process) mounts what must be private and replaces itself with the command
   line that pytest was started with;
3. `problem` (inside, in pytest) checks that this is a private namespace.

If one of them fails, the run ends with a one-line message. Nothing falls back to the machine's own
namespaces.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Set by `enter`: the inodes of the namespaces outside, "net:mnt".
MARKER = "AIOTUN_TESTS_OUTSIDE"
# Written by `main` into the private /run: the inode of the network namespace inside. A marker in
# the environment can be inherited or exported by mistake; a file on our own tmpfs can't.
PROOF = Path("/run/aiotun-tests")
NODE = Path("/dev/net/tun")

CLONE_NEWNS, CLONE_NEWNET = 0x0002_0000, 0x4000_0000  # sched.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND = 2, 4, 8, 4096  # mount.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # sockios.h, if.h
_TUN_DEVICE = os.makedev(10, 200)  # Documentation/admin-guide/devices.txt

# The kernel sends packets by itself: duplicate address detection, router solicitations, link-local
# addresses and the multicast reports that follow them. They would arrive between the packets that a
# test waits for.
_QUIET = {"accept_dad": "0", "router_solicitations": "0", "addr_gen_mode": "1"}

_libc = ctypes.CDLL(None, use_errno=True)


class IsolationError(Exception):
    """The tests can't get private namespaces; the text says what is missing."""


def enter(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Replace this process with `command` in private namespaces; never returns.

    Raises:
        IsolationError: this machine does not allow it; the text says why.
    """
    unshare = _unshare()
    _check_node()
    outside = f"{_inode('net')}:{_inode('mnt')}"
    script = [sys.executable, "-P", os.path.abspath(__file__), *command]
    inside = {**env, MARKER: outside}
    if os.geteuid() != 0:
        # Inside a user namespace every user is called root, and pytest would use
        # /tmp/pytest-of-root, which may belong to the real root.
        inside["LOGNAME"] = f"uid{os.geteuid()}"
    os.execve(unshare[0], [*unshare, "--", *script], inside)


def _unshare() -> list[str]:
    """Find a way to call unshare(1) that works for this user."""
    program = shutil.which("unshare")
    if program is None:
        raise IsolationError("unshare(1) is missing; install util-linux")
    ways = [["-r", "-n", "-m"]]
    if os.geteuid() == 0:
        # In a container even root may lack CAP_SYS_ADMIN; a user namespace gives it.
        ways.insert(0, ["-n", "-m"])
    said = ""
    for way in ways:
        trial = [program, *way, sys.executable, "-ISc", ""]
        done = subprocess.run(trial, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            return [program, *way]
        said = said or done.stderr.strip().removeprefix("unshare: ")
    raise IsolationError(
        f"private namespaces are not allowed here ({said}); run as root, or let root allow user "
        "namespaces: sysctl user.max_user_namespaces=10000 "
        "(and kernel.apparmor_restrict_unprivileged_userns=0 where that exists)"
    )


def _check_node() -> None:
    if not NODE.exists():
        raise IsolationError(
            f"{NODE} is missing; load the driver with 'modprobe tun', "
            f"or in a container pass the node in ('--device {NODE}')"
        )
    if not os.access(NODE, os.R_OK | os.W_OK):
        raise IsolationError(
            f"this user may not open {NODE}; run as root, or let root run 'chmod 0666 {NODE}'"
        )


def _inode(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino


def problem(env: Mapping[str, str]) -> str | None:
    """Return why this process is not in the namespaces that `main` made, or None if it is."""
    net, mnt = _inode("net"), _inode("mnt")
    outer_net, _, outer_mnt = env.get(MARKER, "").partition(":")
    if not (outer_net.isdigit() and outer_mnt.isdigit()):
        return f"{MARKER} was not set by the tests themselves; unset it"
    if net == int(outer_net) or mnt == int(outer_mnt):
        return f"{MARKER} is set, but this is the namespace outside; unset it"
    try:
        proof = PROOF.read_text()
    except OSError:
        proof = ""
    if proof != str(net):
        return f"{MARKER} is set, but this is not the namespace made for the tests; unset it"
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others:
        return f"the private network namespace is not empty: it has {', '.join(others)}"
    return None


def prepare_netns() -> None:
    """Bring `lo` up and silence IPv6 in the calling thread's network namespace."""
    for where in ("all", "default"):
        for key, value in _QUIET.items():
            # A machine without IPv6 has none of these files, and in a container /proc/sys may be
            # read-only. The tests then see more packets, but are still isolated.
            with contextlib.suppress(OSError):
                Path(f"/proc/sys/net/ipv6/conf/{where}/{key}").write_text(value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
        request = struct.pack("16sH22x", b"lo", flags | _IFF_UP)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request)


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2), which Python does not offer; call it inside only."""
    done = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def bind(source: str, target: str) -> None:
    """Make `source` (a file or folder) appear at `target` as well; call it inside only."""
    mount(source, target, "", _MS_BIND)


def _unshare_thread(flags: int) -> None:
    if sys.version_info >= (3, 12):
        os.unshare(flags)
    elif _libc.unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def unshare_netns() -> None:
    """Give the calling thread a new network namespace."""
    _unshare_thread(CLONE_NEWNET)


def unshare_run() -> None:
    """Give the calling thread, and those that it starts, a /run of their own."""
    proof = PROOF.read_text()
    _unshare_thread(CLONE_NEWNS)
    _mount_run()
    PROOF.write_text(proof)


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace of this fd."""
    if sys.version_info >= (3, 12):
        os.setns(fd, CLONE_NEWNET)
    elif _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _make_private() -> None:
    # sysfs shows the interfaces of the namespace that mounted it. Without a new mount,
    # /sys/class/net would still show the machine's.
    mount("sysfs", "/sys", "sysfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _mount_run()
    prepare_netns()
    PROOF.write_text(str(_inode("net")))


def _mount_run() -> None:
    # 'ip netns add' makes its names under /run/netns. Not nodev: _open_node_to_all makes a node
    # here.
    mount("tmpfs", "/run", "tmpfs", _MS_NOSUID, "mode=0755")


def _open_node_to_all() -> None:
    """Make /dev/net/tun usable for tests that run as an ordinary user, as on most distributions.

    On a bare machine its mode is 0600. The node itself is not changed: a second node of the same
    driver is mounted over it, in this mount namespace only, so nothing changes outside.
    """
    if os.stat(NODE).st_mode & 0o006 == 0o006:
        return
    ours = "/run/aiotun-node"
    try:
        os.mknod(ours, stat.S_IFCHR | 0o600, _TUN_DEVICE)
        os.chmod(ours, 0o666)
        bind(ours, str(NODE))
        os.close(os.open(NODE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        # Nobody can make nodes in a user namespace. The tests that need this one skip.
        sys.stderr.write(f"note: {NODE} stays as it is, for root only ({error.strerror})\n")


def main(command: list[str]) -> None:
    """Inside: prepare the namespaces, then become `command`. `enter` started this process."""
    outside = os.environ.get(MARKER, "").split(":")
    if str(_inode("net")) in outside or str(_inode("mnt")) in outside or len(outside) != 2:
        raise IsolationError("unshare(1) ran, but left this process in the machine's namespaces")
    try:
        _make_private()
    except OSError as error:
        raise IsolationError(
            f"{error.filename or 'the loopback interface'} can't be made private "
            f"({error.strerror}); run as root, outside of containers that forbid mounting"
        ) from error
    _open_node_to_all()
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except IsolationError as error:
        sys.exit(f"aiotun tests: {error}")
