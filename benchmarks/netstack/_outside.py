"""A network outside: what programs reach by `aiotun run` and by its peers, and by proxies."""

import contextlib
import subprocess

from .._harness import child, compiled, wait_ready
from ..peers._field import Far, ip

NEAR, FAR = "10.91.0.1", "10.91.0.2"
TARGET = "203.0.113.1"  # with servers; not the gateway, which pasta takes for the host's loopback


class Outside:
    """A namespace behind a veth pair, with iperf3 and the servers of `netclient`.

    It also has the addresses that `host` gives to stacks, so that a SOCKS proxy there finds a
    server behind each.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        far = Far(stack, iperf=True)
        self.netns = far.netns
        ip(
            "link set lo up",
            f"link add out0 type veth peer name out1 netns {far.pid}",
            f"address add {NEAR}/24 dev out0",
            "link set out0 up",
        )
        # With its namespace it would vanish only some time later.
        stack.callback(ip, "link delete out0")
        ip(
            f"address add {FAR}/24 dev out1",
            f"address add {TARGET}/32 dev lo",
            "route add local 10.90.0.0/16 dev lo",
            "link set out1 up",
            netns=far.netns,
        )
        ip(f"route add default via {FAR}")
        wait_ready(self.enter(str(compiled("netclient.c")), "serve"))

    def enter(self, *command: str) -> "subprocess.Popen[str]":
        """Start a program outside."""
        return self._stack.enter_context(child("nsenter", f"--net={self.netns}", *command))
