"""The ioctls: one function for each, which turns an errno into one of aiotun's errors.

Every function that talks to a queue takes the queue's fd and the interface's name, which the error
messages contain. It blocks for as long as the kernel takes. That is microseconds, except for
`attach`, which may wait for the kernel's networking lock.
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

# gVisor's driver rejects these flags with EINVAL.
_NOT_IN_GVISOR = Iff.MULTI_QUEUE | Iff.NAPI | Iff.VNET_HDR

_MUST_BE_MAPPED = " (in a user namespace it must be one that /proc/self/uid_map or gid_map maps)"


def open_node() -> int:
    """Open /dev/net/tun, close-on-exec and non-blocking; the caller must close the fd.

    The interface will live in the network namespace that the calling thread is in now.

    Raises:
        TunUnavailableError: the node or its driver is missing.
        NotPermittedError: the node's mode, its mount (nodev) or a container's rules for devices
            don't allow it.
        ResourceLimitError: no file descriptor is left.
    """
    try:
        return places.open_file(abi.NODE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise NotPermittedError(error.errno, _why_not_opened(error)) from error
    except OSError as error:
        if error.errno == errno.ENOENT:
            text = (
                f"{abi.NODE} does not exist; load the driver with 'modprobe tun', or pass the node "
                f"to the container ('--device {abi.NODE}')"
            )
        elif error.errno in (errno.ENODEV, errno.ENXIO):
            text = f"{abi.NODE} has no driver; load it with 'modprobe tun'"
        elif error.errno in LIMITS:
            raise limit_error(error.errno, f"could not open {abi.NODE}") from error
        elif error.errno in (errno.EISDIR, errno.ELOOP, errno.ENOTDIR):
            # A container engine that is told to mount a missing node as a volume creates a
            # directory in its place.
            text = (
                f"{abi.NODE} is not a device node ({error.strerror}); remove it, load the driver "
                "with 'modprobe tun', and pass the node to a container with '--device "
                f"{abi.NODE}', not as a volume"
            )
        else:
            raise
        raise TunUnavailableError(error.errno, text) from error


def _why_not_opened(error: PermissionError) -> str:
    """Return why the node can't be opened, and how to fix that.

    The kernel checks the mount and a container's rules before the node's mode, so this does too.
    """
    if (place := nodev_mount()) is not None:
        return (
            f"{abi.NODE} can't be opened: it is on a filesystem that is mounted 'nodev'; as root, "
            f"run 'mount -o remount,bind,dev {place}', or bind-mount a working node over it"
        )
    if error.errno == errno.EPERM:
        return (
            f"the device rules of this container or service forbid {abi.NODE}; allow it with "
            f"'--device {abi.NODE}' (container) or 'DeviceAllow={abi.NODE} rw' (systemd unit)"
        )
    return (
        f"this user has no permission to open {abi.NODE}; as root, run 'chmod 0666 {abi.NODE}' "
        "(the mode that distributions give it)"
    )


def nodev_mount() -> str | None:
    """Return the mount point that the node is on, if it is mounted 'nodev'; otherwise None."""
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
    """TUNSETIFF: make `fd` a queue of the interface, which is created if it does not exist.

    Args:
        fd: from `open_node`.
        name: at most 15 bytes; if it is empty or contains ``%d``, the kernel picks the name.
        flags: either TUN or TAP, and any other flags.

    Returns:
        The name that the interface got.

    Raises:
        NotPermittedError: the interface must be created and CAP_NET_ADMIN is missing, or the
            device belongs to another user.
        DeviceBusyError: another program holds the only queue, all queues are taken, or the
            interface exists and TUN_EXCL was given.
        DeviceMismatchError: the interface is of another kind, or differs in multi-queue.
    """
    request = bytearray(abi.IFREQ.pack(_encoded(name), flags))
    try:
        fcntl.ioctl(fd, Ioctl.TUNSETIFF, request, True)
    except OSError as error:
        raise _attach_error(error, fd, name, flags) from error
    return _decoded_name(request)


def attach_new(fd: int, name: str, flags: Iff) -> str:
    """TUNSETIFF with TUN_EXCL: create an interface and attach `fd` to it.

    Raises:
        DeviceBusyError: the interface exists already.
        NotPermittedError, DeviceMismatchError: as `attach`.
    """
    try:
        return attach(fd, name, flags | Iff.TUN_EXCL)
    except DeviceMismatchError:
        # gVisor's driver rejects TUN_EXCL. There we look the name up instead, although another
        # program may create the interface between the look-up and `attach`.
        if _exists(name):
            raise DeviceBusyError(errno.EBUSY, _exists_already(name), name) from None
        return attach(fd, name, flags)


def _attach_error(error: OSError, fd: int, name: str, flags: Iff) -> Exception:
    code, shown = error.errno, name or "a new interface"
    if code in (errno.EPERM, errno.EACCES):
        if name and _exists(name):
            text = (
                f"{shown} belongs to another user or group; attach as its owner, or let root "
                "change that with 'ip tuntap' (if it has an owner and a group, both must match)"
            )
        else:
            kind = "tap" if flags & Iff.TAP else "tun"
            text = (
                f"creating {shown} needs CAP_NET_ADMIN; run as root or inside 'unshare -rn', or "
                f"let root create it: 'ip tuntap add dev {name or kind + '0'} mode {kind} "
                f'user "$USER"\''
            )
        return NotPermittedError(code, text, name or None)
    if code == errno.EBUSY:
        if flags & Iff.TUN_EXCL:
            text = _exists_already(shown)
        else:
            text = (
                f"the only queue of {shown} is in use, by another program or by this one; "
                "close it there, or choose another name"
            )
        return DeviceBusyError(code, text, name)
    if code == errno.E2BIG:
        text = f"all {abi.MAX_QUEUES} queues of {shown} are taken; open fewer"
        return DeviceBusyError(code, text, name)
    if code == errno.EINVAL:
        return DeviceMismatchError(code, _mismatch_text(fd, name, flags), name or None)
    if code == errno.ENOTTY:
        text = f"{abi.NODE} is not the TUN/TAP driver's node; remove it and run 'modprobe tun'"
        return TunUnavailableError(code, text)
    if code in LIMITS:
        return limit_error(code, f"could not attach to {shown}", name or None)
    return error


def _exists_already(name: str) -> str:
    return f"{name} exists already; delete it, choose another name, or leave out exclusive"


def _mismatch_text(fd: int, name: str, flags: Iff) -> str:
    wanted = "TAP" if flags & Iff.TAP else "TUN"
    kind = get_kind(name)
    if kind is None:
        if flags & _NOT_IN_GVISOR and not _reports_features(fd):
            return (
                f"the TUN/TAP driver of this system (gVisor's, for example) can't create "
                f"{name or 'an interface'} with {flags & _NOT_IN_GVISOR!r}; open it with one queue "
                "and without 'offload', 'napi' and 'multi_queue'"
            )
        return f"the kernel rejects {name!r} as the name of a new interface; choose another name"
    if kind != wanted.lower():
        if kind in ("tun", "tap"):
            return (
                f"{name} is a {kind.upper()} device, not a {wanted} device; open it with "
                f"open_{kind}, or choose another name"
            )
        return f"{name} is another kind of interface, not a {wanted} device; choose another name"
    if flags & Iff.MULTI_QUEUE:
        return f"{name} is a single-queue device; open it with queues=1 and without multi_queue"
    return f"{name} is a multi-queue device; open it with multi_queue=True"


def get_flags(fd: int, name: str | None = None) -> tuple[str, Iff]:
    """TUNGETIFF: return the interface's current name and its flags (`Iff` has a note on NO_PI).

    Raises:
        DeviceLostError: the interface was deleted, or `fd` was never attached.
        OSError: `fd` is not an fd of the driver (ENOTTY), or not open (EBADF).
    """
    request = bytearray(abi.IFREQ_SIZE)
    try:
        fcntl.ioctl(fd, Ioctl.TUNGETIFF, request, True)
    except OSError as error:
        raise _common_error(error, name, "report its flags") from error
    return _decoded_name(request), Iff(abi.IFREQ.unpack(request)[1])


def get_features(fd: int) -> Iff:
    """TUNGETFEATURES: return the flags that this driver knows; `fd` need not be attached."""
    argument = bytearray(_INT.size)
    _by_pointer(fd, Ioctl.TUNGETFEATURES, argument, "the driver", "report its features")
    return Iff(_INT.unpack(argument)[0])


def _reports_features(fd: int) -> bool:
    try:
        get_features(fd)
    except AiotunError:
        return False
    return True


def get_namespace(fd: int) -> int | None:
    """TUNGETDEVNETNS: return an fd of the interface's network namespace; the caller must close it.

    Returns:
        None if this thread lacks CAP_NET_ADMIN in that namespace, or before Linux 5.2.
    """
    try:
        return fcntl.ioctl(fd, Ioctl.TUNGETDEVNETNS)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EINVAL, errno.ENOTTY):
            return None
        raise _common_error(error, None, "report its namespace") from error


def set_persist(fd: int, name: str, on: bool) -> None:
    """TUNSETPERSIST: keep the interface after its last queue is closed, or stop keeping it."""
    _by_value(fd, Ioctl.TUNSETPERSIST, int(on), name, "change its persistence")


def set_owner(fd: int, name: str, uid: int) -> None:
    """TUNSETOWNER: set the user who may attach without CAP_NET_ADMIN."""
    _by_value(fd, Ioctl.TUNSETOWNER, uid, name, f"have user {uid} as its owner{_MUST_BE_MAPPED}")


def set_group(fd: int, name: str, gid: int) -> None:
    """TUNSETGROUP: set the group that may attach without CAP_NET_ADMIN."""
    _by_value(fd, Ioctl.TUNSETGROUP, gid, name, f"have group {gid}{_MUST_BE_MAPPED}")


def set_offload(fd: int, name: str, mask: OffloadFlag) -> None:
    """TUNSETOFFLOAD: set what the kernel may leave undone in the packets that it hands over.

    Raises:
        DeviceMismatchError: this kernel does not know one of the bits.
    """
    _by_value(fd, Ioctl.TUNSETOFFLOAD, int(mask), name, f"use the offloads {mask!r}")


def get_vnet_header_size(fd: int, name: str) -> int:
    """TUNGETVNETHDRSZ: return the virtio-net header's size in bytes, even if it is not in use."""
    argument = bytearray(_INT.size)
    _by_pointer(fd, Ioctl.TUNGETVNETHDRSZ, argument, name, "report its header size")
    return int(_INT.unpack(argument)[0])


