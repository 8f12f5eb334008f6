"""UDP sockets for tunnels: many datagrams in each call, with the same promises as a queue's.

::

    async with aiotun.open_datagrams(("0.0.0.0", 4500)) as sock:
        async for datagrams, source in sock.batches():
            await sock.send_many(answers_to(datagrams), source)

With UDP_SEGMENT the kernel takes a run of datagrams to one address in one system call, and with
UDP_GRO it hands over a run in one. A program gets single datagrams nevertheless, only faster, as it
gets single packets from a device with ``offload="split"``.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import socket
import types
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ._datagrams.addresses import Address, check_address, shown
from ._datagrams.counts import DatagramStats
from ._datagrams.cutting import segments_for
from ._datagrams.opening import Options, check_options, check_socket, make_port, open_socket
from ._datagrams.port import DatagramPort
from ._kernel import threads
from ._kernel.interface import Interface
from ._kernel.namespaces import NetnsArg
from ._kernel.once import Once
from ._packets.runs import Pool, Run
from ._queue import refusals
from ._queue.packetio import Arriving, checked_limit, send_all
from ._queue.runio import NoBufferError, receive_run
from ._queue.serving import ServedFd
from .errors import AiotunError, DeviceClosedError, DeviceLostError, PacketError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Address",
    "DatagramOpener",
    "DatagramSocket",
    "DatagramStats",
    "open_datagrams",
    "segments_for",
]

# A burst of runs overflows a smaller receive buffer while this program does something else.
_ENOUGH_BYTES = 1 << 20


class DatagramSocket(ServedFd):
    """A UDP socket on the event loop; see `open_datagrams` and `from_socket`.

    *Cancellation*: a cancelled call has taken nothing from the socket and lost nothing, and a
    cancelled `send` has sent nothing.

    *Concurrency*: calls may overlap, from any number of tasks of one event loop. Each datagram goes
    to exactly one receiver. Receivers are served in the order they began to wait, and one that did
    not wait does not overtake one that does; senders likewise.

    *Fairness*: while datagrams keep coming, the loop gets a turn after about every 256 of them.

    *Loops*: the first coroutine that is awaited binds a socket to its event loop. Using another
    loop raises `RuntimeError`. No method may be called from another thread.

    *Closing*: calls that wait when the socket is closed raise `DeviceClosedError`, and so does
    every later call.

    *ICMP errors* never end a socket. Each is counted in `stats`. On a socket of `open_datagrams`
    the next call that sends to the address in question raises it, once, as a `PacketError`, before
    it sends anything, unless a datagram has come from there since. Receiving does not raise it: one
    peer's error must not disturb receiving from others.
    On a connected socket (`from_socket`) the next call raises it, whether it sends or receives. On
    other sockets that were made elsewhere the kernel reports no ICMP errors.
    """

    __slots__ = ("_address", "_family")

    port: DatagramPort

    def __init__(self, fd: int, family: int, port: DatagramPort) -> None:
        # Internal: use open_datagrams or from_socket.
        self._family = family
        self._address: Address = port.address
        super().__init__(fd, Interface(f"UDP socket {shown(self._address)}"), port)

    @classmethod
    def from_socket(cls, sock: socket.socket, *, offload: bool = True) -> Self:
        """Take over an existing UDP socket, for example one from `Namespace.socket`.

        The new object owns the fd; `sock` is detached, as by its method `detach`. If this raises,
        the caller still owns it. The socket's options are kept, except for UDP_GRO, which is set as
        `offload` says. The fd is made non-blocking and close-on-exec.

        Args:
            sock: a UDP socket. It need not be bound or connected.
            offload: as for `open_datagrams`.

        Raises:
            TypeError, ValueError: `sock` is not an open UDP socket over IPv4 or IPv6.
        """
        check_socket(sock)
        os.set_inheritable(sock.fileno(), False)
        port = make_port(sock, offload=bool(offload), queues_errors=False)
        family = sock.family
        return cls(sock.detach(), family, port)

    # Receiving

    def recv(self) -> Coroutine[Any, Any, tuple[bytes, Address]]:
        """Receive one datagram, waiting until there is one.

        Returns:
            The datagram, and the address that it came from.

        Raises:
            DeviceClosedError: closed here, before or while waiting.
            PacketTruncatedError: the kernel could not hand over a datagram whole. The datagram is
                dropped, and counted in `stats`.
            PacketError: an ICMP error, on a connected socket only.
        """
        return self._receive(lambda _: self._take())

    def recv_many(self, limit: int = 64) -> Coroutine[Any, Any, tuple[list[bytes], Address]]:
        """Wait for a datagram, then take those that are ready and came from the same address.

        Args:
            limit: how many datagrams at most. A batch never has more than 256, because the loop
                gets a turn after that many.

        Returns:
            Between 1 and `limit` datagrams, in the order they came, and their source.

        Raises:
            TypeError, ValueError: `limit` is not an int, or below 1.
            DeviceClosedError, PacketTruncatedError, PacketError: as `recv`.
        """
        most = checked_limit("recv_many", limit)
        return self._receive(lambda _: self._take_many(most))

    def recv_nowait(self) -> tuple[bytes, Address]:
        """Receive one datagram without waiting.

        Raises:
            BlockingIOError: there is no datagram, or a task has been waiting for it.
            DeviceClosedError, PacketTruncatedError, PacketError: as `recv`.
        """
        self._check_turn()
        return self.take(lambda _: self._take())

    def recv_many_nowait(self, limit: int = 64) -> tuple[list[bytes], Address]:
        """Receive datagrams without waiting; see `recv_many`.

        Raises:
            BlockingIOError: there is no datagram, or a task has been waiting for it.
            TypeError, ValueError, DeviceClosedError, PacketTruncatedError, PacketError: as
                `recv_many`.
        """
        most = checked_limit("recv_many_nowait", limit)
        self._check_turn()
        return self.take(lambda _: self._take_many(most))

    def __aiter__(self) -> AsyncIterator[tuple[bytes, Address]]:
        """Iterate over datagrams and their sources, each as `recv` returns it.

        Iteration ends when the socket is closed, also if it was closed before. Any number of tasks
        may iterate at once, and a task that was cancelled may start again.
        """
        return Arriving(self._receive, lambda _: self._take())

    def batches(self, limit: int = 64) -> AsyncIterator[tuple[list[bytes], Address]]:
        """Iterate over lists of datagrams and their source, each as `recv_many` returns it.

        Raises:
            TypeError, ValueError: `limit` is not an int, or below 1.
        """
        most = checked_limit("batches", limit)
        return Arriving(self._receive, lambda _: self._take_many(most))

    def recv_run(self, pool: Pool) -> Coroutine[Any, Any, tuple[Run, Address]]:
        """Receive a run of datagrams into one buffer, without an object for each.

        This waits for a datagram, and returns what the kernel hands over in one call: one datagram,
        or several of one size, of which only the last may be shorter. There is no room between
        them.

        Args:
            pool: the buffers. The run holds one until `aiotun.runs.Run.release`. While no buffer is
                free, this waits and reads nothing.

        Returns:
            The run, and the address that its datagrams came from.

        Raises:
            TypeError: `pool` is not an `aiotun.runs.Pool`.
            DeviceClosedError, PacketTruncatedError, PacketError: as `recv`.
        """
        if not isinstance(pool, Pool):
            raise TypeError(f"recv_run needs an aiotun.runs.Pool, not {type(pool).__name__}")
        return receive_run(
            pool, self._wait_for_buffer, self._receive, lambda _: self._take_run(pool)
        )

    def _check_turn(self) -> None:
        self.check_open()
        if self._somebody_waits():
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting for the next datagram")

    def _take(self) -> tuple[bytes, Address]:
        received = self.port.read()
        self._spend(1)
        return received

    def _take_many(self, limit: int) -> tuple[list[bytes], Address]:
        received = self.port.read_many(limit)
        if self.port.drained:
            self._drained = True
        self._spend(len(received[0]))
        return received

    def _take_run(self, pool: Pool) -> tuple[Run, Address]:
        if not pool.free:
            raise NoBufferError
        buffer = pool.free[-1]
        count, size, last, source = self.port.read_run(buffer)
        pool.free.pop()
        if not self._ahead.another():
            self._drained = True
        self._spend(count)
        return Run(buffer, 0, size, size, last, count, pool), source

    # Sending

    async def send(self, data: Buffer, address: Address | None = None) -> None:
        """Send one datagram; waits only while the socket's send buffer is full.

        Args:
            data: any bytes-like object, at most 65,507 bytes.
            address: the destination: an IP address and a port, as a socket tuple. None on a
                connected socket.

        Raises:
            TypeError, ValueError: the address is invalid, or not of the socket's family.
            PacketError: the datagram is too long, the kernel refused it (no route, for example),
                or an ICMP error came for an earlier datagram to this address. It was not sent.
            DeviceClosedError: closed here, before or while waiting.

        *Cancellation*: a cancelled call has sent nothing.
        """
        where = self._destination(address)
        self._bind()
        if not self._senders:
            try:
                self._put(data, where)
                return
            except BlockingIOError:
                pass
        await self._send_waiting(functools.partial(self._put, data, where))

    def send_many(
        self, datagrams: Iterable[Buffer], address: Address | None = None
    ) -> Coroutine[Any, Any, int]:
        """Send datagrams to one address, in order; waits only while the send buffer is full.

        Consecutive datagrams of one size go to the kernel in runs, if the kernel and the path take
        runs. After every 256 datagrams the loop gets a turn; an iterable without a length is asked
        for 256 at a time.

        Returns:
            How many were sent, which is all of them.

        Raises:
            TypeError, ValueError: the address is not valid; the call itself raises it.
            TypeError, PacketError, DeviceClosedError: as `send`. Every exception that awaiting this
                raises, also a cancellation, has two more attributes: `sent`, how many datagrams
                were sent before, and `unsent`, a list of the others, beginning with the one that
                could not be sent. If the iterable has no length, `unsent` has only the datagrams
                that were taken from it.
        """
        where = self._destination(address)
        return send_all(
            self._bind,
            datagrams,
            lambda chunk: self._put_many(chunk, where),
            lambda datagram: self.send(datagram, where),
        )

    async def send_run(self, run: Run, address: Address | None = None) -> int:
        """Send the datagrams of a run to one address, in order, as `send_many`.

        If there is no room between the datagrams, no object is made for each. The run must not be
        changed or released before this returns.

        Returns:
            How many were sent, which is all of them.

        Raises:
            TypeError, ValueError: the address is not valid, or the run ends outside its buffer.
            PacketError, DeviceClosedError: as `send_many`, with `sent`.
        """
        where = self._destination(address)
        if run.start + (run.count - 1) * run.stride + run.last > run.buffer.nbytes:
            raise ValueError(f"{run!r} ends outside its buffer of {run.buffer.nbytes} bytes")
        self._bind()
        sent = 0
        if not self._senders and not (self.port.failed and where in self.port.failed):
            sent = self.port.write_run(run, where)
            if sent == run.count:
                return sent
        try:
            return sent + await self.send_many(run.views()[sent:], where)
        except BaseException as error:
            error.sent += sent  # type: ignore[attr-defined]  # set by send_many
            raise

    def send_nowait(self, data: Buffer, address: Address | None = None) -> None:
        """Send one datagram without waiting; see `send`.

        Raises:
            BlockingIOError: the send buffer is full, or a task has been waiting for it.
            TypeError, ValueError, PacketError, DeviceClosedError: as `send`.
        """
        where = self._destination(address)
        self.check_open()
        if self._senders:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting to send before")
        self._put(data, where)

    def send_many_nowait(self, datagrams: Iterable[Buffer], address: Address | None = None) -> int:
        """Send as many datagrams to one address as possible without waiting, in order.

        Returns:
            How many were sent: fewer than all, or 0, if the send buffer is full or a task has been
            waiting for it. The caller sends the rest again, or drops it.

        Raises:
            TypeError, ValueError, PacketError, DeviceClosedError: as `send_many`, with `sent` and
                `unsent`.
        """
        where = self._destination(address)
        self.check_open()
        waiting = list(datagrams)
        count = len(waiting)
        try:
            while left := self._put_many(waiting, where):
                del waiting[: left.start]
                self.send_nowait(waiting[0], where)  # raises the error that stopped `_put_many`
                del waiting[0]
            waiting = []
        except BlockingIOError:
            pass
        except Exception as error:
            error.sent = count - len(waiting)  # type: ignore[attr-defined]  # as send_many
            error.unsent = waiting  # type: ignore[attr-defined]
            raise
        return count - len(waiting)

    def _destination(self, address: Address | None) -> Address | None:
        if address is None:
            return None
        if not isinstance(address, tuple):
            raise TypeError(f"an address must be a tuple of host and port, got {address!r}")
        return check_address(self._family, address)

    def _put(self, data: Buffer, address: Address | None) -> None:
        port = self.port
        if port.failed and address in port.failed:
            raise self._undelivered(address)
        try:
            port.write(data, address)
        except (BlockingIOError, AiotunError):
            raise
        except OSError as error:
            if address in port.failed:
                raise self._undelivered(address) from None
            raise self._refused(error, address) from error

    def _put_many(self, datagrams: list[Buffer], address: Address | None) -> range:
        """Send as many as possible without waiting; return the indexes of the rest. Can't raise."""
        sent = 0
        failed = self.port.failed
        if not self._senders and self._fd >= 0 and not (failed and address in failed):
            sent = self.port.write_many(datagrams, address)
        return range(sent, len(datagrams))

    # Errors

    def _undelivered(self, address: Address | None) -> PacketError:
        """Make the error for an ICMP error that came for this destination, and forget it."""
        code = self.port.failed.pop(address)
        text = f"an earlier datagram to {shown(address)} was not delivered"
        return PacketError(code, f"{text}: {refusals.meaning(code)}", self._interface.name)

    def _refused(self, error: OSError, address: Address | None) -> AiotunError:
        code = error.errno or 0
        ending = self._ending(error)
        if ending is not None:
            return ending
        self.port.counts.refused[code] += 1
        why = refusals.meaning(code)
        if address is None and code in (errno.EDESTADDRREQ, errno.ENOTCONN):
            why = "the socket is not connected; give an address"
        text = f"the datagram to {shown(address)} was not sent: {why}"
        return PacketError(code, text, self._interface.name)

    def _read_error(self, error: OSError) -> Exception:
        ending = self._ending(error)
        if ending is not None:
            return ending
        self.port.counts.refused[error.errno or 0] += 1
        return refusals.unread(error, self._interface.name)

    def _closed_error(self) -> DeviceClosedError:
        return DeviceClosedError(f"the {self._interface.name} was closed; open another")

    def _lost_error(self, code: int | None) -> DeviceLostError:
        name = self._interface.name
        text = f"the fd of the {name} was closed by something else; close this and open another"
        return DeviceLostError(code, text, name)

    # State

    @property
    def address(self) -> Address:
        """The address that the socket is bound to, as a socket tuple; kept after closing."""
        if self._fd >= 0:
            self._address = self.port.address
        return self._address

    @property
    def receive_bytes(self) -> int:
        """The size in bytes of the receive buffer that the kernel granted.

        Raises:
            DeviceClosedError: closed here.
        """
        self.check_open()
        return self.port.buffer_bytes(socket.SO_RCVBUF)

    @property
    def send_bytes(self) -> int:
        """The size in bytes of the send buffer that the kernel granted.

        Raises:
            DeviceClosedError: closed here.
        """
        self.check_open()
        return self.port.buffer_bytes(socket.SO_SNDBUF)

    @property
    def stats(self) -> DatagramStats:
        """A snapshot of what was counted since this object was made; see `DatagramStats`."""
        self.port.count_overflowed()
        counts = self.port.counts
        values = {each.name: getattr(counts, each.name) for each in dataclasses.fields(counts)}
        values["refused"] = types.MappingProxyType(dict(counts.refused))
        return DatagramStats(**values)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{self!r} can't be copied or pickled; send its fileno() with socket.send_fds, and use "
            "from_socket in the other process"
        )

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd={self._fd}"
        return f"<DatagramSocket {shown(self._address)} {state}>"


