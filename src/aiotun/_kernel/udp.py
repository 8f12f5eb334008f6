"""What Linux's UDP sockets have beyond Python's `socket` module; no I/O.

Sources: ``include/uapi/linux/udp.h`` (UDP_SEGMENT, UDP_GRO), ``in.h`` and ``in6.h`` (path MTU,
errors), ``errqueue.h``, ``sock_diag.h`` (SO_MEMINFO) and ``asm-generic/socket.h``.
"""

import re
import socket
import struct

__all__ = [
    "CONTROL_BYTES",
    "EXTENDED_ERROR",
    "INT",
    "LARGEST_DATAGRAM",
    "LARGEST_RUN_BYTES",
    "LARGEST_RUN_DATAGRAMS",
    "MEMINFO",
    "MEMINFO_DROPS",
    "MTU_DISCOVER",
    "ORIGINS_ICMP",
    "PMTUDISC_DONT",
    "RECVERR",
    "SO_MEMINFO",
    "SO_PROTOCOL",
    "SO_RCVBUFFORCE",
    "SO_SNDBUFFORCE",
    "UDP_GRO",
    "UDP_SEGMENT",
    "UINT16",
    "corrupts_full_tails",
]

UDP_SEGMENT, UDP_GRO = 103, 104

INT, UINT16 = struct.Struct("=i"), struct.Struct("=H")

# The longest datagram that fits in an IPv4 packet of 65,535 bytes.
LARGEST_DATAGRAM = 65_507

# The kernel builds a run of datagrams as one packet first. That packet has 65,535 bytes at most, an
# IPv6 header of 40 and a UDP header of 8.
LARGEST_RUN_BYTES = 65_487

# UDP_MAX_SEGMENTS, which was raised to 128 in Linux 6.9.
LARGEST_RUN_DATAGRAMS = 64

# Room for all control messages of one receive. Ours has 4 bytes, but a socket that was made
# elsewhere may have asked for timestamps, addresses and marks.
CONTROL_BYTES = 512

# By family: level and option.
MTU_DISCOVER = {
    socket.AF_INET: (socket.IPPROTO_IP, 10),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23),
}
PMTUDISC_DONT = 0
RECVERR = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}

# errqueue.h: struct sock_extended_err { __u32 ee_errno; __u8 ee_origin, ee_type, ee_code, ee_pad;
# __u32 ee_info, ee_data; }, followed by the address of the host that sent the ICMP message.
EXTENDED_ERROR = struct.Struct("=I4B2I")
ORIGINS_ICMP = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6

SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_PROTOCOL, SO_MEMINFO = 32, 33, 38, 55
# sock_diag.h: SK_MEMINFO_DROPS is the last of nine numbers.
MEMINFO = struct.Struct("=9I")
MEMINFO_DROPS = 8

_FIRST_CORRUPTING, _LAST_CORRUPTING = (7, 0, 0), (7, 1, 4)


def corrupts_full_tails(release: str) -> bool:
    """Whether a kernel corrupts runs of datagrams whose last datagram is as long as the others.

    Linux 7.0 to 7.1.4 do, on some network devices, without an error. This function knows only the
    version: a distribution may have backported the fault to an older kernel, or the fix to one of
    these.

    Args:
        release: the kernel's release, from `os.uname`.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if found is None:
        return False
    version = tuple(int(number or 0) for number in found.groups())
    return _FIRST_CORRUPTING <= version <= _LAST_CORRUPTING
