"""Boot other kernels, run aiotun's tests there, and print a table.

python -m tests.kernels                    all parts, on Linux 5.10, 6.1, 6.12 and the newest
python -m tests.kernels --basic 5.10 6.1   the doctor, the demo and every offload mode
python -m tests.kernels --architecture arm64 --basic 6.12
python -m tests.kernels 5.10 --only offload link
python -m tests.kernels 5.10 --qemu --only netstack

The basic parts run in QEMU on a kernel for virtual machines, which has everything that a
distribution's kernel has. QEMU emulates, so a minute on this machine is about ten minutes there.
The other parts run on the same version of User-mode Linux, a kernel that is a program. It is much
faster, but has one processor, and is built without nf_tables for the family inet and without
SOCK_DESTROY. Tests that need these skip there. They run in QEMU with --qemu, for an hour or more.

Two guests run at once (--at-once).

Needs tools/foreign.sh before it (`make test-kernels` does that).
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from ..helpers import ROOT
from .fetching import SUITES, FetchError, Kernel, fetch, fetch_user_mode
from .guests import Part, Result, boot

__all__: list[str] = []

BASIC = [
    Part("doctor", "python3 -m aiotun doctor"),
    Part("doctor, nobody", "as_nobody python3 -m aiotun doctor"),
    Part("demo", "python3 -m aiotun demo"),
    Part("demo, nobody", "as_nobody python3 -m aiotun demo"),
    Part("modes", "tests tests/integration/test_modes.py"),
]
# The tests that depend most on the kernel.
NEAR = [
    "opening", "offload", "offloads", "persistent", "from_fd", "link", "queues", "moving",
    "bridges", "events", "errors", "waiting", "closing", "cancellation", "namespaces", "netstack",
    "netstack_admission", "netstack_udp", "netstack_hostile", "relay", "datagrams", "datagram_runs",
    "runs",
]  # fmt: skip


def _near() -> list[Part]:
    folder = ROOT / "tests/integration"
    return [
        # On one event loop: which one it is makes no difference to the kernel.
        Part(name, f"tests tests/integration/test_{name}.py -k 'not uvloop'")
        for name in NEAR
        if (folder / f"test_{name}.py").exists()
    ]


class Guest(NamedTuple):
    """A kernel to boot, and the parts that it runs."""

    version: str
    kernel: Kernel
    parts: list[Part]


def _guests(args: argparse.Namespace, version: str) -> Iterator[Guest]:
    """The guests for one version; fetches their kernels."""
    near = [] if args.basic else _near()
    user_mode = args.architecture == "amd64" and not args.qemu
    basic = BASIC if user_mode else BASIC + near
    for user, parts in ((False, basic), (True, near if user_mode else [])):
        chosen = [part for part in parts if not args.only or part.name in args.only]
        if chosen:
            kernel = fetch_user_mode(version) if user else fetch(version, args.architecture)
            yield Guest(version, kernel, chosen)


async def _run(
    args: argparse.Namespace, guests: list[Guest], table: dict[str, dict[str, Result]]
) -> None:
    """Run all guests, some of them at once, and put their results into the table."""
    logs = ROOT / "build" / "kernels"
    logs.mkdir(parents=True, exist_ok=True)
    free = asyncio.Semaphore(args.at_once)

    async def run(guest: Guest) -> None:
        async with free:
            release = guest.kernel.release
            log = logs / f"{release}.log"
            kind = "User-mode Linux" if guest.kernel.user_mode else "in QEMU"
            print(f"{release} ({kind}): its output is in {log.relative_to(ROOT)}", flush=True)
            begin = time.monotonic()
            limit = args.minutes * 60
            results = await boot(guest.kernel, args.architecture, guest.parts, limit, log)
            print(f"{release}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
            _show_failures(results)
            table[guest.version].update(results)

    # So that the guests end, too.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with asyncio.TaskGroup() as group:
        for guest in guests:
            group.create_task(run(guest))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=", ".join(SUITES))
    parser.add_argument("--basic", action="store_true", help="no pytest files but the modes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--qemu", action="store_true", help="all parts in QEMU")
    parser.add_argument("--architecture", default="amd64", help="amd64 or arm64")
    parser.add_argument("--minutes", type=float, default=30, help="the limit for each guest")
    parser.add_argument("--at-once", type=int, default=2, metavar="GUESTS", help="default: 2")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {part.name for part in BASIC + _near()}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    try:
        guests = [each for version in args.versions or SUITES for each in _guests(args, version)]
    except FetchError as error:
        print(f"aiotun: {error}", file=sys.stderr)
        return 2
    # Filled before the run, so that the rows are in this order.
    table: dict[str, dict[str, Result]] = {guest.version: {} for guest in guests}
    for guest in guests:
        table[guest.version].update((part.name, Result()) for part in guest.parts)
    try:
        asyncio.run(_run(args, guests, table))
    except asyncio.CancelledError:
        return 143
    print()
    _show(table)
    return int(any(each.status != 0 for results in table.values() for each in results.values()))


def _show_failures(results: dict[str, Result]) -> None:
    for name, result in results.items():
        for line in result.output.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(f"  {name}: {line}")


def _show(table: dict[str, dict[str, Result]]) -> None:
    """Print the results as a table in Markdown."""
    rows = [["part", *table], ["---"] * (len(table) + 1)]
    names = dict.fromkeys(name for results in table.values() for name in results)
    rows += [[name, *(str(results[name]) for results in table.values())] for name in names]
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
