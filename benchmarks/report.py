"""python -m benchmarks.report: docs/benchmarks.md and its charts, from the files of results."""

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._charts import Bar, chart
from ._harness import HERE, plain_number

RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
PARTS = {
    "forward": "Forwarding TCP",
    "cost": "Cost per packet",
    "echo": "Answering pings",
    "udp": "Small UDP packets",
    "queues": "Queues and processes",
    "opening": "Opening and closing",
    "growth": "Scaling",
    # Of `benchmarks.netstack`.
    "netstack streams": "Netstack: TCP",
    "netstack datagrams": "Netstack: UDP",
    "netstack opening": "Netstack: opening and memory",
    "netstack start": "`aiotun run`: start",
    "netstack run": "`aiotun run`: TCP",
    "netstack faults": "`aiotun run`: delay and loss",
    "netstack wireguard": "WireGuard without root",
    "netstack tun2socks": "A SOCKS5 proxy behind a TUN device",
}
# What the summary shows: the part, its table, what a reader knows it as, and aiotun's rows.
COST = "processor time"
CHOSEN = (
    ("forward", "one TCP stream, with offload", "one TCP stream, offload", "split raw"),
    ("forward", "4 TCP streams, with offload", "four TCP streams, offload", "split raw"),
    ("forward", "one TCP stream, without offload", "one TCP stream, no offload", ""),
    ("forward", "4 TCP streams, without offload", "four TCP streams, no offload", ""),
    ("forward", "one TCP stream, with offload", f"{COST}, offload", "split raw"),
    ("forward", "one TCP stream, without offload", f"{COST}, no offload", ""),
    ("echo", "flood pings, one at a time: mean", "a ping and its answer, mean", ""),
    ("echo", "flood pings: 99th percentile", "the same, 99th percentile", ""),
    ("cost", "to read a packet of 84 bytes", "read 84 bytes, in batches", ""),
    ("cost", "to read a packet of 84 bytes", "read 84 bytes, one by one", "one by one"),
    ("forward", "resident memory, once each", "memory at rest", ""),
)
SHOWN = ("C", "tun-rs", "wireguard-go", "pytun", "water", "asyncssh")
MORE = ("Gbit/s", "packets/s", "connections/s")  # units for which more is better
# Tables without a chart: the numbers alone are as clear.
NO_CHART = ("resident memory", "99th percentile", ": lost", "1 waiting", "waiting packets")

INTRO = """# Benchmarks

This page compares aiotun with other libraries for the same purpose. All programs do the same work
on the same machine and take turns within one run. `benchmarks/README.md` says what is measured,
and how. To measure on your machine, run `make bench-peers` and `make bench-netstack`.

A bar shows the median, and the line on it reaches from the smallest sample to the largest. The
last column of a table is the median of the ratios of runs next to each other; in brackets is where
this median lies, with 95 % certainty. *Processor time* is that of the program which is measured,
without the sender and the receiver. `C` is a program that makes only the system calls. aiotun runs
on asyncio's own event loop, unless a row says uvloop.
"""
SUMMARY = """## Summary

Medians. The best of a row is bold. aiotun's *raw* gives the program super-packets as the kernel has
them, and *split* gives it ordinary packets.
"""
REASONS = """
How can a Python program pass one in C? Both spend most of their time in the kernel. The C program
reads a packet and writes it. aiotun's C module makes the same calls, but reads a batch and then
writes a batch, into memory that it keeps, and the receiver is woken up less often. Where packets
come one at a time, Python costs up to a microsecond more for each. It also needs more memory.
"""
# The two charts that say most.
CHARTS = [
    line
    for name in (
        "forward-one-tcp-stream-with-offload",
        "echo-flood-pings-one-at-a-time-mean",
    )
    for line in (f"![{name.replace('-', ' ')}](benchmarks/{name}.svg)", "")
]
TARGETS = """These are the project's own targets, next to other libraries and next to C.
*Not distinguishable* means that the range in brackets has the target in it, so that more runs could
show either. A ratio that is shown as 1.00x and missed is below 1 before rounding.
"""


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def is_target(row: Mapping[str, Any]) -> bool:
    return row["target"] is not None


