"""python -m benchmarks.netstack: compares aiotun's netstack with other TCP/IP stacks."""

from .._suite import Suite, run
from ._contenders import CONTENDERS
from ._install import STEPS

SUITE = Suite(
    "benchmarks.netstack",
    "Compare aiotun's netstack with other TCP/IP stacks.",
    ("streams", "datagrams", "opening"),
    CONTENDERS,
    STEPS,
    prefix="netstack ",
)

if __name__ == "__main__":
    run(SUITE.main)
