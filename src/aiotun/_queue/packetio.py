"""What a device and a queue have in common: the packet methods and what they promise."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import itertools
import operator
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from .._kernel.words import DecodeErrors, Mode
from .._packets.runs import LIMIT, Layout, Pool, Run, check_run, place
from ..errors import DeviceClosedError, PacketDecodeError
from .closing import AsyncClosing
from .port import BUDGET
from .runio import NoBufferError, checked_layout, receive_run

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..decode import IP, IP6, Ethernet
    from .port import PacketFormat

__all__ = [
    "BUDGET",
    "Arriving",
    "Decoded",
    "PacketIO",
    "PacketStats",
    "checked_limit",
    "send_all",
    "take_one",
]

T = TypeVar("T")
P = TypeVar("P")


@dataclasses.dataclass(frozen=True, slots=True)
class PacketStats:
    """What only this program can know of its packets, counted since the queue was opened.

    Traffic itself is counted by the kernel: ``await device.link.stats()``.
    """

    truncated: int = 0
    """Packets cut because the buffer given to `recv_into` was too small."""
    refused: int = 0
    """Packets that `send` could not give to the kernel because of what they are."""
    undecodable: int = 0
    """Packets that `decoded` could not read."""
    split_fallbacks: int = 0
    """Super-packets that the kernel refused, sent as segments instead."""
    segments_dropped: int = 0
    """Packets that were still waiting when their queue was closed: segments of a super-packet, or
    what `recv_run` had read and kept for the next run."""

    def __add__(self, other: PacketStats) -> PacketStats:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return PacketStats(*(a + b for a, b in zip(mine, theirs, strict=True)))


class PacketIO(AsyncClosing):
    """Packets in and out. A TUN device carries IP packets, a TAP device Ethernet frames.

    *Cancellation*: a cancelled call has taken nothing from the device and lost nothing. Receiving
    waits until there is something to read, and then reads without another await.

    *Concurrency*: calls may overlap, from any number of tasks of one event loop. Each packet goes
    to exactly one receiver. Receivers are served in the order they began to wait, and one that did
    not wait does not overtake one that does; senders likewise.

    *Fairness*: where packets never run out, a receiver lets the loop turn once after every
    256 packets, or after a larger batch, before it reads and never after.

    *Loops*: the first coroutine that is awaited binds a queue to its event loop. Another loop is a
    `RuntimeError`. A `send` that need not wait raises it only if the queue's loop is in asyncio's
    debug mode, because asking which loop is running takes time for every packet. Nothing here may
    be called from another thread.

    *Closing*: what waits when the device is closed here raises `DeviceClosedError`; when the
    interface goes away, `DeviceLostError`. So does every later call.
    """

    __slots__ = ()

    # Receiving

    def recv(self) -> Coroutine[Any, Any, bytes]:
        """Receive one whole packet, waiting until there is one.

        While the link is down this waits, too: no packet comes until it is up again.

        Returns:
            One packet (TUN) or frame (TAP), with whatever header the device was opened with.

        Raises:
            DeviceClosedError: closed here, before or while waiting.
            DeviceLostError: the interface went away.
        """
        return self._receive(take_one)

    async def recv_into(self, buffer: Buffer) -> int:
        """Receive one packet into the caller's buffer; see `recv`.

        Args:
            buffer: writable and C-contiguous. It is written to only once a packet has come.

        Returns:
            The packet's length in bytes.

        Raises:
            PacketTruncatedError: the packet is longer than the buffer, which holds its beginning.
                The rest is gone, and counted in `stats`.
            TypeError, ValueError: not such a buffer; nothing was received.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        # Released at the end: else a cancelled task that lives on would keep a bytearray from being
        # resized.
        with memoryview(buffer) as view:
            if view.readonly:
                raise TypeError("recv_into needs a writable buffer, such as a bytearray")
            if not view.c_contiguous:
                raise ValueError("recv_into needs a contiguous buffer, in C's order")
            # A view without a single byte can't be cast, and takes no byte of any packet either.
            with view.cast("B") if view.nbytes else memoryview(bytearray()) as octets:
                return await self._receive(lambda io: io._take_into(octets))

    def recv_many(self, limit: int = 64) -> Coroutine[Any, Any, list[bytes]]:
        """Wait for one packet, then take all that are ready.

        Args:
            limit: how many at most. A batch has no more than 256 packets, or 1,024 with
                ``offload="split"``.

        Returns:
            Between 1 and `limit` packets, in the order they came.

        Raises:
            TypeError, ValueError: `limit` is not an int, or below 1.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        most = checked_limit("recv_many", limit, self._format.batch)
        return self._receive(lambda io: io._take_many(most))

    def recv_run(
        self, pool: Pool, *, before: int = 16, after: int = 16, align: int = 16, limit: int = 45
    ) -> Coroutine[Any, Any, Run]:
        """Receive packets of one pair of addresses into one buffer, without an object for each.

        Waits for a packet, and returns what is ready and fits one run: the segments of a
        super-packet, or packets that come singly, of one size. Only the last may be shorter. What
        ends a run is the first of the next, or of what any other method returns.

        Args:
            pool: where the buffer is from. The run holds it until `Run.release`. While none is
                free, this waits and reads nothing.
            before, after: how many bytes of room are in front of each packet, and behind it.
            align: each packet is padded with zeros to a multiple of so many bytes, but not beyond
                the MTU. The padding is between the packet and the room behind it.
            limit: how many packets at most, up to 256.

        Returns:
            A run whose ``start`` is `before`.

        Raises:
            TypeError, ValueError: an argument is not an int, or is out of range; or the device has
                ``offload="raw"`` or packet information.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        checked = checked_layout(pool, before, after, align, limit)
        if self._header_bytes:
            raise ValueError(
                "recv_run needs packets without a header: offload='off' or 'split', and "
                "packet_info=False"
            )
        return receive_run(
            pool, self._wait_for_buffer, self._receive, lambda io: io._take_run(pool, checked)
        )

    @abc.abstractmethod
    def recv_nowait(self) -> bytes:
        """Receive one packet that is there already.

        Raises:
            BlockingIOError: none is, or a task has been waiting for it.
            DeviceClosedError, DeviceLostError: as `recv`.
        """

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over packets.

        Iteration ends when the device is closed here, also where it was closed before; if the
        device is lost it raises `DeviceLostError`. Any number of tasks may iterate at once, and one
        that was cancelled may start again: nothing is lost in between.
        """
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._receive(take_one)
        except DeviceClosedError:
            raise StopAsyncIteration from None

    def batches(self, limit: int = 64) -> AsyncIterator[list[bytes]]:
        """Iterate over lists of packets, each as `recv_many` gives it; ends as iteration does.

        Raises:
            TypeError, ValueError: `limit` is not an int, or below 1.
        """
        most = checked_limit("batches", limit, self._format.batch)
        return Arriving(self._receive, lambda io: io._take_many(most))

    def decoded(self, errors: DecodeErrors = "skip") -> AsyncIterator[Any]:
        """Iterate over packets as dpkt objects; needs the extra ``aiotun[dpkt]``.

        Args:
            errors: with ``"skip"``, bytes that dpkt cannot read are counted in `stats` and left
                out; with ``"raise"`` they raise, and iteration may go on after it.

        Returns:
            An iterator of `dpkt.ip.IP` and `dpkt.ip6.IP6` for a TUN device, of
            `dpkt.ethernet.Ethernet` for a TAP device. It ends as iteration does.

        Raises:
            ValueError: neither of those two words.
            PacketDecodeError: while iterating, with ``"raise"``; what dpkt raised is chained.
        """
        return Decoded(self, errors)

    # Sending

    @abc.abstractmethod
    def send(self, packet: Buffer) -> Coroutine[Any, Any, None]:
        """Send one whole packet; waits only while the kernel's send buffer is full.

        The kernel handles a packet before the call returns, but what becomes of it there is not
        reported: a packet that its IP layer dislikes is dropped and counted by the interface.

        Args:
            packet: any bytes-like object; begins with whatever header the device was opened with.

        Raises:
            LinkDownError: the link is down, and the packet was not sent.
            PacketError: the kernel takes no such packet: empty, neither IPv4 nor IPv6 (TUN),
                shorter than an Ethernet header (TAP), or longer than any packet can be.
            DeviceClosedError, DeviceLostError: as `recv`.

        *Cancellation*: a cancelled call has sent nothing.
        """

    def send_many(self, packets: Iterable[Buffer]) -> Coroutine[Any, Any, int]:
        """Send packets, in order within each flow; waits only while the send buffer is full.

        With ``offload="split"`` packets of one flow are merged, also if packets of other flows are
        between them, so they may overtake those. Otherwise all packets are sent in order.

        After every 256 packets, or 1,024 with ``offload="split"``, the loop gets a turn. An
        iterable is asked for so many at a time.

        Returns:
            How many were sent, which is all of them.

        Raises:
            LinkDownError, PacketError, DeviceClosedError, DeviceLostError: as `send`. Whatever is
                raised, also a cancellation, has two more attributes. `sent` is how many packets
                were sent. `unsent` is a list of the others, in order, beginning with the packet
                that could not be sent. Without ``offload="split"`` it is ``packets[sent:]``. If the
                kernel refuses a packet, all packets before it were sent, and none after it. If
                `packets` has no length (a generator, for example), `unsent` has only those that
                were taken from it.
        """
        return send_all(self._bind, packets, self._send_at_once, self.send, self._format.batch)

    async def send_run(
        self, run: Run, *, before: int = 0, sizes: Sequence[int] | None = None
    ) -> int:
        """Send the packets of a run in order, merged as by `send_many`, without an object for each.

        Nobody may change or release the run before this returns.

        Args:
            run: from `recv_run`, or made by the program.
            before: how many bytes at the beginning of each packet to leave out.
            sizes: how many bytes to send of each packet; by default all that follow `before`.

        Returns:
            How many packets were sent, which is all of them.

        Raises:
            ValueError: not one size for each packet, or a packet would end outside the buffer.
            LinkDownError, PacketError, DeviceClosedError, DeviceLostError: as `send_many`, with
                `sent` and `unsent`.
        """
        check_run(run)
        lengths = run.lengths(before, sizes)
        self._bind()
        start = run.start + before
        left: Sequence[int] = range(run.count)
        if run.count <= LIMIT:
            left = self._send_run_at_once(run.buffer, start, run.stride, lengths)
            if not left:
                return run.count
        sent = run.count - len(left)
        starts = [start + index * run.stride for index in left]
        try:
            return sent + await self.send_many(
                [run.buffer[at : at + lengths[i]] for at, i in zip(starts, left, strict=True)]
            )
        except BaseException as error:
            error.sent += sent  # type: ignore[attr-defined]  # set by send_many
            raise

    @abc.abstractmethod
    def send_nowait(self, packet: Buffer) -> None:
        """Send one packet without waiting; see `send`.

        Raises:
            BlockingIOError: the kernel's send buffer is full, or a task has been waiting for it.
            LinkDownError, PacketError, DeviceClosedError, DeviceLostError: as `send`.
        """

    # Closing

    @abc.abstractmethod
    def close(self) -> None:
        """Close at once; may be called again.

        Tasks that wait are woken with `DeviceClosedError`. The kernel needs about 15 ms for the
        last close of a device, so in a running loop the fds are closed in a thread; a later
        `aclose` waits for that.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close, and wait until the kernel is done with it; may be called again, also at once.

        Raises nothing: what was lost or closed before is closed all the same.

        *Cancellation*: everything is closed all the same, only the waiting ends.
        """

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """Whether this was closed here. A device that was lost is to be closed, too."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """The file descriptor, for `select` and its like; -1 once closed.

        Raises:
            ValueError: a device with several queues has no single one; ask its `queues`.
        """

    @property
    @abc.abstractmethod
    def stats(self) -> PacketStats:
        """A snapshot of what only this program can know; see `PacketStats`."""

    # What the methods above are made of. The _take functions never wait: BlockingIOError.

    @property
    @abc.abstractmethod
    def _mode(self) -> Mode: ...

    @property
    @abc.abstractmethod
    def _format(self) -> PacketFormat:
        """What packets look like here."""

    @property
    def _header_bytes(self) -> int:
        """How many bytes of ours or the kernel's stand before the packet itself."""
        return self._format.header_bytes

    @abc.abstractmethod
    def _receive(self, take: Callable[[PacketIO], T]) -> Coroutine[Any, Any, T]:
        """Call `take` until it has something; wait in between, and before the first call if due.

        It is given whatever has the packets, and asks that for the method only then: while a task
        waits, capturing may have put another in its place.
        """

    @abc.abstractmethod
    def _bind(self) -> object:
        """Check that this belongs to the running loop, and is usable."""

    def _send_at_once(self, packets: list[Buffer]) -> Sequence[int]:
        """Send as many packets as possible without waiting, in order within each flow.

        Raises nothing: the caller meets any error when it sends the first packet that is left by
        itself. An invalid packet is only left first when all before it went, and none after it.

        Returns:
            Where in `packets` those are that are left, in order.
        """
        return range(len(packets))

    def _send_run_at_once(
        self, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        """Send as many packets of a run as possible without waiting, as `_send_at_once`."""
        return self._send_at_once(
            [buffer[start + place * stride :][:length] for place, length in enumerate(lengths)]
        )

    @abc.abstractmethod
    async def _wait_for_buffer(self, pool: Pool) -> None:
        """Wait until the pool of a run's buffers may have one.

        Raises:
            DeviceClosedError, DeviceLostError: as `recv`.
        """

    def _take_run(self, pool: Pool, layout: Layout) -> Run:
        """Take a run; where nothing better is known, of one packet."""
        if not pool.free:
            raise NoBufferError
        packet = self._take()
        buffer = pool.free.pop()
        measures = place(buffer, layout, [packet])
        assert measures is not None
        count, size, last, stride = measures
        return Run(buffer, layout.before, stride, size, last, count, pool)

    @abc.abstractmethod
    def _take(self) -> bytes: ...

    @abc.abstractmethod
    def _take_into(self, octets: memoryview) -> int: ...

    @abc.abstractmethod
    def _take_many(self, limit: int) -> list[bytes]: ...

    @abc.abstractmethod
    def _count_undecodable(self) -> None: ...


def take_one(io: PacketIO) -> bytes:
    """What `recv` has `_receive` call."""
    return io._take()


class Arriving(Generic[T]):
    """Iterates over what `take` gives, until the source is closed here.

    An iterator, not a generator: a generator that was cancelled once would be exhausted.
    """

    __slots__ = ("_receive", "_take")

    def __init__(
        self,
        receive: Callable[[Callable[[Any], T]], Coroutine[Any, Any, T]],
        take: Callable[[Any], T],
    ) -> None:
        self._receive = receive
        self._take = take

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._receive(self._take)
        except DeviceClosedError:
            raise StopAsyncIteration from None


async def send_all(
    bind: Callable[[], object],
    packets: Iterable[P],
    at_once: Callable[[list[P]], Sequence[int]],
    send: Callable[[P], Coroutine[Any, Any, None]],
    batch: int = BUDGET,
) -> int:
    """Send packets, a batch at a time; see `PacketIO.send_many`.

    Args:
        at_once: sends as many as possible without waiting, and raises nothing. It returns where in
            its list those are that are left, in order; see `PacketIO._send_at_once`.
        send: sends one packet, waits if it must, and meets whatever is in the way.
    """
    sent = 0
    chunk: list[P] = []
    chunks = _chunks(packets, batch)
    try:
        bind()
        for chunk in chunks:
            if sent:
                await asyncio.sleep(0)
            while left := at_once(chunk):
                sent += len(chunk) - len(left)
                chunk = [chunk[place] for place in left]  # a copy: the list is the caller's
                await send(chunk[0])
                sent += 1
                del chunk[0]
            sent += len(chunk)
            chunk = []
    except BaseException as error:
        unsent = [*chunk]
        if isinstance(packets, Sized):
            unsent += itertools.chain.from_iterable(chunks)
        error.sent = sent  # type: ignore[attr-defined]  # promised on foreign classes, too
        error.unsent = unsent  # type: ignore[attr-defined]  # likewise
        raise
    return sent


def checked_limit(method: str, limit: object, most: int = BUDGET) -> int:
    """Give how many packets may be taken at once; a limit may be any int from 1."""
    try:
        number = operator.index(limit)  # type: ignore[arg-type]  # this is the check
    except TypeError:
        text = f"{method}'s limit must be an int, not {type(limit).__name__}"
        raise TypeError(text) from None
    if number < 1:
        raise ValueError(f"{method} needs a limit of at least 1, not {number}")
    return min(number, most)


def _chunks(packets: Iterable[P], batch: int) -> Iterator[list[P]]:
    """Give a batch of packets at a time.

    What an iterable gives before it raises is sent first.
    """
    if type(packets) is list and 0 < len(packets) <= batch:
        yield packets  # as nearly always: no need to copy it
        return
    # A list, or the like, is copied: the caller may change it while this waits.
    source = iter(list(packets) if isinstance(packets, Sized) else packets)
    while True:
        chunk: list[P] = []
        failure: Exception | None = None
        try:
            chunk.extend(itertools.islice(source, batch))
        except Exception as error:  # noqa: BLE001 - raised again below
            failure = error
        if chunk:
            yield chunk
        if failure is not None:
            raise failure
        if len(chunk) < batch:
            return


class Decoded:
    """The iterator behind `PacketIO.decoded`."""

    __slots__ = ("_decode", "_raise", "_skip_bytes", "_source")

    def __init__(self, source: PacketIO, errors: DecodeErrors) -> None:
        if errors not in ("skip", "raise"):
            raise ValueError(f"errors is 'skip' or 'raise', not {errors!r}")
        from ..decode import decoder

        self._source = source
        self._raise = errors == "raise"
        self._decode = decoder(source._mode)
        self._skip_bytes = source._header_bytes

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> IP | IP6 | Ethernet:
        while True:
            try:
                packet = await self._source.recv()
            except DeviceClosedError:
                raise StopAsyncIteration from None
            try:
                return self._decode(packet[self._skip_bytes :])
            except PacketDecodeError:
                self._source._count_undecodable()
                if self._raise:
                    raise
