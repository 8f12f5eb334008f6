"""What a child process does before it executes a program in a namespace.

It enters the namespaces, mounts /sys and resolv.conf for them, and then executes the program. This
code is sent to another interpreter (`interpreters`), or called in a fork of the program, so it uses
no other module of aiotun.
"""

import ctypes
import errno
import marshal
import os
import signal
from io import BufferedReader

__all__ = ["become", "enter", "main", "tell"]

# sched.h
CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000

# mount.h
MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
MS_BIND = 0x1000
MS_REC_SLAVE = 0x4000 | 0x80000
MNT_DETACH = 2

# prctl.h and securebits.h
PR_SET_SECUREBITS = 28
SECBIT_NOROOT_LOCKED = 1 | 2

# Sockets of services that resolve names for programs, but in the network namespace outside.
RESOLVERS = (
    "/run/systemd/resolve",
    "/run/nscd",
    "/var/run/nscd",
    "/run/avahi-daemon",
    "/var/run/avahi-daemon",
)


def main(stream: BufferedReader) -> None:
    """Enter the namespaces and execute the program; report a failure through the socket."""
    control = stream.fileno()
    os.set_inheritable(control, False)  # so that it is closed by a successful exec
    step = "enter"
    try:
        user, net, resolv_conf, ids, interruptible, paths, argv, env = marshal.load(stream)
        for fd in (user, net):
            if fd >= 0:
                os.set_inheritable(fd, False)
        enter(user, net, resolv_conf)
        step = "become"
        become(ids)
        step = "exec"
        # Python ignores the first two signals, and was started with SIGINT (Ctrl-C) ignored. The
        # program would inherit that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)[: 2 + interruptible]:
            signal.signal(number, signal.SIG_DFL)
        run(paths, argv, env)
    except OSError as error:
        tell(control, step, error)
    except EOFError:  # the program that started this has ended
        pass
    os._exit(127)


def tell(control: int, step: str, error: OSError) -> None:
    os.write(control, marshal.dumps((step, error.errno, error.strerror, error.filename)))


def enter(user: int, net: int, resolv_conf: bytes | None) -> None:
    """Enter the namespaces, and mount /sys and resolv.conf for them.

    Args:
        user: an fd of the user namespace, or -1.
        net: an fd of the network namespace.
        resolv_conf: the content of /etc/resolv.conf inside; None leaves the file as it is.

    Raises:
        OSError: the kernel refuses; `filename` is the path or the system call.
    """
    uid, gid = os.geteuid(), os.getegid()
    if user >= 0:
        call("setns", user, CLONE_NEWUSER)
    call("setns", net, CLONE_NEWNET)
    try:
        call("unshare", CLONE_NEWNS)
        # Mounts made here are not visible outside, but mounts made outside are visible here.
        mount(b"none", "/", None, MS_REC_SLAVE)
        hide_resolvers()
        if resolv_conf is not None:
            replace_resolv_conf(resolv_conf)
        # The kernel refuses this in a container that hides parts of /sys. Then the program sees the
        # container's /sys.
        mount(b"sysfs", "/sys", b"sysfs", MS_NOSUID_NODEV_NOEXEC)
    except OSError as error:
        if resolv_conf is not None and error.filename != "/sys":
            raise
    if user >= 0:
        become_again(uid, gid)


def become_again(uid: int, gid: int) -> None:
    """Become the same user as outside again, without capabilities.

    In the user namespace the user is root, and a program would have all capabilities there. So the
    program gets another user namespace inside that one.
    """
    call("unshare", CLONE_NEWUSER)
    write("/proc/self/setgroups", b"deny")  # required before gid_map may be written
    write("/proc/self/uid_map", b"%d 0 1" % uid)
    write("/proc/self/gid_map", b"%d 0 1" % gid)
    # Without this, a program that root starts would have all capabilities inside, too.
    call("prctl", PR_SET_SECUREBITS, SECBIT_NOROOT_LOCKED, 0, 0, 0)


def hide_resolvers() -> None:
    """Hide the sockets of services that resolve names in the network namespace outside."""
    for path in RESOLVERS:
        if os.path.isdir(path) and not os.path.islink(os.path.dirname(path)):
            keep = resolv_conf_in(path)
            mount(b"tmpfs", path, b"tmpfs", MS_NOSUID_NODEV_NOEXEC)
            for name, text in keep:
                write(name, text)


def resolv_conf_in(path: str) -> list[tuple[str, bytes]]:
    """Return the file that /etc/resolv.conf links to, and its content, if it is in this folder."""
    real = os.path.realpath("/etc/resolv.conf")
    if os.path.dirname(real) != path or not os.path.exists(real):
        return []
    with open(real, "rb") as file:
        return [(real, file.read())]


def replace_resolv_conf(text: bytes) -> None:
    """Bind-mount another file over /etc/resolv.conf."""
    real = os.path.realpath("/etc/resolv.conf")
    if not os.path.exists(real):
        raise OSError(errno.ENOENT, "there is no file to put resolv_conf over", real)
    # The file needs a file system: mount one over /proc, which always exists, and unmount it again
    # at once. The file stays bound.
    mount(b"tmpfs", "/proc", b"tmpfs", MS_NOSUID_NODEV_NOEXEC)
    write("/proc/resolv.conf", text)
    mount(b"/proc/resolv.conf", real, None, MS_BIND)
    call("umount2", b"/proc", MNT_DETACH)


def write(path: str, text: bytes) -> None:
    with open(path, "wb") as file:
        file.write(text)


def become(ids: tuple[int | None, int | None, list[int] | None]) -> None:
    """Become another user or group, as `subprocess` does."""
    user, group, extra = ids
    if extra is not None:
        os.setgroups(extra)
    if group is not None:
        os.setregid(group, group)
    if user is not None:
        os.setreuid(user, user)


def run(paths: list[bytes], argv: list[bytes], env: dict[bytes, bytes]) -> None:
    """Execute the first of these programs that exists; raise the same error as `subprocess`."""
    said = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in paths:
        try:
            os.execve(path, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            said = error
    raise OSError(said.errno, said.strerror, argv[0])


def mount(source: bytes, target: str, kind: bytes | None, flags: int) -> None:
    try:
        call("mount", source, target.encode(), kind, ctypes.c_ulong(flags), None)
    except OSError as error:
        raise OSError(error.errno, f"mount: {error.strerror}", target) from None


def call(name: str, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