def set_vnet_header_size(fd: int, name: str, size: int) -> None:
    """TUNSETVNETHDRSZ: set the virtio-net header's size in bytes."""
    _by_pointer(fd, Ioctl.TUNSETVNETHDRSZ, _INT.pack(size), name, f"use a {size}-byte header")


def set_sndbuf(fd: int, name: str, size: int) -> None:
    """TUNSETSNDBUF: set how many bytes may be in the kernel before a write fails with EAGAIN."""
    _by_pointer(fd, Ioctl.TUNSETSNDBUF, _INT.pack(size), name, f"use a {size}-byte send buffer")


def set_queue(fd: int, name: str, on: bool) -> None:
    """TUNSETQUEUE: enable or disable this queue for the packets that the kernel hands over.

    Disabling a queue drops the packets that wait in it.

    Raises:
        DeviceMismatchError: the device has a single queue, or the queue is in that state already.
    """
    flags = Iff.ATTACH_QUEUE if on else Iff.DETACH_QUEUE
    request = abi.IFREQ.pack(b"", flags)
    what = "enable" if on else "disable"
    what += " this queue: it is in that state already, or the device is not a multi-queue one"
    try:
        _by_pointer(fd, Ioctl.TUNSETQUEUE, request, name, what)
    except DeviceMismatchError as error:
        if error.errno == errno.EINVAL:
            get_flags(fd, name)  # raises DeviceLostError: EINVAL also means a deleted interface
        raise


