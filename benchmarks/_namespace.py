"""Private namespaces: the benchmarks never touch the machine's own interfaces."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_OUTSIDE = "AIOTUN_BENCH_OUTSIDE"


def _namespaces() -> tuple[str, str]:
    return os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/mnt")


def inside() -> bool:
    """Whether `isolate` has brought us here."""
    return _OUTSIDE in os.environ


def isolate(arguments: Sequence[str], module: str = "benchmarks") -> None:
    """Come back inside private network and mount namespaces, or leave with one line.

    Outside, this replaces the process by one inside. Inside, it makes sure of it first: what
    follows changes sysctls and mounts.
    """
    outside = os.environ.pop(_OUTSIDE, None)
    if outside is None:
        _enter(arguments, module)
    elif len(outside.split()) != 2 or set(outside.split()) & set(_namespaces()):
        sys.exit("benchmarks: not inside private namespaces; nothing was done")
    # Nobody but the benchmarks sends here: no router solicitations, no multicast reports.
    for conf in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6").write_text("1")
    # /sys still shows the namespace outside. Where it can't be mounted, nothing here needs it.
    mount = ["mount", "-t", "sysfs", "sysfs", "/sys"]
    subprocess.run(mount, stderr=subprocess.DEVNULL, check=False)


def _enter(arguments: Sequence[str], module: str) -> None:
    flags = "-nm" if os.geteuid() == 0 else "-rnm"
    trial = ["unshare", flags, "test", "-r", "/dev/net/tun", "-a", "-w", "/dev/net/tun"]
    try:
        done = subprocess.run(trial, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError:
        sys.exit("benchmarks: private namespaces need 'unshare'; install util-linux")
    if done.returncode != 0:
        reason = done.stderr.strip() or "/dev/net/tun may not be opened"
        sys.exit(f"benchmarks: cannot run in private namespaces: {reason}")
    os.environ[_OUTSIDE] = " ".join(_namespaces())
    command = ["unshare", flags, sys.executable, "-m", module, *arguments]
    os.execvp(command[0], command)
