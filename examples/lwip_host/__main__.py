"""A host on lwIP, a TCP/IP stack in user space, with aiotun as its network card.

    python examples/lwip_host/build.py
    sudo python examples/lwip_host --address 10.0.0.2/24 --gateway 10.0.0.1 &
    ping 10.0.0.2; nc 10.0.0.2 7; curl http://10.0.0.2/

It answers pings, echoes on TCP port 7, and serves a page and /bytes/N on port 80. As with lwIP's
own driver, `tapif.c`, the TAP is called tap0 and the kernel's end gets the gateway's address. With
PRECONFIGURED_TAPIF=NAME in the environment it uses that TAP and changes nothing about it.

Prints "ready TAP" when it serves, and ends cleanly on SIGINT and SIGTERM.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from ipaddress import IPv4Address, IPv4Interface

try:
    from stack import Stack, Stream
except ImportError as error:
    sys.exit(f"{error}: run examples/lwip_host/build.py first")

import aiotun

MAC = bytes.fromhex("0212345678ab")  # tapif.c's
PATIENCE = 30.0  # seconds for a request
MAX_REQUEST = 8192  # bytes
CHUNK = bytes(range(256)) * 64


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def web(stream: Stream) -> None:
    """Answer one request (RFC 9112) and close the connection."""
    request = b""
    async with asyncio.timeout(PATIENCE):
        while b"\r\n\r\n" not in request and len(request) <= MAX_REQUEST:
            data = await stream.read()
            if not data:
                return None
            request += data
    method, _, rest = request.partition(b" ")
    path, _, version = rest.partition(b"\r\n")[0].partition(b" ")
    if not version.startswith(b"HTTP/1.") or len(request) > MAX_REQUEST:
        return await answer(stream, "400 Bad Request", b"no request\n")
    if method not in (b"GET", b"HEAD"):
        return await answer(stream, "405 Method Not Allowed", b"only GET and HEAD\n")
    name, _, count = path.rpartition(b"/")
    if path == b"/":
        return await answer(stream, "200 OK", b"lwIP on aiotun\n", method == b"HEAD")
    if name == b"/bytes" and count.isdigit() and len(count) < 10:
        return await send_bytes(stream, int(count), method == b"HEAD")
    return await answer(stream, "404 Not Found", b"not here\n", method == b"HEAD")


def head(status: str, length: int) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n"
        "Content-Type: text/plain\r\nConnection: close\r\n\r\n"
    ).encode()


async def answer(stream: Stream, status: str, body: bytes, bare: bool = False) -> None:
    await stream.write(head(status, len(body)) + (b"" if bare else body))


async def send_bytes(stream: Stream, count: int, bare: bool) -> None:
    await stream.write(head("200 OK", count))
    while count > 0 and not bare:
        await stream.write(CHUNK[:count])
        count -= len(CHUNK)


def opener(
    address: IPv4Interface, gateway: IPv4Address
) -> contextlib.AbstractAsyncContextManager[aiotun.TapDevice]:
    name = os.environ.get("PRECONFIGURED_TAPIF")
    if name:
        return aiotun.open_tap(name, up=False)  # no step of this needs a privilege
    return aiotun.open_tap("tap0", addresses=[f"{gateway}/{address.network.prefixlen}"])


async def main(address: IPv4Interface, gateway: IPv4Address) -> None:
    async with opener(address, gateway) as tap:
        stack = Stack(tap, MAC, address, gateway)
        end = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, end.set)
        stack.listen(7, echo)
        stack.listen(80, web)
        print(f"ready {tap.name}", flush=True)
        running, ending = asyncio.create_task(stack.run()), asyncio.create_task(end.wait())
        await asyncio.wait([running, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        await stack.stop()
        await running
        if stack.dropped:
            print(f"{stack.dropped} frames were dropped", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", metavar="A/LEN", type=IPv4Interface, required=True)
    parser.add_argument("--gateway", metavar="A", type=IPv4Address, required=True)
    args = parser.parse_args()
    if args.gateway not in args.address.network or args.gateway == args.address.ip:
        parser.error(f"the gateway must be another host of {args.address.network}")
    try:
        asyncio.run(main(args.address, args.gateway))
    except (aiotun.AiotunError, ValueError) as error:
        print(f"{sys.argv[0]}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before it was ready
        sys.exit(130)