def set_carrier(fd: int, name: str, on: bool) -> None:
    """TUNSETCARRIER: switch the carrier on or off, as if a cable were plugged in or pulled."""
    _by_pointer(fd, Ioctl.TUNSETCARRIER, _INT.pack(int(on)), name, "change its carrier")


def set_steering_ebpf(fd: int, name: str, program: int) -> None:
    """TUNSETSTEERINGEBPF: set the socket-filter program (an fd) that picks the queue; -1: none."""
    _by_pointer(fd, Ioctl.TUNSETSTEERINGEBPF, _INT.pack(program), name, "use that BPF program")


def set_filter_ebpf(fd: int, name: str, program: int) -> None:
    """TUNSETFILTEREBPF: set the socket-filter program (an fd) that drops or cuts packets; -1: none.

    The program returns how many bytes of the packet to keep.
    """
    _by_pointer(fd, Ioctl.TUNSETFILTEREBPF, _INT.pack(program), name, "use that BPF program")


def attach_filter(fd: int, name: str, program: Sequence[tuple[int, int, int, int]] | None) -> None:
    """TUNATTACHFILTER, or TUNDETACHFILTER for None: set a classic BPF program; TAP only."""
    if program is None:
        request = abi.SOCK_FPROG.pack(0, 0)
        _by_pointer(
            fd, Ioctl.TUNDETACHFILTER, request, name, "remove its filter (only a TAP has one)"
        )
        return
    try:
        code = array.array("B", b"".join(abi.SOCK_FILTER.pack(*step) for step in program))
    except (TypeError, struct.error) as error:
        raise TypeError(
            f"each instruction of program must be 4 integers (code, jt, jf, k): {error}"
        ) from error
    address, _ = code.buffer_info()
    # The kernel takes at most 4,096 instructions. It must not see a number that was cut to 16 bits.
    count = min(len(code) // abi.SOCK_FILTER.size, 0xFFFF)
    request = abi.SOCK_FPROG.pack(count, address)
    _by_pointer(
        fd, Ioctl.TUNATTACHFILTER, request, name,
        "use that filter (only a TAP can have one, and the program must be a valid BPF program)",
    )  # fmt: skip


def set_tx_filter(fd: int, name: str, macs: Iterable[bytes], all_multicast: bool) -> None:
    """TUNSETTXFILTER: hand over only frames to these 6-byte addresses; without any, all frames."""
    addresses = list(macs)
    header = abi.TUN_FILTER.pack(int(all_multicast), len(addresses))
    request = bytearray(header + b"".join(addresses))
    _by_pointer(
        fd, Ioctl.TUNSETTXFILTER, request, name, "use a transmit filter (only a TAP can have one)"
    )


def get_index(name: str, sock: socket.socket | None = None) -> int:
    """SIOCGIFINDEX: return the interface's index in the namespace of the thread, or of `sock`.

    Raises:
        LinkError: the namespace has no such interface.
        ResourceLimitError: no file descriptor is left for the request.
    """
    return int(_INT.unpack_from(_request_by_name(name, Siocgif.INDEX, sock), 16)[0])


def get_name(index: int) -> str:
    """SIOCGIFNAME: return the name of an interface of the calling thread's namespace.

    Raises:
        OSError: the namespace has no interface with that index.
    """
    request = bytearray(struct.pack("@16xi20x", index))
    with places.make_socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, Siocgif.NAME, request, True)
    return _decoded_name(request)


