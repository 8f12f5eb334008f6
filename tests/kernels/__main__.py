"""Boot other kernels under QEMU, run aiotun's tests there, and print a table.

python -m tests.kernels                    all parts, on Linux 5.10, 6.1, 6.12 and the newest
python -m tests.kernels --basic 5.10 6.1   the doctor, the demo and every offload mode
python -m tests.kernels --architecture arm64 --basic 6.12
python -m tests.kernels 5.10 --only offload link

Needs QEMU, and tools/foreign.sh before it (`make test-kernels` does both). Everything is emulated,
so a minute on this machine is about ten minutes there.
"""

import argparse
import signal
import sys
import time

from ..helpers import ROOT
from .fetching import SUITES, FetchError, fetch
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
    "netstack_admission", "netstack_udp", "netstack_hostile", "relay", "datagrams",
]  # fmt: skip


def _parts(args: argparse.Namespace) -> list[Part]:
    folder = ROOT / "tests/integration"
    near = [
        Part(name, f"tests tests/integration/test_{name}.py")
        for name in NEAR
        if (folder / f"test_{name}.py").exists()
    ]
    if args.only:
        return [part for part in BASIC + near if part.name in args.only]
    return BASIC if args.basic else BASIC + near


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=", ".join(SUITES))
    parser.add_argument("--basic", action="store_true", help="no pytest files but the modes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--architecture", default="amd64", help="amd64 or arm64")
    parser.add_argument("--minutes", type=float, default=30, help="the limit for each kernel")
    args = parser.parse_args()
    # So that the guest ends, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = _parts(args)
    logs = ROOT / "build" / "kernels"
    logs.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, Result]] = {}
    for version in args.versions or SUITES:
        try:
            kernel = fetch(version, args.architecture)
        except FetchError as error:
            print(f"aiotun: {error}", file=sys.stderr)
            return 2
        begin = time.monotonic()
        log = logs / f"{kernel.release}.log"
        print(f"{kernel.release}: booting; its output is in {log.relative_to(ROOT)}", flush=True)
        results = boot(kernel, args.architecture, parts, args.minutes * 60, log)
        print(f"{kernel.release}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
        for name, result in results.items():
            failed = [
                line for line in result.output.splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            print("".join(f"  {name}: {line}\n" for line in failed), end="")
        table[kernel.release] = results
    print()
    _show(parts, table)
    return int(any(each.status != 0 for results in table.values() for each in results.values()))


def _show(parts: list[Part], table: dict[str, dict[str, Result]]) -> None:
    """Print the results as a table in Markdown."""
    rows = [["part", *table], ["---"] * (len(table) + 1)]
    rows += [
        [part.name, *(str(results[part.name]) for results in table.values())] for part in parts
    ]
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
