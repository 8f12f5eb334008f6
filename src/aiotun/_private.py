"""Starting the `aiotun` command anew, in a network namespace of its own.

What is made there is seen by nobody else, and ends with the process.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiotun

__all__ = ["OUTSIDE", "NoNamespaceError", "check_inside", "command", "environment", "run"]

OUTSIDE = "AIOTUN_DEMO_OUTSIDE"
"""Set when the command starts itself anew: the inode of the network namespace it came from."""

# What the kernel puts into every new namespace by itself, where it has the module (for
# net.core.fb_tunnels_only_for_init_net).
_BY_ITSELF = {
    "lo", "erspan0", "gre0", "gretap0", "ip6_vti0", "ip6erspan0", "ip6gre0", "ip6tnl0", "ip_vti0",
    "sit0", "tunl0",
}  # fmt: skip


class NoNamespaceError(aiotun.AiotunError):
    """There is no private namespace to be had; the text is the one line that the user sees."""


def command(args: Sequence[str]) -> list[str]:
    """Give the command that runs ``aiotun ARGS`` inside; it needs `environment`, too.

    Raises:
        NoNamespaceError: this machine has not what it takes.
    """
    # -P keeps modules in the current folder out, unless that is where aiotun itself came from.
    here = [] if sys.path[0] == str(Path(__file__).parent.parent) else ["-P"]
    return [*_unshare(), "--", sys.executable, *here, "-m", "aiotun", *args]


def environment() -> dict[str, str]:
    """Give the environment for it."""
    return {**os.environ, OUTSIDE: str(_namespace())}


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and give what it says.

    As `subprocess.run`, but that leaves a child unreaped where Ctrl-C comes.
    """
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _unshare() -> list[str]:
    if sys.platform != "linux":
        raise NoNamespaceError("TUN devices of this kind exist on Linux only")
    program = shutil.which("unshare")
    if program is None:
        raise NoNamespaceError("unshare(1) is missing; install util-linux")
    # In a container even root may lack what -n needs; with -r a user namespace gives it.
    ways = ["-n", "-rn"] if os.geteuid() == 0 else ["-rn"]
    said = ""
    for way in ways:
        done = run([program, way, sys.executable, "-ISc", ""])
        if done.returncode == 0:
            return [program, way]
        said = said or done.stderr.strip().removeprefix("unshare: ")
    if said.startswith("failed to execute"):  # inside, where it had got to
        raise NoNamespaceError(
            f"{sys.executable} can't be started anew by this user ({said}); use a Python that is "
            "installed where everybody may run it"
        )
    raise NoNamespaceError(
        f"this machine lets nobody but root make a network namespace ({said}); run as root, or let "
        "root allow it: sysctl user.max_user_namespaces=10000 "
        "(and kernel.apparmor_restrict_unprivileged_userns=0 where that exists)"
    )


def check_inside() -> None:
    """Make no device where somebody else's network is, whatever the environment says.

    Raises:
        NoNamespaceError: this is no private namespace.
    """
    others = {name for _, name in socket.if_nameindex()} - _BY_ITSELF
    if os.environ.get(OUTSIDE) in (None, str(_namespace())) or others:
        raise NoNamespaceError(f"{OUTSIDE} is set, but this is no private namespace; unset it")


def _namespace() -> int:
    return os.stat("/proc/self/ns/net").st_ino
