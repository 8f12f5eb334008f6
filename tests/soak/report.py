"""What the soak prints: a status line while it runs, and a table at its end."""

import asyncio
import shutil
import sys
import time

from .gauges import Gauge, measure
from .ledger import Ledger

__all__ = ["Report"]

_EVERY = 2.0  # seconds between two status lines


class Report:
    def __init__(self, seconds: float, seed: int) -> None:
        self._seconds = seconds
        self._begin = time.monotonic()
        self._seed = seed
        self._terminal = sys.stdout.isatty()
        self._loops: dict[str, int] = {}
        print(f"soak: {seconds / 60:g} minutes, seed {seed}", flush=True)

    async def status(self, ledger: Ledger) -> None:
        """Write a status line every two seconds until cancelled; in a terminal only."""
        while self._terminal:
            await asyncio.sleep(_EVERY)
            width = shutil.get_terminal_size().columns - 1  # a line that wraps can't be replaced
            print(f"\r\x1b[K{self._line(ledger, measure())[:width]}", end="", flush=True)

    def end_of_round(self, number: int, loop: str, gauge: Gauge, ledger: Ledger) -> None:
        self._loops[loop] = self._loops.get(loop, 0) + 1
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}round {number + 1:>3} {loop:8}{self._line(ledger, gauge)}", flush=True)

    def _line(self, ledger: Ledger, gauge: Gauge) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        packets = ledger.packets
        return (
            f"{minutes:>3}:{seconds:02} {packets['delivered']:>9} delivered "
            f"{packets['dropped']:>6} dropped {packets['refused']:>5} refused | "
            f"{gauge.fds} fds {gauge.threads} threads {gauge.rss_kib / 1024:.1f} MiB "
            f"{gauge.blocks} objects | {len(ledger.problems)} problems"
        )

    def final(self, ledger: Ledger, history: list[Gauge]) -> None:
        seconds = time.monotonic() - self._begin
        rounds = ", ".join(f"{number} on {loop}" for loop, number in self._loops.items())
        print(f"\n{seconds / 60:.1f} minutes, seed {self._seed}; rounds: {rounds}\n")
        print("| packets | |\n|---|---:|")
        for what in ("sent", "delivered", "dropped", "uncounted", "refused"):
            print(f"| {_PACKETS[what]} | {ledger.packets[what]:,} |")
        print("\n| what was done | |\n|---|---:|")
        for what, number in sorted(ledger.events.items()):
            if number:
                print(f"| {what} | {number:,} |")
        if history:
            self._gauges(history)
        print()
        for problem in ledger.problems:
            print(f"PROBLEM: {problem}")
        print("nothing lost, nothing grew, nothing hung" if not ledger.problems else "FAILED")

    def _gauges(self, history: list[Gauge]) -> None:
        print("\n| after a round | first | middle | last | most |\n|---|---:|---:|---:|---:|")
        moments = [history[0], history[len(history) // 2], history[-1]]
        for what, text in _GAUGES.items():
            values = [getattr(gauge, what) for gauge in moments]
            most = max(getattr(gauge, what) for gauge in history)
            print(f"| {text} | " + " | ".join(f"{each:,}" for each in [*values, most]) + " |")


_PACKETS = {
    "sent": "sent, says the sender",
    "delivered": "delivered, whole and once",
    "dropped": "counted as dropped, by the kernel, a socket or the program",
    "uncounted": "on the way while a link went down, waited for ARP, or was deleted",
    "refused": "refused with an error",
}
_GAUGES = {
    "fds": "file descriptors",
    "threads": "threads",
    "rss_kib": "resident memory, KiB",
    "blocks": "objects of Python",
}
