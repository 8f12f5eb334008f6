"""What a helper process does: it lives in a private network namespace and makes sockets there.

This code is sent to another interpreter (`interpreters`), or run in a fork of the program. So it
uses no other module of aiotun, and only modules that are built into every Python: without `socket`
and `enum` the helper starts in a third less time.

The helper ends when the other end of its socket is closed: by the program, or by the kernel when
the program ends for any reason.

The program sends one line and waits for its answer before it sends the next:

    socket FAMILY TYPE PROTO COUNT      the sockets
    open FLAGS PATH                     the file
    sysfs FLAGS PATH                    the file below /sys, as it is in the network namespace

The answer is ``ok`` with file descriptors, or an errno as text. Before any request, the helper
sends one answer: ``ok`` with the two namespaces, or the step that failed and its errno.
"""

import _socket
import os
import sys
from io import BufferedReader

__all__ = ["main"]

# sched.h
CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000

# mount.h
MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
MS_REC_SLAVE = 0x4000 | 0x80000


def main(requests: BufferedReader) -> None:
    """Make the namespaces, and serve the program until it closes its end of the socket."""
    control = _socket.socket(fileno=os.dup(requests.fileno()))
    try:
        if begin(control):
            mounted = False
            for line in requests:
                if line.startswith(b"sysfs ") and not mounted:
                    mounted = mount_sysfs(control)
                    if not mounted:
                        continue
                do(control, line)
    except OSError:  # the program has ended in the middle of a request
        pass


def begin(control: _socket.socket) -> bool:
    """Make the namespaces and send them to the program; False if the kernel refuses."""
    uid, gid = os.geteuid(), os.getegid()
    os.chdir("/")  # so that this process keeps no file system in use
    # One step at a time: the kernel gives the same errno for limits on either kind of namespace.
    step = "user"
    try:
        unshare(CLONE_NEWUSER)
        # Map the user to root inside. Otherwise the interfaces' files in /sys would belong to the
        # real root. A program that is started there becomes the outside user again (`launch`).
        step = "map"
        write("/proc/self/setgroups", "deny")  # required before gid_map may be written
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
        step = "net"
        unshare(CLONE_NEWNET)
        fds = [open_file(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("user", "net")]
    except OSError as error:
        control.send(f"{step} {error.errno}".encode())
        return False
    answer(control, fds)
    return True


def mount_sysfs(control: _socket.socket) -> bool:
    """Mount the /sys of the network namespace; if that fails, answer with the errno, return False.

    From then on this process has a mount namespace of its own, so no other process sees this mount.
    Mounts and unmounts outside are propagated here, so this process keeps no file system in use.
    """
    try:
        own_sysfs()
    except (OSError, ImportError) as error:
        control.send(str(getattr(error, "errno", None) or 38).encode())  # ENOSYS
        return False
    return True


def own_sysfs() -> None:
    """Give the calling thread a mount namespace of its own, with its network namespace's /sys."""
    import ctypes

    unshare(CLONE_NEWNS)
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, target, flags in (
        (None, b"/", MS_REC_SLAVE),
        # Where /sys shows this network namespace already (in a container, perhaps read-only), the
        # kernel refuses to mount the same file system over itself: EBUSY. So put another between.
        (b"tmpfs", b"/sys", MS_NOSUID_NODEV_NOEXEC),
        (b"sysfs", b"/sys", MS_NOSUID_NODEV_NOEXEC),
    ):
        if libc.mount(b"none", target, kind, ctypes.c_ulong(flags), None) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def do(control: _socket.socket, line: bytes) -> None:
    """Handle one request, and answer it."""
    what, _, rest = line.rstrip(b"\n").partition(b" ")
    fds: list[int] = []
    try:
        if what == b"socket":
            family, kind, proto, count = (int(word) for word in rest.split())
            make_sockets(fds, family, kind, proto, count)
        else:
            flags, _, path = rest.partition(b" ")
            fds.append(open_file(os.fsdecode(path), int(flags)))
    except (OSError, OverflowError) as error:
        if not fds:  # otherwise answer with fewer sockets than requested
            control.send(str(getattr(error, "errno", 22)).encode())  # EINVAL
            return
    answer(control, fds)


def make_sockets(fds: list[int], family: int, kind: int, proto: int, count: int) -> None:
    for _ in range(count):
        fds.append(_socket.socket(family, kind, proto).detach())  # noqa: PERF401 - kept on an error


def answer(control: _socket.socket, fds: list[int]) -> None:
    """Pass file descriptors to the program, and close them here."""
    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    control.sendmsg([b"ok"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)])
    for fd in fds:
        os.close(fd)


def open_file(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def unshare(flags: int) -> None:
    if hasattr(os, "unshare"):  # Python 3.12
        os.unshare(flags)
        return
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
