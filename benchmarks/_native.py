"""Calls packets.c from Python."""

import ctypes
import functools
import os

from ._harness import BenchError, compiled, expect


class Native:
    """The functions of packets.c. Each raises BenchError if a system call fails."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(compiled("packets.c")))
        number, descriptor = ctypes.c_int64, ctypes.c_int
        self._fill = library.fill
        self._fill.argtypes = [descriptor, number]
        self._drain = library.drain
        self._drain.argtypes = [descriptor]
        self._read_all = library.read_all
        self._read_all.argtypes = [descriptor, number, ctypes.POINTER(number)]
        self._write_all = library.write_all
        self._write_all.argtypes = [descriptor, ctypes.c_char_p, number, number]
        self._send_runs = library.send_runs
        self._send_runs.argtypes = [descriptor, number, number, number]
        self._recv_runs = library.recv_runs
        self._recv_runs.argtypes = [descriptor, ctypes.POINTER(number)]
        for function in (
            self._fill,
            self._drain,
            self._read_all,
            self._write_all,
            self._send_runs,
            self._recv_runs,
        ):
            function.restype = number

    def fill(self, sock: int, count: int) -> None:
        """Send that many numbered 84-byte packets."""
        expect("packets sent", _checked("send", self._fill(sock, count)), count)

    def drain(self, sock: int) -> int:
        """Drop the datagrams that wait, and return how many there were."""
        return _checked("recv", self._drain(sock))

    def read_all(self, fd: int, count: int) -> tuple[int, int]:
        """Read that many packets; return nanoseconds and bytes."""
        total = ctypes.c_int64()
        elapsed = _checked("read", self._read_all(fd, count, ctypes.byref(total)))
        return elapsed, total.value

    def write_all(self, fd: int, packet: bytes, count: int) -> int:
        """Write a packet that many times; return nanoseconds."""
        return _checked("write", self._write_all(fd, packet, len(packet), count))

    def send_runs(self, sock: int, size: int, datagrams: int, count: int) -> int:
        """Send runs of datagrams through a connected socket; return nanoseconds."""
        return _checked("sendmsg", self._send_runs(sock, size, datagrams, count))

    def recv_runs(self, sock: int) -> tuple[int, int]:
        """Receive the runs of datagrams that wait; return nanoseconds and bytes."""
        total = ctypes.c_int64()
        elapsed = _checked("recvmsg", self._recv_runs(sock, ctypes.byref(total)))
        return elapsed, total.value


@functools.cache
def native() -> Native:
    return Native()


def _checked(call: str, result: int) -> int:
    if result < 0:
        raise BenchError(f"packets.c: {call}: {os.strerror(-result)}")
    return result
