"""``aiotun dump``: the packets of an interface, one line each."""

import asyncio
import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import BinaryIO

import aiotun
from aiotun.capture import PcapWriter

from .arguments import UsageError
from .describe import describe
from .listen import Listener, Packet, what_is_missing
from .terminal import CYAN, DIM, GREEN, MAGENTA, RED, YELLOW, paint

__all__ = ["DumpError", "Options", "dump"]

_COLOURS = {"TCP": GREEN, "UDP": CYAN, "ICMP": YELLOW, "ICMP6": YELLOW, "ARP": MAGENTA}


class DumpError(aiotun.AiotunError):
    """Dumping failed. The text is the one line that the user sees."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options on the command line, and the command's output."""

    interface: str | None
    new: str | None
    tap: bool
    addresses: Sequence[str]
    write: str | None
    count: int | None
    as_json: bool
    colour: bool
    say: Callable[[str], None]  # prints lines of packets
    note: Callable[[str], None]  # prints messages to stderr
    stdout: BinaryIO | None  # the file for '--write -'; None if stdout is a terminal


def dump(options: Options) -> None:
    """Show packets until `count` is reached, the interface is gone, or a signal arrives.

    Raises:
        UsageError: an option is missing, or the options contradict each other.
        AiotunError: the interface can't be opened or listened on, or it was deleted.
        KeyboardInterrupt: SIGINT arrived.
        SystemExit: SIGTERM arrived.
        BrokenPipeError: the reader of the output has closed it.
    """
    if (options.interface is None) == (options.new is None):
        raise UsageError("give either an interface or '--new NAME'; see 'aiotun dump --help'")
    if options.new is None and (options.tap or options.addresses):
        raise UsageError("'--tap' and '--address' need '--new NAME'")
    if options.write == "-" and options.stdout is None:
        raise UsageError(
            "refusing to write binary packets to a terminal; use '--write FILE' or pipe to "
            "'tshark -r -'"
        )
    asyncio.run(_Dump(options).run())


class _Dump:
    """One run of the command, and what it has counted."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._name = options.interface or options.new or ""
        self._seen = {"in": 0, "out": 0}
        self._left = options.count
        self._frame = False
        self._writer: PcapWriter | None = None
        self._drops: Callable[[], str] = str

    async def run(self) -> None:
        terminated = False
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        try:
            await (self._listen() if self._options.new is None else self._open())
        except asyncio.CancelledError:
            if terminated:
                raise SystemExit(128 + signal.SIGTERM) from None
            raise

    # Sources of packets

    async def _listen(self) -> None:
        with contextlib.closing(Listener(self._name, self._options.note)) as listener:
            self._drops = lambda: f", {listener.drops} dropped by the kernel{listener.others}"
            kind = "Ethernet frames" if listener.mode == "tap" else "IP packets"
            self._options.note(f"listening on {self._name} ({kind}); Ctrl-C ends it")
            for line in await what_is_missing(self._name):
                self._options.note(line)
            await self._show_all(listener.mode == "tap", listener.receive)

    async def _open(self) -> None:
        options = self._options
        opener = aiotun.open_tap if options.tap else aiotun.open_tun
        try:
            opening = opener(options.new, addresses=options.addresses)
        except ValueError as error:
            raise UsageError(str(error)) from error
        async with opening as device:
            self._name = device.name
            with_what = " and ".join(options.addresses) or "no address"
            options.note(f"{device.name} is open ({device.mode}), with {with_what}; Ctrl-C ends it")

            async def receive() -> list[Packet]:
                batch = await device.recv_many()
                now = time.time_ns()
                return [(packet, now, "in") for packet in batch]

            await self._show_all(device.mode == "tap", receive)

    # Output of packets

    async def _show_all(self, frame: bool, receive: Callable[[], Awaitable[list[Packet]]]) -> None:
        self._frame = frame
        options = self._options
        if options.write is not None:
            file = options.stdout if options.write == "-" else options.write
            assert file is not None
            try:
                self._writer = PcapWriter(file, "tap" if frame else "tun", interface=self._name)
            except OSError as error:
                raise DumpError(f"{options.write} can't be written: {error.strerror}") from error
        try:
            while self._left is None or self._left > 0:
                self._show(await receive())
                if self._writer is not None and self._writer.error is not None:
                    break
        except BrokenPipeError:
            await self._finish(quiet=True)
            raise
        except (Exception, asyncio.CancelledError):
            await self._finish()
            raise
        await self._finish()

    def _show(self, batch: Sequence[Packet]) -> None:
        if self._left is not None:
            batch = batch[: self._left]
            self._left -= len(batch)
        lines = []
        for data, time_ns, direction in batch:
            self._seen[direction] += 1
            if self._writer is not None:
                self._writer.write(data, direction=direction, time_ns=time_ns)
            lines.append(self._line(data, time_ns, direction))
        if self._options.write != "-":
            self._options.say("\n".join(lines))

    def _line(self, data: bytes, time_ns: int, direction: str) -> str:
        text, fields = describe(data, frame=self._frame)
        if self._options.as_json:
            return json.dumps({"time_ns": time_ns, "direction": direction, **fields, "line": text})
        seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
        clock = time.strftime("%H:%M:%S", time.localtime(seconds))
        colour = RED if "truncated" in fields else _COLOURS.get(fields.get("protocol", ""))
        on = self._options.colour
        head = paint(f"{clock}.{nanoseconds // 1000:06}", DIM, on)
        return f"{head} {direction.capitalize():<3} {paint(text, colour, on)}"

    async def _finish(self, *, quiet: bool = False) -> None:
        """Close the file, and print the summary unless `quiet`."""
        error: OSError | None = None
        said = ""
        if (writer := self._writer) is not None:
            try:
                await writer.aclose()
            except OSError as failure:
                error = failure
            if isinstance(error, BrokenPipeError) or (
                error is not None and isinstance(error.__cause__, BrokenPipeError)
            ):
                raise BrokenPipeError
            said = f"; {writer.written} written to {self._options.write}"
            if writer.dropped:
                said += f", {writer.dropped} not written because the disk was too slow"
        if quiet:
            return
        came, went = self._seen["in"], self._seen["out"]
        packets = f"{came + went} packet{'s' * (came + went != 1)}"
        self._options.note(f"{packets} ({came} in, {went} out){self._drops()}{said}")
        if error is not None:
            raise DumpError(error.strerror) from error
