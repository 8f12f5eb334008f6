"""Runs an engine on one target: in this process, or in a child that may crash."""

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
from pathlib import Path

from . import _mutating
from ._target import CORPUS, FINDINGS, ROOT, Target

__all__ = [
    "SANITIZED",
    "Run",
    "build_sanitized",
    "guided",
    "mutated",
    "sanitized",
    "sanitized_environment",
]

# The targets that use the C module.
SANITIZED = ("find", "split", "merge", "run", "send-run", "segmenting")

_TIMEOUT = 10  # seconds; an input that takes longer is a finding
_LONGEST = 4096  # bytes of an input


@dataclasses.dataclass
class Run:
    """The result of one target under one engine."""

    engine: str
    seconds: float
    executions: int
    note: str = ""
    """The number of branches reached, or the time of the slowest input."""
    finding: Path | None = None
    text: str = ""
    """The traceback, or the sanitizer's report."""


def mutated(target: Target, seconds: float, seed: int) -> Run:
    """Run our own engine in this process."""
    begin = time.monotonic()
    outcome = _mutating.run(target, seed, seconds=seconds)
    run = Run(
        "mutation",
        time.monotonic() - begin,
        outcome.executions,
        f"slowest {outcome.slowest * 1000:.0f} ms",
    )
    if outcome.failed is not None and outcome.error is not None:
        run.finding = _save(target.name, outcome.failed)
        run.text = "".join(traceback.format_exception(outcome.error))
    return run


def guided(target: Target, seconds: float, seed: int) -> Run:
    """Run atheris in a child."""
    grown = FINDINGS / target.name / "corpus"  # atheris keeps useful inputs here for the next run
    grown.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    before = _findings(target.name)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fuzz._guided", target.name),
            f"-max_total_time={max(1, round(seconds))}",
            f"-seed={seed}",
            f"-timeout={_TIMEOUT}",
            f"-max_len={_LONGEST}",
            f"-artifact_prefix={FINDINGS / target.name}/",
            "-print_final_stats=1",
            *(str(grown), str(CORPUS / target.name)),
        ],
        cwd=ROOT, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    said = done.stdout + done.stderr
    run = Run(
        "atheris", time.monotonic() - begin, _number(r"number_of_executed_units: +(\d+)", said)
    )
    run.note = str(_number(r"cov: (\d+)", said)) + " branches"
    if done.returncode != 0:
        run.finding = next(iter(_findings(target.name) - before), None)
        # atheris prints the exception on stdout. libFuzzer prints the rest, with the input, on
        # stderr.
        _, raised, text = done.stdout.partition(" === Uncaught Python exception: ===\n")
        run.text = text.rstrip() if raised else said[-3000:]
        if run.finding is None:
            run.text += "\n(no input was saved, because the target could not run)"
    return run


def sanitized(target: Target, seconds: float, seed: int) -> Run:
    """Run our own engine on a C module with sanitizers, in a child that they may abort."""
    last = FINDINGS / target.name / "last"
    last.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fuzz._traced", target.name, str(seconds), str(seed), str(last)],
        cwd=ROOT, capture_output=True, text=True, errors="replace", env=sanitized_environment(),
    )  # fmt: skip
    run = Run("sanitizers", time.monotonic() - begin, _number(r"(\d+) executions", done.stdout))
    if done.returncode != 0:
        run.finding = _save(target.name, last.read_bytes())
        run.text = (done.stdout + done.stderr)[-6000:]
    return run


def build_sanitized() -> str | None:
    """Build the C module with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        None, or why this machine can't build it.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    include = sysconfig.get_path("include")
    if compiler is None or not Path(include, "Python.h").exists():
        return "missing: a C compiler and Python's headers"
    FINDINGS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [
            *(compiler, "-g", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
            *("-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
            *("-fno-sanitize-recover=all", "-DFUZZING", f"-I{include}"),
            str(ROOT / "src" / "aiotun" / "_packets" / "_speedups.c"),
            *("-o", str(FINDINGS / "_speedups.so")),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    return None if done.returncode == 0 else f"the C module was not built: {done.stderr}"


def sanitized_environment() -> dict[str, str]:
    """The environment in which the sanitizers see all memory accesses of the C module."""
    compiler = os.environ.get("CC", "cc")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    return {
        **os.environ,
        "AIOTUN_FUZZ_MODULE": str(FINDINGS / "_speedups.so"),
        # AddressSanitizer must be loaded first. Python's own allocator would hide errors from it,
        # hence PYTHONMALLOC.
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }


def _save(name: str, data: bytes) -> Path:
    folder = FINDINGS / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"crash-{hashlib.sha1(data).hexdigest()}"
    path.write_bytes(data)
    return path


def _findings(name: str) -> set[Path]:
    return {path for path in (FINDINGS / name).iterdir() if "-" in path.name}


def _number(pattern: str, text: str) -> int:
    """Return the last number that matches a pattern, else 0."""
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0
