"""Shows the packets of an interface, one line each.

An interface that exists is listened on: whoever holds it goes on as ever. 'In' and 'Out' are as the
interface sees them then, so that what a program reads from a TUN device goes out. With --new a
device is opened, and what the kernel sends through it is shown and not answered: it comes in, to
this program.
"""

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
    """What can't be done; the text is the one line that the user sees."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for on the command line, and the command's own output."""

    interface: str | None
    new: str | None
    tap: bool
    addresses: Sequence[str]
    write: str | None
    count: int | None
    as_json: bool
    colour: bool
    say: Callable[[str], None]  # lines of packets
    note: Callable[[str], None]  # what is said beside them
    stdout: BinaryIO | None  # where '--write -' goes; None: to a terminal


def dump(options: Options) -> None:
    """Show packets until there were enough, the interface is gone, or a signal comes.

    Raises:
        UsageError: the options make no sense.
        AiotunError: the interface can't be had, or is gone.
        KeyboardInterrupt: SIGINT came.
        SystemExit: SIGTERM came.
        BrokenPipeError: whoever read the lines has gone.
    """
    if (options.interface is None) == (options.new is None):
        raise UsageError("say one interface to listen on, or --new and a name; see 'dump --help'")
    if options.new is None and (options.tap or options.addresses):
        raise UsageError("--tap and --address are for a device opened with --new")
    if options.write == "-" and options.stdout is None:
        raise UsageError("packets are no text for a terminal; '--write FILE', or '| tshark -r -'")
    asyncio.run(_Dump(options).run())


class _Dump:
    """One run, and what it has seen."""

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

    # Where packets come from

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

    # What becomes of them

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
        """Close the file, and say what was seen."""
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
                said += f", {writer.dropped} not: the disk was too slow"
        if quiet:
            return
        came, went = self._seen["in"], self._seen["out"]
        packets = f"{came + went} packet{'s' * (came + went != 1)}"
        self._options.note(f"{packets} ({came} in, {went} out){self._drops()}{said}")
        if error is not None:
            raise DumpError(error.strerror) from error
