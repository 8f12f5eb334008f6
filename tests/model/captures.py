"""Captures of a device under test, and what must be in their files."""

import collections
import io
import struct

import aiotun
from aiotun.capture import Capture, PcapWriter

from .packets import IN, Fault, Seen, numbers_in

__all__ = ["Recording"]


class Recording:
    """One capture: every packet from its beginning to its end is in the file, or counted."""

    def __init__(self, device: aiotun.Device, out_before: int | None) -> None:
        self._file = io.BytesIO()
        self._writer = PcapWriter(self._file, device.mode)
        self._capture: Capture = device.capture(self._writer)
        self._frame = device.mode == "tap"
        self._raw = device.offload == "raw"
        self._expected: collections.Counter[Seen] = collections.Counter()
        self._out_before = out_before
        self._out_after: int | None = None
        self.unseen = 0  # packets that were received without telling which

    @property
    def active(self) -> bool:
        return not self._capture.stopped

    def expect(self, seen: Seen) -> None:
        """A packet was received."""
        if self.active:
            self._expected[seen] += 1

    def stop(self, out_after: int | None) -> None:
        if self.active:
            self._capture.stop()
            self._out_after = out_after

    def close(self) -> None:
        """Release the writer's thread."""
        self._capture.stop()
        self._writer.close()

    def compare(self) -> None:
        """Raise unless the file has what went by."""
        self.close()
        found: collections.Counter[Seen] = collections.Counter()
        data, at = self._file.getvalue(), 24
        while at < len(data):
            length, original = struct.unpack_from("=II", data, at + 8)
            packet = data[at + 16 : at + 16 + length]
            # A super-packet is recorded without its header, so nothing tells where it is cut.
            if not self._raw:
                for seen in numbers_in(packet, self._frame, False):
                    found[seen] += 1
            at += 16 + length
            if length != original:
                raise Fault("capture", "a packet was cut")
        dropped = self._writer.dropped
        if self._raw:
            return
        came = collections.Counter({s: n for s, n in found.items() if s.direction == IN})
        missing = self._expected - came
        if missing.total() > dropped:
            raise Fault("capture", f"received and not recorded: {list(missing)[:5]}")
        more = came - self._expected
        if more.total() > self.unseen:
            raise Fault("capture", f"recorded and not received: {list(more)[:5]}")
        out = found.total() - came.total()
        if self._out_before is not None and self._out_after is not None:
            sent = self._out_after - self._out_before
            if not out <= sent <= out + dropped:
                raise Fault("capture", f"{sent} packets sent, {out} recorded, {dropped} counted")
