"""What `import aiotun` adds to a program that has imported asyncio.

Each sample comes from a fresh interpreter with compiled modules at hand, as an installed program
has them; neither pyroute2 nor dpkt may be loaded.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from ._harness import BenchError, Row, Table, expect

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
    """Milliseconds that asyncio and then aiotun took to import."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"import aiotun: {done.stderr.strip()}")
    base, ours, *loaded = done.stdout.split()
    expect("modules loaded by import aiotun", loaded, [])
    return float(base) * 1000, float(ours) * 1000


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    """The event loop makes no difference here: one table."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        sample(environment)
        samples = [sample(environment) for _ in range(runs * 3)]
    rows = [
        Row("import asyncio", "ms", [base for base, _ in samples]),
        Row("import aiotun", "ms", [ours for _, ours in samples], target=15.0),
    ]
    yield Table("import", "any loop", "fresh interpreters, compiled modules at hand", rows)
