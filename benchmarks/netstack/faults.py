"""What `aiotun run --delay` and `--drop` do, measured by the program inside."""

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._contenders import Contender
from .._harness import BenchError, Row, Table, expect, in_turn
from ._contenders import RUN
from ._outside import FAR, TARGET, Outside

NAMES = (RUN,)
DELAY, DROP = 50, 5  # milliseconds and percent, in each direction
PINGS, DATAGRAMS = 20, 10_000  # a run
BOTH = 100 * (1 - (1 - DROP / 100) ** 2)  # percent lost on the way there or back: 9.75

# Prints how many datagrams came back. The pauses keep the sockets' buffers from overflowing.
DATAGRAM_SENDER = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((sys.argv[1], 7004))
count, came = int(sys.argv[2]), set()
def receive(timeout):
    sock.settimeout(timeout)
    try:
        while True:
            came.add(sock.recv(64))
    except (BlockingIOError, TimeoutError):
        pass
for number in range(count):
    sock.send(b"%d" % number)
    if number % 20 == 19:
        receive(0.002)
receive(1)
print(len(came))
"""


class Command:
    """`aiotun run` with an option, and what its command is told about the network."""

    def __init__(self, contender: Contender) -> None:
        *self._run, end = contender.command
        expect("the end of the options", end, "--")
        self._seed = 0

    def output(self, option: str, value: int, *command: str) -> str:
        """Return the output of a command. Each has a seed of its own."""
        self._seed += 1
        words = [*self._run, option, str(value), "--seed", str(self._seed), "--", *command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"aiotun run {option} {value}: {done.stderr.strip() or done.stdout}")
        return done.stdout

    def round_trip(self) -> float:
        """Return the mean of pings in milliseconds."""
        ping = ("ping", "-q", "-c", str(PINGS), "-i", "0.05", TARGET)
        *_, last = self.output("--delay", DELAY, *ping).splitlines()
        return float(last.split("=")[1].split("/")[1])  # rtt min/avg/max/mdev = 1/2/3/4 ms

    def lost(self) -> float:
        """Return how many percent of the datagrams did not come back."""
        # FAR, because the server there answers from the address of its device.
        words = (sys.executable, "-c", DATAGRAM_SENDER, FAR, str(DATAGRAMS))
        return 100 * (1 - int(self.output("--drop", DROP, *words)) / DATAGRAMS)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")
    with contextlib.ExitStack() as stack:
        Outside(stack)
        command = Command(contenders[0])
        found = in_turn({"delay": command.round_trip, "drop": command.lost}, runs)
    for option, samples, unit, wanted, most in (
        (f"--delay {DELAY}: a ping", found["delay"], "ms", 2 * DELAY, 2.0),
        (f"--drop {DROP}: of {DATAGRAMS} datagrams and echoes", found["drop"], "%", BOTH, 0.5),
    ):
        away = [abs(statistics.median(samples) - wanted)]
        what = f"`aiotun run {option}"
        rows = [
            Row("measured", unit, samples),
            Row(f"the median is away from {wanted:g} by", unit, away, target=most),
        ]
        yield Table("netstack", "asyncio", what.replace(":", "`:"), rows)
