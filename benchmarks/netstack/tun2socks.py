"""TCP through a TUN device and a SOCKS5 proxy: `examples/tun2socks.py` and tun2proxy.

The proxy is in a namespace outside, with an iperf3 server that has the addresses behind both
devices. It is the same for both, written in Go. Nothing is pinned to a core.
"""

import contextlib
from collections.abc import Iterator, Sequence

from .._contenders import Contender
from .._harness import Table, wait_ready
from ..peers._field import output
from ._contenders import MTU, SOCKS, TUN2SOCKS, host
from ._install import GO
from ._outside import Outside
from .run import Path, compared

NAMES = (TUN2SOCKS, "tun2proxy")
WAYS = {"up": "to a SOCKS5 proxy", "down": "from a SOCKS5 proxy"}
TARGETS = {"tun2proxy": 5.0}


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        wait_ready(Outside(stack).enter(str(GO / "proxy"), SOCKS))
        paths = {}
        for number, each in enumerate(contenders):
            at = host(stack, each, number)
            paths[each.name] = Path(at.program, MTU, at.address, output)
        yield from compared(runs, paths, TUN2SOCKS, WAYS, TARGETS)
