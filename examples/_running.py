"""Code that the tunnel programs share: run until a signal, report errors."""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import aiotun

__all__ = ["BATCH", "QUEUE", "run", "until_signal"]

# Packets to read at once. A TCP super-packet holds about 45 of them, and so does one call with
# UDP_SEGMENT.
BATCH = 90

# Packets that the kernel queues while this program does not run. It seals about 50,000 a second, so
# this is a fifth of a second. The kernel drops packets beyond that.
QUEUE = 10_000


async def until_signal(name: str, *work: Coroutine[Any, Any, None]) -> None:
    """Print "ready NAME" and run these concurrently until SIGINT, SIGTERM, or until one fails."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    tasks = [asyncio.create_task(each) for each in (stop.wait(), *work)]
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await asyncio.sleep(0)  # let each start; `report` must be listening for its signal
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


def run(main: Coroutine[Any, Any, int | None], uvloop: bool = False) -> int:
    """Run a program's coroutine and return its exit status; if it fails, print one line.

    The status is the coroutine's result, or 0 if it has none.
    """
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
            return runner.run(main) or 0
    except (aiotun.AiotunError, OSError, ValueError) as error:
        print(f"{sys.argv[0]}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the device was open
        return 130
