"""The kernel's TUN/TAP interface as constants and layouts; no I/O.

Sources: ``include/uapi/linux/if_tun.h`` (flags, ioctls, offloads), ``if.h`` (ifreq),
``if_ether.h``, ``filter.h``, and ``asm-generic/ioctl.h`` with the architectures that differ from
it.
"""

import enum
import os
import struct

__all__ = [
    "ETHTOOL_DRVINFO",
    "ETHTOOL_GDRVINFO",
    "IFF_UP",
    "IFNAMSIZ",
    "IFREQ",
    "IFREQ_SIZE",
    "MAX_QUEUES",
    "MAX_QUEUE_LENGTH",
    "NODE",
    "PI_SIZE",
    "READ_SIZE",
    "SIOCSIFFLAGS",
    "SOCK_FILTER",
    "SOCK_FPROG",
    "TUN_FILTER",
    "VNET_HDR",
    "VNET_HDR_LONG",
    "VNET_HDR_SIZE",
    "VNET_HDR_SIZES",
    "Iff",
    "Ioctl",
    "OffloadFlag",
    "Siocgif",
]

NODE = "/dev/net/tun"

# if.h: IFNAMSIZ includes the terminating NUL, so a name has at most 15 bytes.
IFNAMSIZ = 16

# if_tun.h: MAX_TAP_QUEUES.
MAX_QUEUES = 256

# A queue's ring is one array of pointers, at most 4 MiB long (ptr_ring.h: KMALLOC_MAX_SIZE). The
# kernel rejects a longer ring with EPERM, which looks like a missing privilege.
MAX_QUEUE_LENGTH = 524_288

# if_tun.h: struct tun_pi { __u16 flags; __be16 proto; }.
PI_SIZE = 4

# virtio_net.h: struct virtio_net_hdr, and struct virtio_net_hdr_mrg_rxbuf, which has num_buffers.
# The fields are in the machine's byte order, because aiotun never calls TUNSETVNETLE or
# TUNSETVNETBE.
VNET_HDR = struct.Struct("=BBHHHH")
VNET_HDR_LONG = struct.Struct("=BBHHHHH")
VNET_HDR_SIZE = VNET_HDR.size
VNET_HDR_SIZES = (VNET_HDR_SIZE, VNET_HDR_LONG.size)

# The most that one read can return: a 65,535-byte packet with an Ethernet header and a VLAN tag,
# the packet-info header and the longest virtio-net header. The kernel silently truncates a packet
# that is longer than the buffer.
READ_SIZE = 65_535 + 14 + 4 + PI_SIZE + 24

# if.h: struct ifreq, which has 40 bytes where a pointer has 8. The kernel copies all 40 and would
# read past the end of a shorter buffer.
IFREQ_SIZE = 40
IFREQ = struct.Struct("16sH22x")

# filter.h: struct sock_fprog { unsigned short len; struct sock_filter *filter; }.
SOCK_FPROG = struct.Struct("@HP")

# filter.h: struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; }.
SOCK_FILTER = struct.Struct("@HBBI")

# if_tun.h: struct tun_filter { __u16 flags; __u16 count; __u8 addr[][ETH_ALEN]; }; flag 1 is
# TUN_FLT_ALLMULTI.
TUN_FILTER = struct.Struct("@HH")

# ethtool.h: the fields of struct ethtool_drvinfo that we read: cmd, driver, version, fw_version,
# bus_info.
ETHTOOL_GDRVINFO = 0x3
ETHTOOL_DRVINFO = struct.Struct("@I32s32s32s32s64x")


class Iff(enum.IntFlag):
    """``ifr_flags`` of TUNSETIFF and TUNGETIFF (if_tun.h)."""

    TUN = 0x0001
    TAP = 0x0002
    NAPI = 0x0010
    NO_CARRIER = 0x0040
    MULTI_QUEUE = 0x0100
    ATTACH_QUEUE = 0x0200
    DETACH_QUEUE = 0x0400
    PERSIST = 0x0800
    # IFF_NOFILTER has the same value: TUNGETIFF sets this bit whenever no classic filter is
    # attached. So the bit doesn't tell whether the device has a packet-info header; netlink does.
    NO_PI = 0x1000
    VNET_HDR = 0x4000
    TUN_EXCL = 0x8000


class OffloadFlag(enum.IntFlag):
    """The mask of TUNSETOFFLOAD (if_tun.h)."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40


def _layout(machine: str) -> tuple[int, int, int, int]:
    """Return ``(size bits, none, write, read)``: how this machine lays out an ioctl number.

    asm-generic/ioctl.h has 14 size bits and the directions 0, 1, 2. The architectures below have
    headers of their own.
    """
    if machine.startswith(("mips", "ppc", "powerpc", "sparc", "alpha")):
        return 13, 1, 4, 2
    if machine.startswith("parisc"):
        return 14, 0, 2, 1
    return 14, 0, 1, 2


def number(direction: str, nr: int, size: int, machine: str | None = None) -> int:
    """Compute the number of one of the driver's ioctls (type 'T').

    Args:
        direction: ``"none"``, ``"write"`` (into the kernel) or ``"read"`` (out of it).
        nr: the ioctl's own number, below 256.
        size: the argument's size in bytes, as the header declares it.
        machine: the architecture as ``uname -m`` prints it; the default is this machine's.
    """
    size_bits, none, write, read = _layout(machine or os.uname().machine)
    code = {"none": none, "write": write, "read": read}[direction]
    return code << (16 + size_bits) | size << 16 | ord("T") << 8 | nr


class Ioctl(enum.IntEnum):
    """The driver's ioctls (if_tun.h), numbered for this machine."""

    TUNSETIFF = number("write", 202, 4)
    TUNSETPERSIST = number("write", 203, 4)
    TUNSETOWNER = number("write", 204, 4)
    TUNSETGROUP = number("write", 206, 4)
    TUNGETFEATURES = number("read", 207, 4)
    TUNSETOFFLOAD = number("write", 208, 4)
    TUNSETTXFILTER = number("write", 209, 4)
    TUNGETIFF = number("read", 210, 4)
    TUNGETSNDBUF = number("read", 211, 4)
    TUNSETSNDBUF = number("write", 212, 4)
    TUNATTACHFILTER = number("write", 213, SOCK_FPROG.size)
    TUNDETACHFILTER = number("write", 214, SOCK_FPROG.size)
    TUNGETVNETHDRSZ = number("read", 215, 4)
    TUNSETVNETHDRSZ = number("write", 216, 4)
    TUNSETQUEUE = number("write", 217, 4)
    TUNSETSTEERINGEBPF = number("read", 224, 4)
    TUNSETFILTEREBPF = number("read", 225, 4)
    TUNSETCARRIER = number("write", 226, 4)
    TUNGETDEVNETNS = number("none", 227, 0)


IFF_UP = 0x1
"""The link is up (if.h)."""

SIOCSIFFLAGS = 0x8914
"""Set an interface's flags (sockios.h)."""


class Siocgif(enum.IntEnum):
    """Requests about an interface, sent through any socket in its namespace (sockios.h)."""

    NAME = 0x8910
    FLAGS = 0x8913
    MTU = 0x8921
    INDEX = 0x8933
    ETHTOOL = 0x8946
