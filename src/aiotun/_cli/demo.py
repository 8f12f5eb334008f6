"""``aiotun demo``: a TUN device in a private network namespace, whose pings it answers."""

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

# The device's addresses, each with the neighbor that the program answers for.
_PINGED = (("10.203.0.1/24", "10.203.0.2"), ("fd03:a107:203::1/64", "fd03:a107:203::2"))
_INTERVAL = 0.2  # seconds; the shortest that ping(8) allows without root
_TIMEOUT = 1.0  # seconds for one answer
_LINE = re.compile(r"seq=(\d+) .*time[=<]([0-9.]+) ?ms")
_Say = Callable[[str], None]
_Replies = AsyncGenerator[tuple[int, float]]  # sequence number and milliseconds


class DemoError(aiotun.AiotunError):
    """The demo can't run, or failed. The text is the one line that the user sees."""


def demo(count: int, *, uvloop: bool, say: Callable[[str], None]) -> None:
    """Run the demo.

    Args:
        count: how many pings to send to each address.
        uvloop: whether to run on uvloop instead of asyncio's loop.
        say: called with each line of output.

    Raises:
        DemoError: something that the demo needs is missing, or a ping was not answered.
        AiotunError: the private namespace or the device could not be created.
    """
    with asyncio.Runner(loop_factory=_uvloop() if uvloop else None) as runner:
        # On a machine without IPv6 this file does not exist, and adding the address would fail.
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
        if answer := reply.icmp_echo(packet) or reply.icmpv6_echo(packet):
            await tun.send(answer)


async def _ping_all(pinged: Sequence[tuple[str, str]], count: int, say: _Say) -> None:
    times: list[float] = []
    addresses = [own for own, _ in pinged]
    async with (
        aiotun.new_namespace() as ns,
        aiotun.open_tun("demo0", netns=ns, addresses=addresses) as tun,
    ):
        ping = shutil.which("ping")
        say(f"{tun.name} has {', '.join(addresses)}, in a private network namespace.")
        sender = ping or "the kernel's ICMP socket (there is no ping(8) here)"
        say(f"Pings are sent with {sender} and answered by this Python program.")
        answering = asyncio.create_task(_answer(tun))
        try:
            for _, address in pinged:
                asking = _system_pings(ns, ping, address, count) if ping else None
                asking = asking or _pings(ns, address, count)
                async with contextlib.aclosing(asking):
                    async for seq, milliseconds in asking:
                        times.append(milliseconds)
                        say(f"  {address} seq {seq}: {milliseconds:.3f} ms")
                if answering.done():  # only an error ends this task
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
    """Run ping(8), and yield each reply that it prints."""
    options = ("-n", "-c", str(count), "-i", str(_INTERVAL), "-W", str(int(_TIMEOUT)))
    ping = await ns.create_subprocess_exec(
        program,
        *options,
        address,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},  # numbers with a decimal point
        start_new_session=True,  # Ctrl-C must not reach ping, which would print its own summary
    )
    assert ping.stdout is not None
    said = ""
    try:
        async for line in ping.stdout:
            text = line.decode(errors="replace").strip()
            said = text or said
            if found := _LINE.search(text):
                yield int(found[1]), float(found[2])
        if await ping.wait() > 1:  # 1 means that pings were not answered
            raise DemoError(f"{program} failed: {said}")
    finally:
        if ping.returncode is None:
            ping.kill()
            await ping.wait()


async def _pings(ns: aiotun.Namespace, address: str, count: int) -> _Replies:
    """Send pings through the kernel's ICMP socket, as ping(8) does, and yield each reply."""
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
        raise DemoError(f"can't open an ICMP socket: {error.strerror}; install ping(8)") from error


def _ping(sock: socket.socket, address: str, seq: int) -> float | None:
    """Send one echo request and return its round trip in milliseconds; None without a reply.

    The kernel fills in the identifier and the checksum.
    """
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
