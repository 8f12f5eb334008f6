"""Makes a TUN device in a private network namespace, answers pings on it, and lets the kernel ping.

It needs no root and leaves nothing behind: device, addresses and routes end with the namespace, and
that with the demo.
"""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import struct
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import aiotun
from aiotun import reply

__all__ = ["DemoError", "demo"]

# The device's addresses, each with the neighbour that the program answers for.
_PINGED = (("10.203.0.1/24", "10.203.0.2"), ("fd03:a107:203::1/64", "fd03:a107:203::2"))
_INTERVAL = 0.2  # seconds; the shortest that ping(8) allows everybody
_TIMEOUT = 1.0  # seconds for one answer
_LINE = re.compile(r"seq=(\d+) .*time[=<]([0-9.]+) ?ms")
_Say = Callable[[str], None]
_Replies = AsyncGenerator[tuple[int, float]]  # sequence number and milliseconds


class DemoError(aiotun.AiotunError):
    """What the demo can't do; the text is the one line that the user sees."""


def demo(count: int, *, uvloop: bool, say: Callable[[str], None]) -> None:
    """Run the demo.

    Args:
        count: how many pings to each address.
        uvloop: whether to run on uvloop instead of asyncio's loop.
        say: called with each line of what there is to tell.

    Raises:
        DemoError: this machine has not what it takes, or pings were not answered.
        AiotunError: there is no private namespace to be had, or the device could not be opened.
    """
    with asyncio.Runner(loop_factory=_uvloop() if uvloop else None) as runner:
        # On a machine without IPv6 there is no such file, and the address could not be given.
        ipv6 = Path("/proc/net/if_inet6").exists()
        runner.run(_ping_all(_PINGED if ipv6 else _PINGED[:1], count, say))


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        raise DemoError("uvloop is not installed; pip install 'aiotun[uvloop]'") from None
    return uvloop.new_event_loop


# --- Answering, and pinging ----------------------------------------------------------------------


async def _answer(tun: aiotun.TunDevice) -> None:
    async for packet in tun:
        answer = reply.icmp_echo(packet) or reply.icmpv6_echo(packet)
        if answer is not None:
            await tun.send(answer)


async def _ping_all(pinged: Sequence[tuple[str, str]], count: int, say: _Say) -> None:
    times: list[float] = []
    addresses = [own for own, _ in pinged]
    async with (
        aiotun.new_namespace() as ns,
        aiotun.open_tun("demo0", netns=ns, addresses=addresses) as tun,
    ):
        ping = shutil.which("ping")
        say(f"{tun.name} has {', '.join(addresses)}, in a network namespace of its own.")
        say(f"A Python program answers; {ping or 'the kernel (no ping(8) here)'} asks.")
        answering = asyncio.create_task(_answer(tun))
        try:
            for _, address in pinged:
                asking = _system_pings(ns, ping, address, count) if ping else None
                asking = asking or _pings(ns, address, count)
                async with contextlib.aclosing(asking):
                    async for seq, milliseconds in asking:
                        times.append(milliseconds)
                        say(f"  {address} seq {seq}: {milliseconds:.3f} ms")
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
    say(line)
    if lost := sent - len(times):
        raise DemoError(f"{lost} of {sent} pings were not answered within {_TIMEOUT} s")


async def _system_pings(ns: aiotun.Namespace, program: str, address: str, count: int) -> _Replies:
    """Let ping(8) ask, and give each reply it prints."""
    options = ("-n", "-c", str(count), "-i", str(_INTERVAL), "-W", str(int(_TIMEOUT)))
    ping = await ns.create_subprocess_exec(
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
            raise DemoError(f"{program} failed: {said}")
    finally:
        if ping.returncode is None:
            ping.kill()
            await ping.wait()


async def _pings(ns: aiotun.Namespace, address: str, count: int) -> _Replies:
    """Ask through the kernel's own ICMP socket, as ping(8) does."""
    with await _icmp_socket(ns, address) as sock:
        for seq in range(1, count + 1):
            milliseconds = await asyncio.to_thread(_ping, sock, address, seq)
            if milliseconds is not None:
                yield seq, milliseconds
            if seq < count:
                await asyncio.sleep(_INTERVAL)


async def _icmp_socket(ns: aiotun.Namespace, address: str) -> socket.socket:
    try:
        if ":" in address:
            return await ns.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
        return await ns.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    except OSError as error:
        raise DemoError(f"no ICMP socket here ({error.strerror}); install ping(8)") from error


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
