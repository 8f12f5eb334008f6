"""How long `import aiotun` takes in a program that has imported asyncio.

Each sample comes from a fresh interpreter that finds compiled modules, as in an installation.
Neither pyroute2 nor dpkt may be imported.
"""

from collections.abc import Iterator, Sequence

from ._harness import Row, Table, expect, fresh, warm_environment

PROGRAM = """
import sys, time
start = time.perf_counter()
import asyncio
middle = time.perf_counter()
import aiotun
end = time.perf_counter()
print(middle - start, end - middle, *({"pyroute2", "dpkt"} & set(sys.modules)))
"""


def sample(environment: dict[str, str]) -> tuple[float, float]:
    """Return the milliseconds that importing asyncio and then aiotun took."""
    base, ours, *loaded = fresh("-c", PROGRAM, environment=environment)
    expect("modules loaded by import aiotun", loaded, [])
    return float(base) * 1000, float(ours) * 1000


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    """The event loop makes no difference here: one table."""
    with warm_environment() as environment:
        sample(environment)
        samples = [sample(environment) for _ in range(runs * 3)]
    rows = [
        Row("import asyncio", "ms", [base for base, _ in samples]),
        Row("import aiotun", "ms", [ours for _, ours in samples], target=15.0),
    ]
    yield Table("import", "any loop", "fresh interpreters, with compiled modules", rows)
