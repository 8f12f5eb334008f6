"""Throws damaged packets at the C module, which must neither fault nor differ from its twins.

    make fuzz-offload ARGS=seconds

It is built with AddressSanitizer and UndefinedBehaviorSanitizer for that. Inputs lie in memory of
just their length, so that a read of one byte too many is seen.
"""

import ctypes
import importlib.util
import random
import sys
import time
from typing import Any

from aiotun import _gso
from aiotun.offload import VnetHeader

from ..test_gso import LINKS, Packet, run_of

KINDS = [0, 1, 3, 4, 5, 0x81, 0x84, 0x85, 0x61]


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("aiotun._speedups", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact(data: bytes) -> memoryview:
    """The same bytes, with nothing behind them that could be read by mistake."""
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data) if data else b""
    return memoryview(buffer).cast("B")


def packets(chance: random.Random) -> list[bytes]:
    first = Packet(
        version=chance.choice((4, 6)),
        protocol=chance.choice(("tcp", "udp")),
        link=chance.choice(list(LINKS.values())),
        fragment=chance.choice((0, 0x4000, 0x2000)),
        flags=chance.choice((0x10, 0x18, 0x11, 0xFF)),
        options=chance.choice((b"", b"", b"\x06\0\1\4\0\0\0\0", b"\x2b\0\1\4\0\0\0\0" * 2)),
        sequence=chance.choice((1, 0xFFFFFFF0)),
    )
    sizes = sorted((chance.randrange(60) for _ in range(chance.randrange(1, 6))), reverse=True)
    return [damaged(chance, bytes(packet)) for packet in run_of(first, sizes)]


def damaged(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((0, 0, 1, 2, 8))):
        changed[chance.randrange(min(len(changed), 90))] = chance.randrange(256)
    return bytes(
        changed[: chance.randrange(len(changed) + 1)] if chance.random() < 0.2 else changed
    )


def attempt(split: Any, data: Any, frame: bool) -> object:
    try:
        return split(data, frame)
    except ValueError as error:
        return str(error)


def once(module: Any, chance: random.Random) -> None:
    batch, frame = packets(chance), chance.random() < 0.6
    merged = module.merge([exact(packet) for packet in batch], frame)
    assert merged == _gso.merge(batch, frame), (batch, frame)
    for whole in merged:
        data = damaged(chance, whole) if chance.random() < 0.5 else whole
        assert attempt(module.split, exact(data), frame) == attempt(_gso.split, data, frame), data
    header = VnetHeader(
        chance.randrange(4), chance.choice(KINDS), 0, chance.choice((0, 1, 7, 65535)),
        chance.randrange(80), chance.choice((2, 6, 16, 65535)),
    )  # fmt: skip
    data = header.pack() + chance.choice(batch)
    assert attempt(module.split, exact(data), frame) == attempt(_gso.split, data, frame), data
    initial = chance.choice((0, 0xFFFF, 2**64 - 1, 2**70))
    assert module.checksum(exact(data), initial) == _gso.checksum(data, initial)


def main(path: str, seconds: float) -> None:
    module = load(path)
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    print(f"seed {seed}", flush=True)
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        once(module, chance)
        rounds += 1
    print(f"{rounds} rounds in {seconds:g} s: no fault, no difference")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
