"""Code that the tunnel programs share: send to a device, run until a signal, report errors."""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from _datagrams import DatagramSocket

import aiotun

__all__ = ["BATCH", "QUEUE", "Delivery", "report", "run", "until_signal"]

# Packets to read at once. A TCP super-packet holds about 45 of them, and so does one call with
# UDP_SEGMENT.
BATCH = 90

# Packets that the kernel queues while this program does not run. It seals about 50,000 a second, so
# this is a fifth of a second. The kernel drops packets beyond that.
QUEUE = 10_000

MOST_WAITING = 4096


class Delivery:
    """Sends packets to the kernel, and counts the packets that the kernel refuses.

    `put` sends a single packet immediately. Several packets wait for `run`, so that the device can
    merge them.
    """

    def __init__(self, device: aiotun.Device, dropped: Counter[str]) -> None:
        self._device, self._dropped = device, dropped
        self._waiting: list[bytes] = []
        self._any = asyncio.Event()

    def put(self, packets: list[bytes]) -> None:
        if len(packets) == 1 and not self._waiting:
            try:
                self._device.send_nowait(packets[0])
                return
            except BlockingIOError:
                pass
            except aiotun.LinkDownError:
                self._dropped["the link is down"] += 1
                return
            except aiotun.PacketError:
                self._dropped["refused by the kernel"] += 1
                return
            except aiotun.AiotunError:
                return  # closed or lost: the task that reads from it raises the error
        if len(self._waiting) > MOST_WAITING:
            self._dropped["the device is full"] += len(packets)
        elif packets:
            self._waiting += packets
            self._any.set()

    async def run(self) -> None:
        while True:
            await self._any.wait()
            self._any.clear()
            packets, self._waiting = self._waiting, []
            while packets:
                try:
                    await self._device.send_many(packets)
                    break
                except aiotun.LinkDownError as error:
                    self._dropped["the link is down"] += len(error.unsent)
                    break
                except aiotun.PacketError as error:
                    self._dropped["refused by the kernel"] += 1
                    packets = error.unsent[1:]


async def report(
    device: aiotun.Device, socks: Sequence[DatagramSocket], show: Callable[[Counter[str]], str]
) -> None:
    """At each SIGUSR1 print the counts of dropped packets on stderr, as `show` formats them.

    Counts what the sockets did not send, and what the kernel dropped before this program read it.
    """
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
    while True:
        await asked.wait()
        asked.clear()
        link = await device.link.stats()
        counts = Counter(
            {
                "the device's queue was full": link.tx_dropped,
                "the socket's buffer was full": sum(sock.overflowed for sock in socks),
            }
        )
        for sock in socks:
            counts += sock.unsent
        print(show(counts), file=sys.stderr, flush=True)


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
