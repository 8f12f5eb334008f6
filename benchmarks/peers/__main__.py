"""python -m benchmarks.peers: compares aiotun with the libraries that a user could use instead."""

from .._suite import Suite, run
from ._contenders import CONTENDERS
from ._install import STEPS

SUITE = Suite(
    "benchmarks.peers",
    "Compare aiotun with the libraries that a user could use instead.",
    ("cost", "echo", "forward", "udp", "queues", "opening", "growth"),
    CONTENDERS,
    STEPS,
    always=("aiotun", "C"),
)

if __name__ == "__main__":
    run(SUITE.main)