def get_mtu(name: str) -> int:
    """SIOCGIFMTU: return the link's IP MTU in bytes.

    Raises:
        LinkError: the calling thread's namespace has no such interface.
        ResourceLimitError: no file descriptor is left for the request.
    """
    return int(_INT.unpack_from(_request_by_name(name, Siocgif.MTU), 16)[0])


def is_up(name: str) -> bool:
    """SIOCGIFFLAGS: return whether the link is up (IFF_UP).

    Raises:
        LinkError: the calling thread's namespace has no such interface.
    """
    return bool(_FLAGS.unpack_from(_request_by_name(name, Siocgif.FLAGS), 16)[0] & IFF_UP)


def set_up(name: str) -> None:
    """SIOCSIFFLAGS: bring an interface up.

    Raises:
        OSError: the kernel refuses (EPERM), or there is no such interface.
    """
    with _request_socket(name) as sock:
        request = bytearray(abi.IFREQ.pack(_encoded(name), 0))
        fcntl.ioctl(sock, Siocgif.FLAGS, request, True)
        flags = abi.IFREQ.unpack(request)[1] | IFF_UP
        fcntl.ioctl(sock, abi.SIOCSIFFLAGS, abi.IFREQ.pack(_encoded(name), flags))


def get_kind(name: str) -> str | None:
    """ETHTOOL_GDRVINFO: return ``"tun"``, ``"tap"`` or the name of another driver.

    None if there is no such interface.
    """
    info = array.array("B", abi.ETHTOOL_DRVINFO.pack(abi.ETHTOOL_GDRVINFO, b"", b"", b"", b""))
    try:
        ask_ethtool(name, info)
    except OSError as error:
        # gVisor does not have this request: it fails with EOPNOTSUPP for any name.
        if error.errno == errno.ENODEV or not _exists(name):
            return None
        return "other"
    _, driver, _, _, bus = abi.ETHTOOL_DRVINFO.unpack(info.tobytes())
    text = (bus if driver.rstrip(b"\0") == b"tun" else driver).split(b"\0")[0].decode()
    return text or "other"


