"""Private namespaces: the benchmarks never touch the machine's own interfaces."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from aiotun._kernel import isolation


def inside() -> bool:
    """Whether `isolate` has brought us here."""
    return isolation.OUTSIDE in os.environ


def isolate(arguments: Sequence[str], module: str = "benchmarks") -> None:
    """Come back inside private network and mount namespaces, or leave with one line.

    Outside, this replaces the process by one inside. Inside, it makes sure of it first: what
    follows changes sysctls and mounts.
    """
    try:
        if not inside():
            program = [sys.executable, "-m", module, *arguments]
            command = isolation.command(program, mounts=True)
            os.execve(command[0], command, isolation.environment())
        isolation.check_inside(mounts=True)
        del os.environ[isolation.OUTSIDE]  # not for what is started from here
    except isolation.NoNamespaceError as error:
        sys.exit(f"benchmarks: {error}")
    # Nobody but the benchmarks sends here: no router solicitations, no multicast reports.
    for conf in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6").write_text("1")
    # /sys still shows the namespace outside. Where it can't be mounted, nothing here needs it.
    mount = ["mount", "-t", "sysfs", "sysfs", "/sys"]
    subprocess.run(mount, stderr=subprocess.DEVNULL, check=False)