def is_measured(row: Mapping[str, Any]) -> bool:
    """Whether a row has samples of its own, and is not only a ratio that has a target."""
    return not (is_target(row) and row["ratio"])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Names in the left column, numbers in the others."""
    return [
        f"| {' | '.join(head)} |",
        "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def summary(parts: Mapping[str, Any]) -> list[str]:
    """One row for each of `CHOSEN`: aiotun's figures and those of the others, with its unit."""
    lines = []
    for part, what, known_as, kinds in CHOSEN:
        tables = parts.get(part, {}).get("tables", ())
        table = next((each for each in tables if each["what"] == what), None)
        if table is None:
            continue
        rows = [row for row in table["rows"] if is_measured(row)]
        values, unit = (
            ("cost", rows[0]["cost_unit"]) if COST in known_as else ("samples", unit_of(rows))
        )
        found = {
            row["name"].removesuffix(": at rest"): statistics.median(row[values])
            for row in rows
            if row[values] and not row["name"].endswith(": most")
        }
        offload = what.endswith("with offload")
        ours = [f"aiotun {kind}" for kind in kinds.split()] if offload else ["aiotun"]
        if kinds == "one by one":
            ours = ["aiotun, one by one"]
        others = [f"{name}, offload" if offload else name for name in SHOWN]
        others = [
            name if name in found else plain for name, plain in zip(others, SHOWN, strict=True)
        ]
        shown = [name for name in [*ours, *others] if name in found]
        best = (max if unit in MORE else min)(found[name] for name in shown)

        def cell(name: str, found: Mapping[str, float] = found, best: float = best) -> str:
            if name not in found:
                return ""
            text = plain_number(found[name])
            return f"**{text}**" if found[name] == best else text

        own = " / ".join(
            f"{cell(name)} ({name.partition(' ')[2]})" if offload else cell(name) for name in ours
        )
        lines.append((f"{known_as}, {unit}", own, *map(cell, others)))
    if not lines:
        return []
    return [SUMMARY, *markdown_table(("", "aiotun", *SHOWN), lines), REASONS, *CHARTS]


def targets(machines: Sequence[Mapping[str, Any]]) -> list[str]:
    """All figures that have a target, in one table with a column for each machine."""
    goals: dict[str, str] = {}
    figures: list[dict[str, str]] = []
    for parts in machines:
        figures.append({})
        tables = (table for part in PARTS for table in parts.get(part, {}).get("tables", ()))
        for table in tables:
            for row in filter(is_target, table["rows"]):
                name = f"{table['what']}: {row['name']}"
                goal = f"{'≥' if row['at_least'] else '≤'} {row['target']:g}"
                verdict = row["verdict"].replace("missed", "**missed**")
                if goals.setdefault(name, goal) != goal:
                    verdict += f" (its target was {goal})"  # an earlier run's
                figures[-1][name] = f"{row['label']} {verdict}"
    rows = [(name, goal, *(each.get(name, "") for each in figures)) for name, goal in goals.items()]
    head = ("", "target", *(machine_of(parts) for parts in machines))
    return ["## Targets", "", TARGETS, *markdown_table(head, rows), ""]


def machine_of(parts: Mapping[str, Any]) -> str:
    return str(next(iter(parts.values()))["about"]["machine"])