class DatagramOpener(Once[DatagramSocket]):
    """What `open_datagrams` returns; await it or use ``async with``, once."""

    __slots__ = ("_options",)
    _opens, _example, _result = DatagramSocket, "open_datagrams(...)", "sock"

    def __init__(self, options: Options) -> None:
        # Internal: use open_datagrams.
        super().__init__()
        self._options = options

    async def _open(self) -> DatagramSocket:
        options = self._options
        made = await threads.run_in(
            options.netns, lambda: open_socket(options), undo=lambda sock: sock.close()
        )
        try:
            port = make_port(made, offload=options.offload, queues_errors=True)
        except BaseException:
            made.close()
            raise
        sock = DatagramSocket(made.detach(), options.family, port)
        granted = sock.receive_bytes
        if options.offload and granted < _ENOUGH_BYTES <= options.receive_bytes:
            warnings.warn(
                f"the kernel granted a receive buffer of {granted} bytes, which loses bursts of "
                f"runs; raise the limit ('sysctl net.core.rmem_max={options.receive_bytes}'), or "
                "run with CAP_NET_ADMIN",
                RuntimeWarning,
                stacklevel=self._level,
            )
        return sock


def open_datagrams(
    address: Address,
    *,
    netns: NetnsArg | None = None,
    mark: int = 0,
    receive_bytes: int = 4 << 20,
    send_bytes: int | None = None,
    reuse_port: bool = False,
    offload: bool = True,
) -> DatagramOpener:
    """Open a UDP socket, bound to an address.

    This checks the arguments and returns an opener. Await it, or use it with ``async with``, which
    also closes the socket at the end. An opener can be used once.

    A socket has one family: an IPv6 socket at ``("::", port)`` does not carry IPv4. Its datagrams
    may be fragmented on their way (IP_PMTUDISC_DONT). A tunnel needs that: otherwise datagrams that
    are too long for the path would be lost without an error.

    Args:
        address: a socket tuple: an IP address (not a name) and a port, ``("0.0.0.0", 4500)``. With
            port 0 the kernel picks a free port; see `DatagramSocket.address`.
        netns: the network namespace: a `Namespace`, a name under /run/netns, a path, or an open fd.
            None means the calling thread's.
        mark: the mark of the packets (SO_MARK), for routing rules; needs CAP_NET_ADMIN.
        receive_bytes: the size of the receive buffer. An ordinary user gets net.core.rmem_max at
            most; `DatagramSocket.receive_bytes` is the size that was granted. Below 1 MiB, which is
            too small for a tunnel's bursts, there is a `RuntimeWarning`.
        send_bytes: the size of the send buffer; None means the system's default.
        reuse_port: let several sockets bind this address and port; the kernel spreads the flows
            over them.
        offload: send and receive runs of datagrams, if the kernel can (UDP_SEGMENT, Linux 4.18;
            UDP_GRO, Linux 5.0). The environment variable ``AIOTUN_UDP_GSO=off`` switches off
            sending runs, for a kernel that corrupts them.

    Returns:
        An opener of a `DatagramSocket`.

    Raises:
        TypeError, ValueError: an invalid argument.

    Awaiting or entering it raises:
        DeviceBusyError: another socket is bound to this address and port.
        NotPermittedError: this user may not use the port, the mark or the namespace.
        LinkError: no interface has this address, or the namespace does not exist.
        ResourceLimitError: no thread can be started, or no file descriptor is left.
        OSError: the kernel makes no such socket (IPv6 is switched off, for example).

    *Cancellation*: no socket is left.

    *Concurrency*: any number may be opened at once.

    Source: udp(7), ip(7), socket(7).
    """
    return DatagramOpener(
        check_options(address, netns, mark, receive_bytes, send_bytes, reuse_port, offload)
    )
