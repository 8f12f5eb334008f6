"""The only caller of ``fcntl.ioctl``: one function an ioctl, errno turned into our errors.

Every function that talks to a queue takes its fd and the interface's name (for the messages) and
blocks for as long as the kernel takes: microseconds, except `attach`, which may wait for the
kernel's networking lock.
"""

import array
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterable, Sequence

from ..errors import (
    AiotunError,
    DeviceBusyError,
    DeviceLostError,
    DeviceMismatchError,
    LinkError,
    NotPermittedError,
    TunUnavailableError,
)
from . import abi, places
from .abi import IFF_UP, Iff, Ioctl, OffloadFlag, Siocgif
from .limits import LIMITS, limit_error, naming_limits

__all__ = [
    "attach",
    "attach_filter",
    "attach_new",
    "get_features",
    "get_flags",
    "get_index",
    "get_mtu",
    "get_name",
    "get_namespace",
    "get_vnet_header_size",
    "is_up",
    "nodev_mount",
    "open_node",
    "set_carrier",
    "set_filter_ebpf",
    "set_group",
    "set_offload",
    "set_owner",
    "set_persist",
    "set_queue",
    "set_sndbuf",
    "set_steering_ebpf",
    "set_tx_filter",
    "set_up",
    "set_vnet_header_size",
]

_INT = struct.Struct("@i")
_FLAGS = struct.Struct("@h")

# What the driver of gVisor, which has little else, refuses with EINVAL.
_NOT_IN_GVISOR = Iff.MULTI_QUEUE | Iff.NAPI | Iff.VNET_HDR

_MAPPED = " (in a user namespace only one that /proc/self/uid_map or gid_map has will do)"


