"""Code that the services share: the command line, and an orderly end on a signal."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any, TypeVar

from _addresses import with_prefix

import aiotun
from aiotun.device import Opener
from aiotun.reply import icmp_echo, icmpv6_echo

__all__ = [
    "Networks",
    "addresses_of",
    "echo",
    "loop_factory",
    "on_signals",
    "parser",
    "run",
    "run_device",
    "run_main",
]

D = TypeVar("D", bound=aiotun.Device)

_DEFAULT = ["10.203.0.1/24", "fd03:a107:203::1/64"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make the parser for the options that all have: --name, --address and --uvloop."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--name", help="the interface's name (default: the kernel picks one)")
    made.add_argument(
        "--address",
        action="append",
        type=with_prefix,
        metavar="A/LEN",
        help=f"the interface's address and network; may be repeated (default: {_DEFAULT})",
    )
    made.add_argument("--uvloop", action="store_true", help="run on uvloop")
    return made


class Networks:
    """The addresses that a service answers for, kept as numbers because each packet is looked up.

    These are all addresses of its networks except an IPv4 network's broadcast address, which must
    not be a source address (RFC 1122, section 3.2.1.3).
    """

    def __init__(self, addresses: list[IPv4Interface | IPv6Interface]) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {4: [], 16: []}
        for address in addresses:
            network = address.network
            first, last = int(network.network_address), int(network.broadcast_address)
            # A network of one or two addresses has no broadcast address (RFC 3021).
            if address.version == 4 and network.prefixlen < 31:
                last -= 1
            self._ranges[4 if address.version == 4 else 16].append((first, last))

    def __contains__(self, address: bytes) -> bool:
        number = int.from_bytes(address, "big")
        # Not any(): its generator would cost twice as much as the rest of this method.
        for first, last in self._ranges.get(len(address), ()):  # noqa: SIM110
            if first <= number <= last:
                return True
        return False


def echo(packet: bytes, networks: Networks) -> bytes | None:
    """Return the answer to a ping to an address of these networks, or None."""
    if packet[0] < 0x60:
        return icmp_echo(packet) if packet[16:20] in networks else None
    return icmpv6_echo(packet) if packet[24:40] in networks else None


def addresses_of(args: argparse.Namespace) -> list[IPv4Interface | IPv6Interface]:
    """The addresses of the command line, or the default addresses."""
    return args.address or [ip_interface(each) for each in _DEFAULT]


def run(
    args: argparse.Namespace, serve: Callable[[aiotun.TunDevice, Networks], Awaitable[None]]
) -> int:
    """Serve on a TUN device with the addresses of the arguments; see `run_device`."""
    addresses = addresses_of(args)
    return run_device(
        lambda: aiotun.open_tun(args.name, addresses=addresses),
        lambda tun: serve(tun, Networks(addresses)),
        uvloop=args.uvloop,
    )


def run_device(
    make: Callable[[], Opener[D]], serve: Callable[[D], Awaitable[None]], *, uvloop: bool
) -> int:
    """Open a device, serve until a signal comes, and close it.

    Returns:
        The exit status: 0 after a signal, 1 if something failed, 2 for invalid arguments.
    """
    try:
        opener = make()
    except ValueError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 2

    async def main() -> None:
        async with opener as device:
            on_signals(device.close)  # which ends `async for`
            print(f"ready {device.name}", flush=True)
            await serve(device)

    return run_main(main, uvloop)


def on_signals(stop: Callable[[], object]) -> None:
    """Call `stop` when SIGINT or SIGTERM comes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def run_main(main: Callable[[], Coroutine[Any, Any, None]], uvloop: bool) -> int:
    """Run a program in an event loop and return the exit status, as `run_device` does."""
    try:
        with asyncio.Runner(loop_factory=loop_factory(uvloop)) as runner:
            runner.run(main())
    except (aiotun.AiotunError, OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or error
        print(f"{sys.argv[0]}: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the device was open
        return 130
    return 0


def loop_factory(uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if not uvloop:
        return None
    try:
        import uvloop as module
    except ImportError:
        raise ValueError("uvloop is not installed: pip install 'aiotun[uvloop]'") from None
    return module.new_event_loop
