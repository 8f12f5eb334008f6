"""Private network namespaces: for a thread, for this process, or for a program that we start.

A thread with CAP_SYS_ADMIN can enter a new network namespace and come back (`isolated`). An
ordinary user gets that capability only in a new user namespace. Only a process with a single thread
can enter one, and it can't come back: `enter` moves such a process, and `command` starts a program
inside with unshare(1).

All functions here fail closed: if the namespace can't be created, nothing runs outside instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import AiotunError, NotPermittedError
from .namespaces import setns

__all__ = [
    "MARKER",
    "OUTSIDE",
    "NoNamespaceError",
    "check_inside",
    "command",
    "enter",
    "environment",
    "inside",
    "isolated",
    "run",
]

MARKER = "AIOTUN_ISOLATED"
"""An environment variable of a process that `enter` moved: the inodes of the network namespaces
outside and inside, ``"OUTSIDE:INSIDE"``."""

OUTSIDE = "AIOTUN_DEMO_OUTSIDE"
"""An environment variable of a program that `command` starts: the inodes of the network and mount
namespaces that it was started from, ``"NET:MNT"``."""

# Interfaces that the kernel creates in every new namespace if their module is loaded (see
# net.core.fb_tunnels_only_for_init_net).
_FALLBACK_INTERFACES = {
    "lo", "erspan0", "gre0", "gretap0", "ip6_vti0", "ip6erspan0", "ip6gre0", "ip6tnl0", "ip_vti0",
    "sit0", "tunl0",
}  # fmt: skip

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x0002_0000, 0x1000_0000, 0x4000_0000  # sched.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000  # mount.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # sockios.h, if.h

# IPv6 settings for a new namespace. Without them the packets of duplicate address detection and
# router solicitation would come between those that a test waits for.
_QUIET = {"accept_dad": "0", "router_solicitations": "0", "addr_gen_mode": "1"}

_HELP = (
    "run as root, or let root allow namespaces: sysctl user.max_user_namespaces=10000 "
    "(and kernel.apparmor_restrict_unprivileged_userns=0 where that exists)"
)


class NoNamespaceError(AiotunError):
    """A private namespace can't be created. The command prints the message as a single line."""


