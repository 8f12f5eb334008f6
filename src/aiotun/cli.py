"""The ``aiotun`` command.

``aiotun demo`` makes a TUN device in a private network namespace, answers pings on it, and lets the
kernel ping it for real. It needs no root and leaves nothing behind: device, addresses and routes
end with the namespace, and that with the process.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import aiotun
from aiotun import reply

__all__ = ["main"]

# Set when the command starts itself anew: the inode of the network namespace it came from.
_OUTSIDE = "AIOTUN_DEMO_OUTSIDE"
# The device's addresses, each with the neighbour that the program answers for.
_PINGED = (("10.203.0.1/24", "10.203.0.2"), ("fd03:a107:203::1/64", "fd03:a107:203::2"))
_INTERVAL = 0.2  # seconds; the shortest that ping(8) allows everybody
_TIMEOUT = 1.0  # seconds for one answer
_LINE = re.compile(r"seq=(\d+) .*time[=<]([0-9.]+) ?ms")
_Replies = AsyncGenerator[tuple[int, float]]  # sequence number and milliseconds


class _CommandError(Exception):
    """What the command can't do; the text is the one line that the user sees."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status: 0, 1 (failed), 2 (usage) or 130 (interrupted)."""
    parser = argparse.ArgumentParser(prog="aiotun", description=aiotun.__doc__)
    parser.add_argument("--version", action="version", version=f"aiotun {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    said = "ping a device that this program answers on"
    demo = commands.add_parser("demo", help=said, description=__doc__)
    said = "pings to each address (default: 5)"
    demo.add_argument("--count", type=_positive, default=5, metavar="N", help=said)
    demo.add_argument("--uvloop", action="store_true", help="run on uvloop instead of asyncio's")
    args = parser.parse_args(argv)
    try:
        return _demo(args.count, args.uvloop)
    except (_CommandError, aiotun.AiotunError) as error:
        print(f"aiotun: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone. Python would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _version() -> str:
    try:
        return importlib.metadata.version("aiotun")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


# --- The private namespace -----------------------------------------------------------------------


def _demo(count: int, uvloop: bool) -> int:
    factory = _uvloop() if uvloop else None
    if _OUTSIDE not in os.environ:
        _start_inside(["demo", "--count", str(count), *(["--uvloop"] if uvloop else [])])
    _check_inside()
    with asyncio.Runner(loop_factory=factory) as runner:
        # On a machine without IPv6 there is no such file, and the address could not be given.
        ipv6 = Path("/proc/net/if_inet6").exists()
        return runner.run(_ping_all(_PINGED if ipv6 else _PINGED[:1], count))


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        raise _CommandError("uvloop is not installed; pip install 'aiotun[uvloop]'") from None
    return uvloop.new_event_loop


def _start_inside(args: list[str]) -> None:
    """Become the same command in a network namespace of its own; never returns."""
    unshare = _unshare()
    # -P keeps modules in the current folder out, unless that is where aiotun itself came from.
    here = [] if sys.path[0] == str(Path(__file__).parent.parent) else ["-P"]
    command = [*unshare, "--", sys.executable, *here, "-m", "aiotun", *args]
    sys.stdout.flush()
    os.execve(unshare[0], command, {**os.environ, _OUTSIDE: str(_namespace())})


def _unshare() -> list[str]:
    if sys.platform != "linux":
        raise _CommandError("TUN devices of this kind exist on Linux only")
    program = shutil.which("unshare")
    if program is None:
        raise _CommandError("unshare(1) is missing; install util-linux")
    # In a container even root may lack what -n needs; with -r a user namespace gives it.
    ways = ["-n", "-rn"] if os.geteuid() == 0 else ["-rn"]
    said = ""
    for way in ways:
        trial = [program, way, sys.executable, "-ISc", ""]
        done = subprocess.run(trial, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            return [program, way]
        said = said or done.stderr.strip().removeprefix("unshare: ")
    raise _CommandError(
        f"this machine lets nobody but root make a network namespace ({said}); run as root, or let "
        "root allow it: sysctl user.max_user_namespaces=10000 "
        "(and kernel.apparmor_restrict_unprivileged_userns=0 where that exists)"
    )


def _check_inside() -> None:
    """Make no device where somebody else's network is, whatever the environment says."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if os.environ[_OUTSIDE] == str(_namespace()) or others:
        raise _CommandError(f"{_OUTSIDE} is set, but this is no private namespace; unset it")


def _namespace() -> int:
    return os.stat("/proc/self/ns/net").st_ino


# --- Answering, and pinging ----------------------------------------------------------------------


async def _answer(tun: aiotun.TunDevice) -> None:
    async for packet in tun:
        answer = reply.icmp_echo(packet) or reply.icmpv6_echo(packet)
        if answer is not None:
            await tun.send(answer)


async def _ping_all(pinged: Sequence[tuple[str, str]], count: int) -> int:
    times: list[float] = []
    addresses = [own for own, _ in pinged]
    async with aiotun.open_tun("demo0", addresses=addresses) as tun:
        ping = shutil.which("ping")
        print(f"{tun.name} has {', '.join(addresses)}, in a network namespace of its own.")
        print(f"A Python program answers; {ping or 'the kernel (no ping(8) here)'} asks.")
        answering = asyncio.create_task(_answer(tun))
        try:
            for _, address in pinged:
                asking = _system_pings(ping, address, count) if ping else _pings(address, count)
                async with contextlib.aclosing(asking):
                    async for seq, milliseconds in asking:
                        times.append(milliseconds)
                        print(f"  {address} seq {seq}: {milliseconds:.3f} ms", flush=True)
                if answering.done():  # it never ends by itself, but for an error
                    await answering
        finally:
            answering.cancel()
            await asyncio.wait([answering])
    sent = count * len(pinged)
    line = f"{sent} sent, {len(times)} received"
    if times:
        numbers = (min(times), sum(times) / len(times), max(times))
        line += ", min/avg/max {:.3f}/{:.3f}/{:.3f} ms".format(*numbers)
    print(line, flush=True)
    if lost := sent - len(times):
        raise _CommandError(f"{lost} of {sent} pings were not answered within {_TIMEOUT} s")
    return 0


async def _system_pings(program: str, address: str, count: int) -> _Replies:
    """Let ping(8) ask, and give each reply it prints."""
    options = ("-n", "-c", str(count), "-i", str(_INTERVAL), "-W", str(int(_TIMEOUT)))
    ping = await asyncio.create_subprocess_exec(
        program,
        *options,
        address,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},  # numbers with points
        start_new_session=True,  # Ctrl-C is for us; ping would print a summary of its own
    )
    assert ping.stdout is not None
    said = ""
    try:
        async for line in ping.stdout:
            text = line.decode(errors="replace").strip()
            said = text or said
            if found := _LINE.search(text):
                yield int(found[1]), float(found[2])
        if await ping.wait() > 1:  # 1 means no more than unanswered
            raise _CommandError(f"{program} failed: {said}")
    finally:
        if ping.returncode is None:
            ping.kill()
            await ping.wait()


async def _pings(address: str, count: int) -> _Replies:
    """Ask through the kernel's own ICMP socket, as ping(8) does."""
    with _icmp_socket(address) as sock:
        for seq in range(1, count + 1):
            milliseconds = await asyncio.to_thread(_ping, sock, address, seq)
            if milliseconds is not None:
                yield seq, milliseconds
            if seq < count:
                await asyncio.sleep(_INTERVAL)


def _icmp_socket(address: str) -> socket.socket:
    try:
        # Which groups may have such a socket is a setting of the namespace: inside, nobody but us.
        Path("/proc/sys/net/ipv4/ping_group_range").write_text(f"{os.getegid()} {os.getegid()}")
        if ":" in address:
            return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    except OSError as error:
        raise _CommandError(f"no ICMP socket here ({error.strerror}); install ping(8)") from error


def _ping(sock: socket.socket, address: str, seq: int) -> float | None:
    """Send one echo request and wait for its reply; the kernel fills in identifier and checksum."""
    request = struct.pack("!BBHHH", 128 if ":" in address else 8, 0, 0, 0, seq) + bytes(48)
    start = time.perf_counter()
    sock.sendto(request, (address, 0))
    while (left := start + _TIMEOUT - time.perf_counter()) > 0:
        sock.settimeout(left)
        try:
            answer = sock.recv(2048)
        except TimeoutError:
            break
        if int.from_bytes(answer[6:8], "big") == seq:
            return (time.perf_counter() - start) * 1000
    return None
