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
    """Continue inside private network and mount namespaces, or exit with one line.

    Outside, this replaces the process with one inside. Inside, it checks that it is inside before
    it changes sysctls and mounts.
    """
    try:
        if not inside():
            program = [sys.executable, "-m", module, *arguments]
            command = isolation.command(program, mounts=True)
            os.execve(command[0], command, isolation.environment())
        isolation.check_inside(mounts=True)
        del os.environ[isolation.OUTSIDE]  # children must not see it
    except isolation.NoNamespaceError as error:
        sys.exit(f"benchmarks: {error}")
    # Only the benchmarks may send here. IPv6 would add router solicitations and multicast reports.
    for conf in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6").write_text("1")
    # /sys still shows the outer namespace. If it can't be mounted, nothing here depends on it.
    mount = ["mount", "-t", "sysfs", "sysfs", "/sys"]
    subprocess.run(mount, stderr=subprocess.DEVNULL, check=False)
