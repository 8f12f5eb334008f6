"""Fuzz the parsers.

make fuzz                              every target, some seconds each: a minute in all
make fuzz ARGS=300                     every target, five minutes each
make fuzz ARGS="60 dhcp vxlan"         only these two, a minute each
make fuzz ARGS="--replay FILE"         one input again; its folder's name is the target
make fuzz ARGS=--list                  what each target promises
"""

import argparse
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import _runs
from ._target import ROOT, Target
from .targets import TARGETS

__all__: list[str] = []

Engine = Callable[[Target, float, int], _runs.Run]

_DEFAULT_SECONDS = 2.0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="[SECONDS] [TARGET ...]")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--engine", choices=["atheris", "mutation", "sanitizers"])
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    args.seconds = _DEFAULT_SECONDS
    if args.words and args.words[0].replace(".", "", 1).isdigit():
        args.seconds = float(args.words.pop(0))
    for name in args.words:
        if name not in TARGETS:
            parser.error(f"unknown target {name!r}; the targets are {', '.join(TARGETS)}")
    return args


def main() -> int:
    args = _parse()
    if args.list:
        for target in TARGETS.values():
            print(f"{target.name:17} {target.property}")
        return 0
    if args.replay is not None:
        return _replay(args.replay, args.engine == "sanitizers")
    targets = [TARGETS[name] for name in args.words or TARGETS]
    engine, missing = _engine(args.engine)
    if missing:
        print(f"aiotun: {missing}", file=sys.stderr)
    print(f"seed {args.seed}, {args.seconds:g} s a target")
    for target in list(targets):
        if why := target.missing():
            print(f"aiotun: {target.name}: {why}", file=sys.stderr)
            missing = missing or why
            targets.remove(target)
    runs = [(target, engine) for target in targets if args.engine != "sanitizers"]
    unbuilt = None
    if args.engine in (None, "sanitizers"):
        unbuilt = _runs.build_sanitized()
        if unbuilt is None:
            runs += [(each, _runs.sanitized) for each in targets if each.name in _runs.SANITIZED]
        else:
            print(f"aiotun: {unbuilt}", file=sys.stderr)
    failed = [target.name for target, each in runs if not _report(target, each, args)]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    # A missing tool is an error in CI only.
    return 1 if failed or ((missing or unbuilt) and os.environ.get("CI")) else 0


def _engine(wanted: str | None) -> tuple[Engine, str | None]:
    """Choose an engine, and return what is missing for the better one."""
    if wanted == "mutation":
        return _runs.mutated, None
    if importlib.util.find_spec("atheris") is not None:
        return _runs.guided, None
    return _runs.mutated, (
        "missing: atheris (for CPython on x86-64 only); mutating without coverage guidance"
    )


def _report(target: Target, engine: Engine, args: argparse.Namespace) -> bool:
    """Run one target; print a line, and the details of a finding. Returns whether there is none."""
    run = engine(target, args.seconds, args.seed)
    rate = run.executions / max(run.seconds, 0.001)
    verdict = "FAILED" if run.text else "ok"
    print(
        f"{target.name:17} {run.engine:10} {run.executions:>9} executions {rate:>8.0f}/s  "
        f"{run.note:16} {verdict}",
        flush=True,
    )
    if run.text:
        print(run.text)
        print(f"broken promise: {target.property}\nseed: {args.seed}")
        if run.finding is not None:
            again = f"--replay {run.finding.relative_to(ROOT)}"
            if run.engine == "sanitizers":
                again = f"--engine sanitizers {again}"
            print(f'to run this input again: make fuzz ARGS="{again}"')
    return not run.text


def _replay(path: Path, sanitized: bool) -> int:
    """Try one input. A finding shows as a traceback or a sanitizer's report."""
    name = path.resolve().parent.name
    if name not in TARGETS:
        print(
            f"aiotun: the folder of {path} is not named after a target ({', '.join(TARGETS)})",
            file=sys.stderr,
        )
        return 2
    if sanitized and "AIOTUN_FUZZ_MODULE" not in os.environ:
        if problem := _runs.build_sanitized():
            print(f"aiotun: {problem}", file=sys.stderr)
            return 2
        command = [sys.executable, "-m", "fuzz", "--engine", "sanitizers", "--replay", str(path)]
        return subprocess.run(command, env=_runs.sanitized_environment()).returncode
    TARGETS[name].check(path.read_bytes())
    print(f"{name}: no fault with {path}; the promise is: {TARGETS[name].property}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