def open_node() -> int:
    """Open /dev/net/tun, close-on-exec and non-blocking; the new fd is the caller's to close.

    The interface will live in the network namespace that the calling thread is in now.

    Raises:
        TunUnavailableError: no node, or no driver behind it.
        NotPermittedError: the node's mode keeps this user out, its mount (nodev), or a container's
            rules for devices.
        ResourceLimitError: no file descriptor is left.
    """
    try:
        return places.open_file(abi.NODE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise NotPermittedError(error.errno, _why_closed(error)) from error
    except OSError as error:
        if error.errno == errno.ENOENT:
            mend = "load the driver with 'modprobe tun', or in a container pass the node in"
            text = f"there is no {abi.NODE}; {mend} ('--device {abi.NODE}')"
        elif error.errno in (errno.ENODEV, errno.ENXIO):
            text = f"no driver stands behind {abi.NODE}; load it with 'modprobe tun'"
        elif error.errno in LIMITS:
            raise limit_error(error.errno, f"could not open {abi.NODE}") from error
        elif error.errno in (errno.EISDIR, errno.ELOOP, errno.ENOTDIR):
            # A container engine makes a directory where it shall mount a node that is not there.
            text = (
                f"{abi.NODE} is not a device node ({error.strerror}); remove it, load the driver "
                "with 'modprobe tun', and for a container pass the node in ('--device "
                f"{abi.NODE}', not as a volume)"
            )
        else:
            raise
        raise TunUnavailableError(error.errno, text) from error


def _why_closed(error: PermissionError) -> str:
    """Say why the node can't be opened: nodev and a container's rules come before its mode."""
    if (place := nodev_mount()) is not None:
        return (
            f"{abi.NODE} can't be opened: it is on a filesystem that is mounted 'nodev'; let root "
            f"run 'mount -o remount,bind,dev {place}', or bind-mount a node that works over it"
        )
    if error.errno == errno.EPERM:
        return (
            f"the rules for devices of this container or service forbid {abi.NODE}; allow it with "
            f"'--device {abi.NODE}' (container) or 'DeviceAllow={abi.NODE} rw' (systemd unit)"
        )
    return (
        f"this user may not open {abi.NODE}; "
        f"let root run 'chmod 0666 {abi.NODE}' (the mode that distributions give it)"
    )


def nodev_mount() -> str | None:
    """The mount point that the node is on, where it is mounted 'nodev'; else None."""
    try:
        if not os.statvfs(abi.NODE).f_flag & os.ST_NODEV:
            return None
    except OSError:
        return None
    place = os.path.realpath(abi.NODE)
    while not os.path.ismount(place) and place != "/":
        place = os.path.dirname(place)
    return place


def attach(fd: int, name: str, flags: Iff) -> str:
    """TUNSETIFF: make `fd` a queue of the interface, which is created where there is none.

    Args:
        fd: from `open_node`.
        name: of at most 15 bytes; may be empty or hold ``%d``, for the kernel to pick.
        flags: one of TUN and TAP, and what else is wanted.

    Returns:
        The name that the interface got.

    Raises:
        NotPermittedError: creating without CAP_NET_ADMIN, or a device that is another user's.
        DeviceBusyError: somebody holds its only queue, all queues are taken, or TUN_EXCL was given
            and it exists.
        DeviceMismatchError: it is of another kind, or differs in multi-queue.
    """
    request = bytearray(abi.IFREQ.pack(_encoded(name), flags))
    try:
        fcntl.ioctl(fd, Ioctl.TUNSETIFF, request, True)
    except OSError as error:
        raise _attach_error(error, fd, name, flags) from error
    return _name(request)


def attach_new(fd: int, name: str, flags: Iff) -> str:
    """TUNSETIFF with TUN_EXCL: as `attach`, but only to an interface that this creates.

    Raises:
        DeviceBusyError: it exists already.
        NotPermittedError, DeviceMismatchError: as `attach`.
    """
    try:
        return attach(fd, name, flags | Iff.TUN_EXCL)
    except DeviceMismatchError:
        # gVisor's driver does not know the flag. Looking the name up has to do there, though
        # another program may come between.
        if _exists(name):
            raise DeviceBusyError(errno.EBUSY, _there_already(name), name) from None
        return attach(fd, name, flags)


def _attach_error(error: OSError, fd: int, name: str, flags: Iff) -> Exception:
    code, shown = error.errno, name or "a new interface"
    if code in (errno.EPERM, errno.EACCES):
        if name and _exists(name):
            text = (
                f"{shown} belongs to another user or group; attach as the one it belongs to, or "
                "let root change that with 'ip tuntap' (owner and group must both fit)"
            )
        else:
            kind = "tap" if flags & Iff.TAP else "tun"
            text = (
                f"creating {shown} needs CAP_NET_ADMIN; run as root or inside 'unshare -rn', or "
                f"let root prepare it: 'ip tuntap add dev {name or kind + '0'} mode {kind} "
                f'user "$USER"\''
            )
        return NotPermittedError(code, text, name or None)
    if code == errno.EBUSY:
        if flags & Iff.TUN_EXCL:
            text = _there_already(shown)
        else:
            text = (
                f"another program holds the only queue of {shown}; end it, or choose another name"
            )
        return DeviceBusyError(code, text, name)
    if code == errno.E2BIG:
        text = f"all {abi.MAX_QUEUES} queues of {shown} are taken; open fewer"
        return DeviceBusyError(code, text, name)
    if code == errno.EINVAL:
        return DeviceMismatchError(code, _mismatch(fd, name, flags), name or None)
    if code == errno.ENOTTY:
        return TunUnavailableError(code, f"{abi.NODE} is not the TUN/TAP driver's node")
    if code in LIMITS:
        return limit_error(code, f"could not attach to {shown}", name or None)
    return error


def _there_already(name: str) -> str:
    return f"{name} exists already; delete it, choose another name, or leave out exclusive"


def _mismatch(fd: int, name: str, flags: Iff) -> str:
    wanted = "TAP" if flags & Iff.TAP else "TUN"
    kind = get_kind(name)
    if kind is None:
        if flags & _NOT_IN_GVISOR and not _tells_features(fd):
            return (
                f"the TUN/TAP driver of this system can't make {name or 'an interface'} with "
                f"{flags & _NOT_IN_GVISOR!r} (gVisor's can't); open it without offload, napi and "
                "multi_queue, and with one queue"
            )
        return f"the kernel refuses {name!r} as the name of a new interface; choose another"
    if kind != wanted.lower():
        what = f"a {kind.upper()} device" if kind in ("tun", "tap") else "another kind of interface"
        return f"{name} is {what}, not a {wanted} device; choose another name"
    if flags & Iff.MULTI_QUEUE:
        return f"{name} is a single-queue device; open it with queues=1 and without multi_queue"
    return f"{name} is a multi-queue device; open it with multi_queue=True"


def get_flags(fd: int, name: str | None = None) -> tuple[str, Iff]:
    """TUNGETIFF: the interface's present name and its flags (mind NO_PI: see `Iff`).

    Raises:
        DeviceLostError: the interface is gone, or `fd` was never attached.
        OSError: `fd` is something else altogether (ENOTTY, EBADF).
    """
    request = bytearray(abi.IFREQ_SIZE)
    try:
        fcntl.ioctl(fd, Ioctl.TUNGETIFF, request, True)
    except OSError as error:
        raise _common(error, name, "be asked for its flags") from error
    return _name(request), Iff(abi.IFREQ.unpack(request)[1])


def get_features(fd: int) -> Iff:
    """TUNGETFEATURES: the flags that this driver knows; `fd` need not be attached."""
    argument = bytearray(_INT.size)
    _by_pointer(fd, Ioctl.TUNGETFEATURES, argument, "the driver", "tell its features")
    return Iff(_INT.unpack(argument)[0])


def _tells_features(fd: int) -> bool:
    try:
        get_features(fd)
    except AiotunError:
        return False
    return True


def get_namespace(fd: int) -> int | None:
    """TUNGETDEVNETNS: an fd of the interface's network namespace, which is the caller's to close.

    Returns:
        None where the kernel does not tell: without CAP_NET_ADMIN there, or before Linux 5.2.
    """
    try:
        return fcntl.ioctl(fd, Ioctl.TUNGETDEVNETNS)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EINVAL, errno.ENOTTY):
            return None
        raise _common(error, None, "be asked for its namespace") from error


