"""A UDP socket that drops every datagram, and counts them.

A socket filter refuses each datagram just before the kernel would put it into the socket's buffer.
So the buffer can't be full, and nothing needs to read it. The kernel counts each refused datagram,
and each segment of a super-packet separately.

As a program, `python -m benchmarks.peers._sink` answers each line on stdin with the count.
"""

import array
import ctypes
import socket
import struct
import sys

PORT = 9
_SO_ATTACH_FILTER, _SO_MEMINFO = 26, 55
_DROPS = 8  # SK_MEMINFO_DROPS


class Sink:
    """The socket, on port 9 of all addresses."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("", PORT))
        nothing = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)  # return 0
        program = struct.pack("@HP", 1, ctypes.addressof(nothing))
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    @property
    def count(self) -> int:
        """The number of datagrams dropped so far."""
        numbers = array.array("I", self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))
        return numbers[_DROPS]

    def close(self) -> None:
        self._sock.close()


if __name__ == "__main__":
    sink = Sink()
    print("ready sink", flush=True)
    for _ in sys.stdin:
        print(sink.count, flush=True)
