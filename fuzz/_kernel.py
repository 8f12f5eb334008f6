"""The kernel's own segmentation, as an oracle: give it a super-packet, and get the segments.

A packet socket sends a super-packet to a TUN or TAP device that was opened without offload. So the
kernel must segment it before the device's reader gets it (skb_gso_segment). The devices are in a
network namespace that a helper process creates. Their fds keep it alive after the helper has ended.
"""

import asyncio
import contextlib
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import aiotun

from ._target import ROOT

__all__ = ["close", "missing", "segments"]

_SOL_PACKET, _PACKET_VNET_HDR = 263, 15  # linux/socket.h, linux/if_packet.h
# The length of the device's ring, which must hold all segments of one input: others are dropped.
_TXQUEUELEN = 8192


@functools.cache
def _devices() -> tuple[list[int], str]:
    """Return the fds (two devices, then a packet socket for each), or why there are none."""
    ours, theirs = socket.socketpair()
    command = [
        sys.executable,
        "-m",
        "aiotun._kernel.isolation",
        sys.executable,
        "-m",
        "fuzz._kernel",
    ]
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    with ours, theirs:
        done = subprocess.run(
            [*command, str(theirs.fileno())],
            cwd=ROOT, env=env, pass_fds=[theirs.fileno()], capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            return [], (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        _, fds, _, _ = socket.recv_fds(ours, 1, 4)
    return fds, ""


def missing() -> str | None:
    """Why this machine can't run the oracle, or None."""
    fds, why = _devices()
    return None if fds else f"missing: a TAP device in a network namespace ({why})"


def close() -> None:
    """Close the devices. The next call of `segments` opens others."""
    if _devices.cache_info().currsize:
        for fd in _devices()[0]:
            os.close(fd)
        _devices.cache_clear()


def segments(super_packet: bytes, frame: bool) -> list[bytes] | None:
    """Return the kernel's segments of a super-packet; None if it refuses or drops it."""
    fds, why = _devices()
    if not fds:
        raise RuntimeError(why)
    device, sender = (fds[1], fds[3]) if frame else (fds[0], fds[2])
    try:
        os.write(sender, super_packet)
    except OSError:
        return None
    parts: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            parts.append(os.read(device, 1 << 17))
    return parts or None


async def _open(control: int) -> None:
    fds: list[int] = []
    for opener, name in ((aiotun.open_tun, "tun0"), (aiotun.open_tap, "tap0")):
        device = await opener(name, txqueuelen=_TXQUEUELEN)
        fds.append(device.queues[0].detach())
    for name in ("tun0", "tap0"):
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sender.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sender.bind((name, 0))
        fds.append(sender.detach())
    with socket.socket(fileno=control) as sock:
        socket.send_fds(sock, [b"4"], fds)


if __name__ == "__main__":
    # The devices must carry only what we send, so IPv6 must not send anything by itself.
    with contextlib.suppress(OSError):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    asyncio.run(_open(int(sys.argv[1])))
