"""python -m benchmarks.netstack: compares aiotun's netstack, and what it carries, with others."""

from .._suite import Suite, run
from ._contenders import CONTENDERS
from ._install import STEPS

SUITE = Suite(
    "benchmarks.netstack",
    "Compare aiotun's netstack, and the programs that it carries, with others.",
    ("streams", "datagrams", "opening", "start", "run", "faults", "wireguard", "tun2socks"),
    CONTENDERS,
    STEPS,
    prefix="netstack ",
)

if __name__ == "__main__":
    run(SUITE.main)