def ask_ethtool(name: str, data: "array.array[int]") -> None:
    """SIOCETHTOOL: make a request about an interface; the kernel writes its answer into `data`.

    Raises:
        OSError: there is no such interface (ENODEV), or the kernel doesn't have the request.
        ResourceLimitError: no file descriptor is left to ask with.
    """
    address, _ = data.buffer_info()
    request = bytearray(struct.pack("@16sP16x", _encoded(name), address))
    with _request_socket(name) as sock:
        fcntl.ioctl(sock, Siocgif.ETHTOOL, request, True)


def _exists(name: str) -> bool:
    try:
        get_index(name)
    except LinkError:
        return False
    return True


def _request_by_name(name: str, question: Siocgif, sock: socket.socket | None = None) -> bytes:
    if sock is None:
        with _request_socket(name) as made:
            return _request_by_name(name, question, made)
    request = bytearray(abi.IFREQ.pack(_encoded(name), 0))
    try:
        fcntl.ioctl(sock, question, request, True)
    except OSError as error:
        text = f"there is no interface {name} in this network namespace; check the name"
        raise LinkError(error.errno, text, name) from error
    return bytes(request)


def _request_socket(name: str) -> socket.socket:
    """Open a socket for a request about an interface; a socket of any kind is good enough."""
    with naming_limits(f"could not ask the kernel about {name}", name):
        return places.make_socket(socket.AF_INET, socket.SOCK_DGRAM)


def _by_value(fd: int, request: Ioctl, value: int, name: str, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, value)
    except OSError as error:
        raise _request_error(error, fd, name, what) from error


def _by_pointer(fd: int, request: Ioctl, data: bytes | bytearray, name: str, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, data, isinstance(data, bytearray))
    except OSError as error:
        raise _request_error(error, fd, name, what) from error


def _request_error(error: OSError, fd: int, name: str, what: str) -> AiotunError | OSError:
    """Build the error for a failed ioctl that the fd or the driver may not have at all."""
    if error.errno != errno.ENOTTY:
        return _common_error(error, name, what)
    if stat.S_ISSOCK(os.fstat(fd).st_mode):  # from Queue.from_fd, or aiotun.testing.memory_pair
        text = f"{name} has no interface in the kernel and can't {what}; use open_tun or open_tap"
        return DeviceMismatchError(errno.EOPNOTSUPP, text, name)
    text = f"{name} can't {what}: the TUN/TAP driver of this system does not support it"
    return DeviceMismatchError(error.errno, text, name)


def _common_error(error: OSError, name: str | None, what: str) -> AiotunError | OSError:
    """Build the error for an errno that means the same for every ioctl of an attached queue."""
    code, shown = error.errno, name or "the device"
    if code in (errno.EPERM, errno.EACCES):
        text = f"{shown} can't {what}: this user lacks CAP_NET_ADMIN; run as root"
        return NotPermittedError(code, text, name)
    if code == errno.EBADFD:
        text = f"{shown} was deleted; close this device and open it again"
        return DeviceLostError(code, text, name)
    if code == errno.EINVAL:
        text = f"{shown} can't {what}; check its kind, its queues and the kernel's version"
        return DeviceMismatchError(code, text, name)
    if code in LIMITS:
        return limit_error(code, f"{shown} could not {what}", name)
    return error


def _decoded_name(request: bytearray) -> str:
    return bytes(request[: abi.IFNAMSIZ]).split(b"\0", 1)[0].decode(errors="surrogateescape")


def _encoded(name: str) -> bytes:
    # Not os.fsencode: in a locale other than UTF-8 it would give other bytes than netlink uses, and
    # so name another interface.
    return name.encode(errors="surrogateescape")
