"""A fuzzing engine that needs nothing installed, and does not look at the code an input reaches.

It runs where atheris can't: under sanitizers, and on machines that atheris does not support. It
also runs in `make test`, because it always gives the same few thousand inputs.
"""

import random
import time
from collections.abc import Iterator

from ._target import Target

__all__ = ["Outcome", "inputs", "run"]

# Bytes that have a meaning in many places: versions, protocols, options, lengths, ethertypes.
_TELLING = (
    *(bytes([each]) for each in (0, 1, 2, 4, 5, 6, 8, 17, 41, 43, 44, 50, 51, 58, 59, 60)),
    *(bytes([each]) for each in (0x45, 0x60, 0x80, 0xFF)),
    b"\x08\0", b"\x08\x06", b"\x86\xdd", b"\x81\0", b"\x88\xa8", b"\x88\x47", b"\x88\x64",
    b"\xff\xff", b"\0\0\0\0", b"\n", b" ", b"=", b"/", b"%", b":", b"-1", b"99999999999",
)  # fmt: skip


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Yield the corpus, then endless mutations of it. The same seed gives the same inputs."""
    chance = random.Random(f"{seed} {target.name}")
    seeds = target.seeds()
    yield from seeds
    while True:
        yield _mutated(chance, seeds)


def _mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randrange(1, 6)):
        way = chance.randrange(8)
        # Mostly change the front, where the headers are.
        at = chance.randrange(min(len(data), 96 if chance.random() < 0.8 else 4096) + 1)
        if way == 0 and at < len(data):
            data[at] = chance.randrange(256)
        elif way == 1 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif way == 2:
            part = chance.choice(_TELLING)
            data[at : at + len(part)] = part
        elif way == 3:
            del data[at:]
        elif way == 4:
            del data[at : at + chance.randrange(16)]
        elif way == 5:
            data[at:at] = chance.randbytes(chance.randrange(16))
        elif way == 6:
            data[at:at] = data[at : at + chance.randrange(64)]
        else:
            data[at:] = chance.choice(seeds)[chance.randrange(32) :]
    return bytes(data[:4096])


class Outcome:
    """The result of a run: how many inputs, and the one that failed, with the error it raised."""

    def __init__(self) -> None:
        self.executions = 0
        self.slowest = 0.0
        self.failed: bytes | None = None
        self.error: BaseException | None = None


def run(
    target: Target, seed: int, *, seconds: float = float("inf"), most: float = float("inf")
) -> Outcome:
    """Give a target inputs for that many seconds, or that many inputs, until one fails."""
    outcome = Outcome()
    end = time.monotonic() + seconds
    for data in inputs(target, seed):
        begin = time.monotonic()
        if begin >= end or outcome.executions >= most:
            break
        try:
            target.check(data)
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            outcome.failed, outcome.error = data, error
            break
        finally:
            outcome.executions += 1
            outcome.slowest = max(outcome.slowest, time.monotonic() - begin)
    return outcome
