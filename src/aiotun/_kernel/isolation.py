"""Private network namespaces: for a thread, for this process, or for a program that is started.

A thread that has CAP_SYS_ADMIN can go into a new network namespace and come back (`isolated`). An
ordinary user gets that capability only in a user namespace. It takes a whole process with a single
thread, and there is no way back: `enter` moves such a process, and `command` starts a program by
unshare(1).

Everything here fails closed: where a namespace can't be had, nothing is run in the one outside.
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
"""In the environment of a process in namespaces of its own: the inodes of the network namespaces
outside and inside, ``"OUTSIDE:INSIDE"``."""

OUTSIDE = "AIOTUN_DEMO_OUTSIDE"
"""In the environment of what `command` starts: the inodes of the network and mount namespaces that
it came from, ``"NET:MNT"``."""

# What the kernel puts into every new namespace by itself, where it has the module (for
# net.core.fb_tunnels_only_for_init_net).
_BY_ITSELF = {
    "lo", "erspan0", "gre0", "gretap0", "ip6_vti0", "ip6erspan0", "ip6gre0", "ip6tnl0", "ip_vti0",
    "sit0", "tunl0",
}  # fmt: skip

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x0002_0000, 0x1000_0000, 0x4000_0000  # sched.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000  # mount.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # sockios.h, if.h

# Duplicate address detection, router solicitations and what follows them would come between the
# packets that a test waits for.
_QUIET = {"accept_dad": "0", "router_solicitations": "0", "addr_gen_mode": "1"}

_HELP = (
    "run as root, or let root allow it: sysctl user.max_user_namespaces=10000 "
    "(and kernel.apparmor_restrict_unprivileged_userns=0 where that exists)"
)


class NoNamespaceError(AiotunError):
    """There is no private namespace to be had; the text is the one line that the user sees."""


def _call(name: str, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _inode(kind: str = "net") -> int:
    return os.stat(f"/proc/thread-self/ns/{kind}").st_ino


@contextlib.contextmanager
def isolated() -> Iterator[int]:
    """Give the calling thread a network namespace of its own, and take it back at the end.

    It is empty but for `lo`, which is up, and IPv6 keeps quiet in it: no duplicate address
    detection, no router solicitations, no link-local addresses by themselves. Threads and processes
    that are started inside are in it, too; sockets and devices that were opened before stay where
    they are. ``/sys/class/net`` goes on showing the namespace outside: ask
    `socket.if_nameindex`.

    Yields:
        An fd of the namespace, closed at the end.

    Raises:
        NotPermittedError: the thread lacks CAP_SYS_ADMIN. An ordinary user can't have that from
            within a running program: see `isolated_run`, and the pytest plugin. Nothing was run.

    *Concurrency*: namespaces belong to threads. Tasks that run in this thread meanwhile are inside,
    too.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        outside = _inode()
        try:
            _call("unshare", _CLONE_NEWNET)
        except OSError as error:
            raise NotPermittedError(
                error.errno,
                "a network namespace of one's own takes CAP_SYS_ADMIN; run as root, or use "
                "aiotun.testing.isolated_run, or pytest with --aiotun-isolate",
            ) from error
        try:
            if _inode() == outside:
                raise RuntimeError("unshare(2) has left this thread where it was; nothing is run")
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
    """Bring `lo` up and quieten IPv6 in the thread's network namespace."""
    for where in ("all", "default"):
        for key, value in _QUIET.items():
            # Without IPv6 there are none of these, and in a container they may be read-only:
            # noisier, but not unsafe.
            with contextlib.suppress(OSError):
                Path(f"/proc/sys/net/ipv6/conf/{where}/{key}").write_text(value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0))
        (flags,) = struct.unpack_from("H", request, 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def enter() -> None:
    """Move this process, which has a single thread, into namespaces of its own for good.

    As root network and mount namespaces, else a user namespace around them. sysfs is mounted anew,
    so that ``/sys/class/net`` shows what is inside.

    Raises:
        NotPermittedError: that is not allowed here; the process is to end.
        RuntimeError: it has more than one thread, or is where it was.
    """
    outside = _inode()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"only a process of one thread can move, and this one has {threads}")
    uid, gid = os.geteuid(), os.getegid()
    try:
        try:
            _call("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
        except PermissionError:
            _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")  # else gid_map may not be written
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        # Not to be seen outside, whatever is mounted from now on.
        _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        _call("mount", b"sysfs", b"/sys", b"sysfs", flags, None)
        _prepare()
    except OSError as error:
        raise NotPermittedError(
            error.errno, f"private namespaces are not allowed here ({error.strerror}); {_HELP}"
        ) from error
    if _inode() == outside:
        raise RuntimeError("unshare(2) has left this process where it was; nothing is run")
    os.environ[MARKER] = f"{outside}:{_inode()}"


def inside(env: Mapping[str, str]) -> bool:
    """Whether this process is in the namespaces that the environment speaks of.

    Raises:
        RuntimeError: the environment speaks of others.
    """
    if MARKER not in env:
        return False
    outer, _, inner = env[MARKER].partition(":")
    if inner != str(_inode()) or outer == inner:
        raise RuntimeError(
            f"{MARKER} is set, but this is not the network namespace made by aiotun; unset it"
        )
    return True


def command(program: Sequence[str], *, mounts: bool = False) -> list[str]:
    """Give the command that runs a program in a private network namespace, by unshare(1).

    It needs `environment`, too, and the program begins with `check_inside`.

    Args:
        program: a command.
        mounts: whether it gets a private mount namespace, too.

    Raises:
        NoNamespaceError: this machine lacks something, or forbids it.
    """
    if sys.platform != "linux":
        raise NoNamespaceError("TUN devices of this kind exist on Linux only")
    unshare = shutil.which("unshare")
    if unshare is None:
        raise NoNamespaceError("unshare(1) is missing; install util-linux")
    # In a container even root may lack what -n needs; with -r a user namespace gives it.
    ways = ["-n", "-rn"] if os.geteuid() == 0 else ["-rn"]
    said = ""
    for way in (f"{way}m" if mounts else way for way in ways):
        done = run([unshare, way, sys.executable, "-ISc", ""])
        if done.returncode == 0:
            return [unshare, way, "--", *program]
        said = said or done.stderr.strip().removeprefix("unshare: ")
    if said.startswith("failed to execute"):  # inside, where it had got to
        raise NoNamespaceError(
            f"{sys.executable} can't be started anew by this user ({said}); use a Python that is "
            "installed where everybody may run it"
        )
    raise NoNamespaceError(
        f"this machine lets nobody but root make a network namespace ({said}); {_HELP}"
    )


def environment() -> dict[str, str]:
    """Give the environment for what `command` gives."""
    return {**os.environ, OUTSIDE: f"{_inode('net')}:{_inode('mnt')}"}


def check_inside(*, mounts: bool = False) -> None:
    """Make no device where somebody else's network is, whatever the environment says.

    Args:
        mounts: whether the mounts must be private, too.

    Raises:
        NoNamespaceError: this is no private namespace.
    """
    net, _, mnt = os.environ.get(OUTSIDE, "").partition(":")
    outside = net in ("", str(_inode("net"))) or (mounts and mnt in ("", str(_inode("mnt"))))
    if outside or {name for _, name in socket.if_nameindex()} - _BY_ITSELF:
        raise NoNamespaceError(f"{OUTSIDE} is set, but this is no private namespace; unset it")


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and give what it says.

    As `subprocess.run`, but that leaves a child unreaped where Ctrl-C comes.
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
    """Become a command, in namespaces of its own; `isolated` processes start here."""
    try:
        enter()
    except (NotPermittedError, RuntimeError) as error:
        sys.stderr.write(f"aiotun: {getattr(error, 'strerror', None) or error}\n")
        sys.exit(4)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