def set_persist(fd: int, name: str, on: bool) -> None:
    """TUNSETPERSIST: keep the interface after its last queue is closed, or stop keeping it."""
    _by_value(fd, Ioctl.TUNSETPERSIST, int(on), name, "change its persistence")


def set_owner(fd: int, name: str, uid: int) -> None:
    """TUNSETOWNER: the user who may attach without CAP_NET_ADMIN."""
    _by_value(fd, Ioctl.TUNSETOWNER, uid, name, f"take user {uid} as its owner{_MAPPED}")


def set_group(fd: int, name: str, gid: int) -> None:
    """TUNSETGROUP: the group that may attach without CAP_NET_ADMIN."""
    _by_value(fd, Ioctl.TUNSETGROUP, gid, name, f"take group {gid} as its group{_MAPPED}")


def set_offload(fd: int, name: str, mask: OffloadFlag) -> None:
    """TUNSETOFFLOAD: what the kernel may leave to us in the packets it hands over.

    Raises:
        DeviceMismatchError: this kernel does not know one of the bits.
    """
    _by_value(fd, Ioctl.TUNSETOFFLOAD, int(mask), name, f"take the offloads {mask!r}")


def get_vnet_header_size(fd: int, name: str) -> int:
    """TUNGETVNETHDRSZ: the size in bytes of the virtio-net header, used or not."""
    argument = bytearray(_INT.size)
    _by_pointer(fd, Ioctl.TUNGETVNETHDRSZ, argument, name, "tell its header size")
    return int(_INT.unpack(argument)[0])


def set_vnet_header_size(fd: int, name: str, size: int) -> None:
    """TUNSETVNETHDRSZ: the size in bytes of the virtio-net header."""
    _by_pointer(fd, Ioctl.TUNSETVNETHDRSZ, _INT.pack(size), name, f"take a {size}-byte header")


def set_sndbuf(fd: int, name: str, size: int) -> None:
    """TUNSETSNDBUF: how many bytes may be under way before a write says EAGAIN."""
    _by_pointer(fd, Ioctl.TUNSETSNDBUF, _INT.pack(size), name, f"take a {size}-byte send buffer")


def set_queue(fd: int, name: str, on: bool) -> None:
    """TUNSETQUEUE: let the kernel choose this queue, or stop it; packets waiting here are dropped.

    Raises:
        DeviceMismatchError: a single-queue device, or the queue is in that state already.
    """
    flags = Iff.ATTACH_QUEUE if on else Iff.DETACH_QUEUE
    request = abi.IFREQ.pack(b"", flags)
    what = "enable" if on else "disable"
    what += " this queue: it is in that state already, or the device is not a multi-queue one"
    try:
        _by_pointer(fd, Ioctl.TUNSETQUEUE, request, name, what)
    except DeviceMismatchError as error:
        if error.errno == errno.EINVAL:
            get_flags(fd, name)  # where the interface is gone the kernel says EINVAL here, too
        raise


