"""What the tunnels' programs share: deliver to a device, run until a signal comes, say why not."""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiotun

__all__ = ["BATCH", "deliver", "run", "until_signal"]

# Packets to read at once. A super-packet of TCP is some 45 of them, and so is what UDP_SEGMENT
# takes in one call.
BATCH = 90


async def deliver(device: aiotun.Device, packets: Sequence[bytes], dropped: Counter[str]) -> None:
    """Send packets to the kernel; what it does not take is counted, and the others are sent."""
    while packets:
        try:
            await device.send_many(packets)
            return
        except aiotun.LinkDownError as error:
            dropped["the link is down"] += len(packets) - error.sent
            return
        except aiotun.PacketError as error:
            dropped["refused by the kernel"] += 1
            packets = packets[error.sent + 1 :]


async def until_signal(name: str, *work: Coroutine[Any, Any, None]) -> None:
    """Say "ready NAME", and run these side by side until SIGINT or SIGTERM, or until one fails."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    tasks = [asyncio.create_task(each) for each in (stop.wait(), *work)]
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    print(f"ready {name}", flush=True)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


def run(main: Coroutine[Any, Any, None], uvloop: bool = False) -> int:
    """Run a program's coroutine; give its exit status: 1, and one line, where it failed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        if uvloop:
            try:
                import uvloop as module
            except ImportError:
                main.close()
                raise ValueError("uvloop is not installed: pip install 'aiotun[uvloop]'") from None
            factory = module.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)
    except (aiotun.AiotunError, OSError, ValueError) as error:
        print(f"{sys.argv[0]}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the device was open
        return 130
    return 0
