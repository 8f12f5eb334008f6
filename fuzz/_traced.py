"""Runs one target under our own engine, and writes each input to a file before it tries it.

python -m fuzz._traced TARGET SECONDS SEED FILE

A sanitizer may abort this process at any input. The file then contains that input.
"""

import dataclasses
import os
import sys
import traceback

from . import _mutating
from .targets import TARGETS

__all__: list[str] = []


def main(name: str, seconds: str, seed: str, file: str) -> int:
    target = TARGETS[name]
    if why := target.missing():  # before the clock starts, because this may take a while
        print(why)
        return 1
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def check(data: bytes) -> None:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
        target.check(data)

    traced = dataclasses.replace(target, check=check)
    outcome = _mutating.run(traced, int(seed), seconds=float(seconds))
    print(f"{outcome.executions} executions")
    if outcome.error is None:
        return 0
    traceback.print_exception(outcome.error)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