def section(title: str, tables: Sequence[Mapping[str, Any]], pictures: Path) -> Iterator[str]:
    yield from (f"## {title}", "")
    for table in tables:
        what = table["what"]
        heading = what if what.startswith("aiotun") else what[0].upper() + what[1:]
        yield from (f"### {heading}", "")
        rows = [row for row in table["rows"] if is_measured(row)]
        if unit_of(rows) and len(rows) > 2 and not any(word in what for word in NO_CHART):
            name = slug(f"{table['bench']} {what}") + ".svg"
            unit = unit_of(rows)
            better = "more" if unit in MORE else "less"
            bars = [Bar(row["name"], row["samples"]) for row in rows]
            text = chart(heading, f"{unit}; {better} is better", bars)
            (pictures / name).write_text(text)
            yield from (f"![{heading}]({pictures.name}/{name})", "")
        yield from (*numbers(rows), "")


def unit_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The unit of the rows, or nothing if they have several."""
    units = {str(row["unit"]) for row in rows}
    unit = units.pop()
    return "" if units else unit.replace("us", "µs")


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The samples of a table's rows."""
    unit = unit_of(rows)
    if not unit:
        rows = [{**row, "name": f"{row['name']}, {unit_of([row])}"} for row in rows]
    if all(len(row["samples"]) == 1 for row in rows):
        cells = [(row["name"], plain_number(row["samples"][0])) for row in rows]
        return markdown_table(("", unit), cells)
    costs = any(row["cost"] for row in rows)
    spread = [
        (
            row["name"],
            *(plain_number(f(row["samples"])) for f in (min, statistics.median, max)),
            *([cost_of(row)] if costs else []),
            row["label"] if row["ratio"] else "",
        )
        for row in rows
    ]
    first = next((row["name"] for row in rows if not row["ratio"]), "")
    against = f"/ {first}" if any(row["ratio"] for row in rows) else ""
    head = (unit, "min", "median", "max", *([COST] if costs else []), against)
    return markdown_table(head, spread)


def cost_of(row: Mapping[str, Any]) -> str:
    if not row["cost"]:
        return ""
    unit = row["cost_unit"].replace("us", "µs")
    return f"{plain_number(statistics.median(row['cost']))} {unit}"


def measured_on(parts: Mapping[str, Any]) -> list[str]:
    """List the machine and versions; only once if all parts were measured on the same."""
    lines: list[str] = []
    seen: list[Mapping[str, str]] = []
    for part in PARTS:
        if part not in parts:
            continue
        about = {k: v for k, v in parts[part]["about"].items() if k != "load"}
        if about not in seen:
            seen.append(about)
            if len(seen) > 1:
                lines += [f"*{PARTS[part]}* and the sections after it:", ""]
            lines += [f"- {key}: {value}" for key, value in about.items()]
            lines.append("")
    return lines


def machines(folder: Path) -> list[dict[str, Any]]:
    """Return the parts that each machine has measured, this one's first.

    This machine's are in ``peers.json`` and ``netstack.json``. Those of a machine NAME are in
    ``peers-NAME.json`` and ``netstack-NAME.json``.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        name = path.stem.partition("-")[2]
        found.setdefault(name, {}).update(json.loads(path.read_text()))
    return [found[name] for name in sorted(found)]


def write(folder: Path, docs: Path) -> None:
    """Write the page and the charts, from the results of `--json` in a folder.

    The page describes the other machines, and shows their figures that have a target.
    """
    parts, *others = machines(folder)
    pictures = docs / "benchmarks"
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    lines = [INTRO, *summary(parts), *targets([parts, *others])]
    for part, title in PARTS.items():
        if part in parts:
            lines += section(title, parts[part]["tables"], pictures)
    lines += ["## Measured on", "", *measured_on(parts)]
    for other in others:
        lines += ["Another machine:", "", *measured_on(other)]
    (docs / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0]) if arguments else RESULTS
    if not (folder / "peers.json").exists():
        make = f"make bench-peers ARGS='--json {folder}/peers.json'"
        print(f"{folder} has no peers.json; make it with: {make}", file=sys.stderr)
        return 1
    write(folder, DOCS)
    print(f"wrote {DOCS / 'benchmarks.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