def set_carrier(fd: int, name: str, on: bool) -> None:
    """TUNSETCARRIER: plug the cable in, or pull it."""
    _by_pointer(fd, Ioctl.TUNSETCARRIER, _INT.pack(int(on)), name, "change its carrier")


def set_steering_ebpf(fd: int, name: str, program: int) -> None:
    """TUNSETSTEERINGEBPF: the fd of a socket-filter program that picks the queue; -1 drops it."""
    _by_pointer(fd, Ioctl.TUNSETSTEERINGEBPF, _INT.pack(program), name, "take that BPF program")


def set_filter_ebpf(fd: int, name: str, program: int) -> None:
    """TUNSETFILTEREBPF: the fd of a socket-filter program that says how much to keep."""
    _by_pointer(fd, Ioctl.TUNSETFILTEREBPF, _INT.pack(program), name, "take that BPF program")


def attach_filter(fd: int, name: str, program: Sequence[tuple[int, int, int, int]] | None) -> None:
    """TUNATTACHFILTER, or TUNDETACHFILTER for None: a classic BPF program (filter.h); TAP only."""
    if program is None:
        request = abi.SOCK_FPROG.pack(0, 0)
        _by_pointer(
            fd, Ioctl.TUNDETACHFILTER, request, name, "drop its filter (only a TAP has one)"
        )
        return
    code = array.array("B", b"".join(abi.SOCK_FILTER.pack(*step) for step in program))
    address, _ = code.buffer_info()
    request = abi.SOCK_FPROG.pack(len(program), address)
    _by_pointer(
        fd, Ioctl.TUNATTACHFILTER, request, name,
        "take that filter (only a TAP takes one, and the kernel checks the program)",
    )  # fmt: skip


def set_tx_filter(fd: int, name: str, macs: Iterable[bytes], all_multicast: bool) -> None:
    """TUNSETTXFILTER: hand over only frames for these 6-byte addresses; for none: every frame."""
    addresses = list(macs)
    header = abi.TUN_FILTER.pack(int(all_multicast), len(addresses))
    request = bytearray(header + b"".join(addresses))
    _by_pointer(
        fd, Ioctl.TUNSETTXFILTER, request, name, "take a transmit filter (only a TAP takes one)"
    )


def get_index(name: str, asker: socket.socket | None = None) -> int:
    """SIOCGIFINDEX: the interface's index in the namespace of the calling thread, or of `asker`.

    Raises:
        LinkError: there is no such interface here.
        ResourceLimitError: no file descriptor is left to ask with.
    """
    return int(_INT.unpack_from(_ask(name, Siocgif.INDEX, asker), 16)[0])


def get_name(index: int) -> str:
    """SIOCGIFNAME: the name of an interface of the calling thread's namespace.

    Raises:
        OSError: there is none with that number.
    """
    request = bytearray(struct.pack("@16xi20x", index))
    with places.make_socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        fcntl.ioctl(asker, Siocgif.NAME, request, True)
    return _name(request)


def get_mtu(name: str) -> int:
    """SIOCGIFMTU: the link's IP MTU in bytes.

    Raises:
        LinkError: there is no such interface here.
        ResourceLimitError: no file descriptor is left to ask with.
    """
    return int(_INT.unpack_from(_ask(name, Siocgif.MTU), 16)[0])


def is_up(name: str) -> bool:
    """SIOCGIFFLAGS: whether the link is up (IFF_UP).

    Raises:
        LinkError: there is no such interface here.
    """
    return bool(_FLAGS.unpack_from(_ask(name, Siocgif.FLAGS), 16)[0] & IFF_UP)


def set_up(name: str) -> None:
    """SIOCSIFFLAGS: bring an interface up.

    Raises:
        OSError: the kernel refuses (EPERM), or there is no such interface.
    """
    with _asker(name) as asker:
        request = bytearray(abi.IFREQ.pack(_encoded(name), 0))
        fcntl.ioctl(asker, Siocgif.FLAGS, request, True)
        flags = abi.IFREQ.unpack(request)[1] | IFF_UP
        fcntl.ioctl(asker, abi.SIOCSIFFLAGS, abi.IFREQ.pack(_encoded(name), flags))