def _libc_call(name: str, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _inode(kind: str = "net") -> int:
    return os.stat(f"/proc/thread-self/ns/{kind}").st_ino


@contextlib.contextmanager
def isolated() -> Iterator[int]:
    """Move the calling thread into a new network namespace, and back at the end of the block.

    The namespace has only `lo`, which is up. IPv6 sends nothing unasked in it: there is no
    duplicate address detection, no router solicitation and no automatic link-local address. Threads
    and processes that are started inside the block are in the namespace, too; sockets and devices
    that were opened before stay outside. ``/sys/class/net`` still shows the interfaces outside: use
    `socket.if_nameindex` instead.

    Yields:
        An fd of the namespace, closed at the end.

    Raises:
        NotPermittedError: the thread lacks CAP_SYS_ADMIN. The block did not run. An ordinary user
            can't get that capability in a running program: see `isolated_run` and the pytest
            plugin.

    *Concurrency*: a namespace belongs to a thread. All tasks that run in this thread are inside
    until the block ends.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        outside = _inode()
        try:
            _libc_call("unshare", _CLONE_NEWNET)
        except OSError as error:
            raise NotPermittedError(
                error.errno,
                "creating a network namespace needs CAP_SYS_ADMIN; run as root, or use "
                "aiotun.testing.isolated_run, or pytest with --aiotun-isolate",
            ) from error
        try:
            if _inode() == outside:
                raise RuntimeError("unshare(2) did not move this thread; nothing was run")
            _prepare()
            inside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield inside
            finally:
                os.close(inside)
        finally:
            setns(before)
    finally:
        os.close(before)


def _prepare() -> None:
    """Bring `lo` up and keep IPv6 quiet in the thread's network namespace."""
    for where in ("all", "default"):
        for key, value in _QUIET.items():
            # A kernel without IPv6 has no such files, and in a container they may be read-only.
            # Then there are more packets, but isolation does not depend on them.
            with contextlib.suppress(OSError):
                Path(f"/proc/sys/net/ipv6/conf/{where}/{key}").write_text(value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0))
        (flags,) = struct.unpack_from("H", request, 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def enter() -> None:
    """Move this process into new network and mount namespaces; it can't come back.

    If the user is not root, they are inside a new user namespace. sysfs is mounted again, so that
    ``/sys/class/net`` shows the interfaces inside.

    Raises:
        NotPermittedError: this machine does not allow it; the process must end.
        RuntimeError: the process has more than one thread, or the kernel did not move it.
    """
    outside = _inode()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(
            f"only a process with one thread can enter new namespaces; this one has {threads}"
        )
    uid, gid = os.geteuid(), os.getegid()
    try:
        try:
            _libc_call("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
        except PermissionError:
            _libc_call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")  # the kernel requires it before gid_map
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        # Make all mounts private, so that what we mount from now on does not show outside.
        _libc_call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        _libc_call("mount", b"sysfs", b"/sys", b"sysfs", flags, None)
        _prepare()
    except OSError as error:
        raise NotPermittedError(
            error.errno, f"private namespaces are not allowed here ({error.strerror}); {_HELP}"
        ) from error
    if _inode() == outside:
        raise RuntimeError("unshare(2) did not move this process; nothing was run")
    os.environ[MARKER] = f"{outside}:{_inode()}"


def inside(env: Mapping[str, str]) -> bool:
    """Return whether this process is in the namespaces that the variable `MARKER` names.

    False if the variable is not set.

    Raises:
        RuntimeError: the variable is set, but names other namespaces.
    """
    if MARKER not in env:
        return False
    outer, _, inner = env[MARKER].partition(":")
    if inner != str(_inode()) or outer == inner:
        raise RuntimeError(
            f"{MARKER} is set, but this is not the network namespace that aiotun made; unset it"
        )
    return True


def command(program: Sequence[str], *, mounts: bool = False) -> list[str]:
    """Return the command that runs a program in a private network namespace, with unshare(1).

    Run the command with the variables that `environment` returns. The program must first call
    `check_inside`.

    Args:
        program: a command.
        mounts: whether the program gets a private mount namespace, too.

    Raises:
        NoNamespaceError: this machine lacks unshare(1), or does not allow namespaces.
    """
    if sys.platform != "linux":
        raise NoNamespaceError("aiotun needs Linux; other systems have no such TUN devices")
    unshare = shutil.which("unshare")
    if unshare is None:
        raise NoNamespaceError("unshare(1) is missing; install util-linux")
    # In a container even root may lack CAP_SYS_ADMIN, which -n needs. The user namespace of -r
    # grants it.
    ways = ["-n", "-rn"] if os.geteuid() == 0 else ["-rn"]
    said = ""
    for way in (f"{way}m" if mounts else way for way in ways):
        done = run([unshare, way, sys.executable, "-ISc", ""])
        if done.returncode == 0:
            return [unshare, way, "--", *program]
        said = said or done.stderr.strip().removeprefix("unshare: ")
    if said.startswith("failed to execute"):  # unshare(1) did create the namespace
        raise NoNamespaceError(
            f"{sys.executable} can't be started by this user ({said}); "
            "use a Python that is installed where every user can execute it"
        )
    raise NoNamespaceError(
        f"this machine does not let this user create a network namespace ({said}); {_HELP}"
    )


def environment() -> dict[str, str]:
    """Return the environment to run the result of `command` with."""
    return {**os.environ, OUTSIDE: f"{_inode('net')}:{_inode('mnt')}"}


def check_inside(*, mounts: bool = False) -> None:
    """Check that this process is in a private namespace, so that it can safely create devices.

    The environment alone is no proof: this compares the namespaces, and looks at the interfaces.

    Args:
        mounts: whether the mounts must be private, too.

    Raises:
        NoNamespaceError: this is not a private namespace.
    """
    net, _, mnt = os.environ.get(OUTSIDE, "").partition(":")
    outside = net in ("", str(_inode("net"))) or (mounts and mnt in ("", str(_inode("mnt"))))
    if outside or {name for _, name in socket.if_nameindex()} - _FALLBACK_INTERFACES:
        raise NoNamespaceError(f"{OUTSIDE} is set, but this is not a private namespace; unset it")


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and return its exit status and its output.

    Like `subprocess.run`, which may leave the child unreaped when Ctrl-C interrupts it.
    """
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def main(command: list[str]) -> None:
    """Enter new namespaces, then replace this process by a command (execve)."""
    try:
        enter()
    except (NotPermittedError, RuntimeError) as error:
        sys.stderr.write(f"aiotun: {getattr(error, 'strerror', None) or error}\n")
        sys.exit(4)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