def get_kind(name: str) -> str | None:
    """ETHTOOL_GDRVINFO: ``"tun"``, ``"tap"`` or what else; None: no such interface."""
    info = array.array("B", abi.ETHTOOL_DRVINFO.pack(abi.ETHTOOL_GDRVINFO, b"", b"", b"", b""))
    address, _ = info.buffer_info()
    request = bytearray(struct.pack("@16sP16x", _encoded(name), address))
    with _asker(name) as asker:
        try:
            fcntl.ioctl(asker, Siocgif.ETHTOOL, request, True)
        except OSError as error:
            # gVisor has no such question: EOPNOTSUPP, whether there is an interface or not.
            if error.errno == errno.ENODEV or not _exists(name):
                return None
            return "other"
    _, driver, _, _, bus = abi.ETHTOOL_DRVINFO.unpack(info.tobytes())
    text = (bus if driver.rstrip(b"\0") == b"tun" else driver).split(b"\0")[0].decode()
    return text or "other"


def _exists(name: str) -> bool:
    try:
        get_index(name)
    except LinkError:
        return False
    return True


def _ask(name: str, question: Siocgif, asker: socket.socket | None = None) -> bytes:
    if asker is None:
        with _asker(name) as made:
            return _ask(name, question, made)
    request = bytearray(abi.IFREQ.pack(_encoded(name), 0))
    try:
        fcntl.ioctl(asker, question, request, True)
    except OSError as error:
        text = f"there is no interface {name} in this network namespace"
        raise LinkError(error.errno, text, name) from error
    return bytes(request)


def _asker(name: str) -> socket.socket:
    """Open a socket: any will do to ask for an interface by its name."""
    with naming_limits(f"could not ask the kernel about {name}", name):
        return places.make_socket(socket.AF_INET, socket.SOCK_DGRAM)


def _by_value(fd: int, request: Ioctl, value: int, name: str, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, value)
    except OSError as error:
        raise _refused(error, fd, name, what) from error


def _by_pointer(fd: int, request: Ioctl, data: bytes | bytearray, name: str, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, data, isinstance(data, bytearray))
    except OSError as error:
        raise _refused(error, fd, name, what) from error


def _refused(error: OSError, fd: int, name: str, what: str) -> AiotunError | OSError:
    """As `_common`, where the request may not be known at all."""
    if error.errno != errno.ENOTTY:
        return _common(error, name, what)
    if stat.S_ISSOCK(os.fstat(fd).st_mode):  # Queue.from_fd, or the testing kit's memory pair
        text = f"{name} has no interface in the kernel, and can't {what}; open_tun makes one"
        return DeviceMismatchError(errno.EOPNOTSUPP, text, name)
    text = f"{name} can't {what}: the TUN/TAP driver of this system lacks that (gVisor's does)"
    return DeviceMismatchError(error.errno, text, name)


def _common(error: OSError, name: str | None, what: str) -> AiotunError | OSError:
    """The errnos that mean the same at every ioctl of an attached queue."""
    code, shown = error.errno, name or "the device"
    if code in (errno.EPERM, errno.EACCES):
        text = f"{shown} may not {what}: this user lacks CAP_NET_ADMIN; run as root"
        return NotPermittedError(code, text, name)
    if code == errno.EBADFD:
        text = f"{shown} is gone (somebody deleted it); close this device and open it again"
        return DeviceLostError(code, text, name)
    if code == errno.EINVAL:
        text = f"{shown} cannot {what}; look at its kind, its queues and the kernel's version"
        return DeviceMismatchError(code, text, name)
    if code in LIMITS:
        return limit_error(code, f"{shown} could not {what}", name)
    return error


def _name(request: bytearray) -> str:
    return bytes(request[: abi.IFNAMSIZ]).split(b"\0", 1)[0].decode(errors="surrogateescape")


def _encoded(name: str) -> bytes:
    # Not os.fsencode: in a locale that is not UTF-8 it would name another interface than netlink.
    return name.encode(errors="surrogateescape")
