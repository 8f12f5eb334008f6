#!/usr/bin/env python3
"""Joins a virtual machine's TAP device, and an uplink if given, to a bridge; undoes it at the end.

    sudo python examples/qemu_bridge.py --bridge br0 --tap tap0 --launch -- \\
        qemu-system-x86_64 -m 1G -drive file=disk.qcow2

starts QEMU and passes it the TAP as an open file, so QEMU itself needs no privilege: put
"setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all" before it, for example. The exit
status is QEMU's. Without --launch

    sudo python examples/qemu_bridge.py --bridge br0 --tap tap0 --owner alice

makes a TAP to which no program is attached, prints "ready tap0", and waits. Alice can then start
QEMU herself, with "-netdev tap,id=net,ifname=tap0,script=no,downscript=no", as often as she likes.

It ends on SIGINT or SIGTERM, when QEMU ends, or when a step fails. Then it removes what it has made
and restores what existed before: an existing bridge or TAP stays, the uplink and that TAP go back
to their previous bridge, and interfaces that were down are taken down. It does not change
addresses. The uplink's addresses don't work while it is in a bridge, so give the bridge an address
before.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import aiotun

PATIENCE = 10.0  # seconds for QEMU to end by itself when it is asked to

Undo = list[Callable[[], Awaitable[object]]]


async def raise_bridge(name: str, undo: Undo) -> None:
    """Create the bridge if it does not exist, and bring it up."""
    try:
        await aiotun.create_bridge(name)
        undo.append(lambda: aiotun.delete_bridge(name))
    except aiotun.DeviceBusyError:  # it exists already
        bridge = aiotun.Link(name)
        if not (await bridge.info()).up:
            undo.append(bridge.down)
            await bridge.up()


async def join(name: str, bridge: str, undo: Undo) -> None:
    """Join an interface that is there already to the bridge."""
    link = aiotun.Link(name)
    before = await link.info()

    async def put_back() -> None:
        await link.set_master(before.master)
        if not before.up:
            await link.down()

    # Register this first: if the new bridge is invalid, the kernel notices it only after it has
    # released the interface from its old bridge.
    undo.append(put_back)
    await link.set_master(bridge)
    await link.up()


async def launch(args: argparse.Namespace, undo: Undo) -> int:
    """Open the TAP, join it to the bridge, run QEMU on it, and return QEMU's exit status."""
    # With virtio-net headers the guest can leave checksums and segmentation to the kernel. QEMU
    # detects the headers, and removes them if the guest's card is of another kind.
    try:
        tap = await aiotun.open_tap(args.tap, bridge=args.bridge, exclusive=True, offload="raw")
        made = True
    except aiotun.DeviceBusyError:  # it exists already
        tap = await aiotun.open_tap(args.tap, up=False, offload="raw")
        made = False
    fd = tap.queues[0].detach()
    try:
        if not made:
            await join(args.tap, args.bridge, undo)
        process = await asyncio.create_subprocess_exec(
            *args.command,
            *("-netdev", f"tap,id=aiotun,fd={fd}"),
            *("-device", f"{args.model},netdev=aiotun"),
            pass_fds=[fd],
        )
    finally:
        os.close(fd)  # QEMU has its own copy, so a new TAP is deleted when QEMU ends
    try:
        status = await process.wait()
    except asyncio.CancelledError:
        status = await end(process)
    return status if status >= 0 else 128 - status  # killed by a signal: a shell's status


async def end(process: asyncio.subprocess.Process) -> int:
    """Ask QEMU to end; kill it if it doesn't, or if a second signal comes."""
    try:
        process.terminate()
        return await asyncio.wait_for(process.wait(), PATIENCE)
    except (TimeoutError, asyncio.CancelledError):
        process.kill()
        return await process.wait()


async def keep(args: argparse.Namespace, undo: Undo) -> int:
    """Make a TAP that stays, join it to the bridge, and wait for a signal."""
    name: str = args.tap
    try:
        name = await aiotun.create_persistent(name, "tap", owner=args.owner)
        undo.append(lambda: aiotun.delete_persistent(name))
    except aiotun.DeviceBusyError:  # it exists: check that it is a TAP that QEMU can open
        await (await aiotun.open_tap(name, up=False)).aclose()
    await join(name, args.bridge, undo)
    print(f"ready {name}", flush=True)
    await asyncio.Event().wait()
    return 0


async def connect(args: argparse.Namespace, undo: Undo) -> int:
    await raise_bridge(args.bridge, undo)
    if args.uplink:
        await join(args.uplink, args.bridge, undo)
    return await (launch if args.launch else keep)(args, undo)


async def main(args: argparse.Namespace) -> int:
    undo: Undo = []
    # A separate task, so that signals cancel it but not the undoing afterwards.
    work = asyncio.create_task(connect(args, undo))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    await asyncio.wait([work])
    try:
        status = work.result()
    except asyncio.CancelledError:
        status = 0
    except (aiotun.AiotunError, OSError, ValueError) as error:
        status = complain(error)
    for step in reversed(undo):
        try:
            await step()
        except aiotun.AiotunError as error:  # undo the other steps, too
            status = complain(error)
    return status


def complain(error: Exception) -> int:
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, OSError) and not isinstance(error, aiotun.AiotunError):
        text = f"{error.filename} could not be started: {text}"
    print(f"{sys.argv[0]}: {text}", file=sys.stderr)
    return 1


def interface(text: str) -> str:
    try:
        return aiotun.Link(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [-h] --bridge BR --tap TAP [--uplink IF] [--owner USER] [--model MODEL]\n"
        "                      [--launch -- QEMU ARGS...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bridge", metavar="BR", type=interface, required=True, help="made unless it is there"
    )
    parser.add_argument(
        "--tap", metavar="TAP", type=interface, required=True, help="made unless it is there"
    )
    parser.add_argument(
        "--uplink", metavar="IF", type=interface, help="an interface that is to join the bridge"
    )
    parser.add_argument(
        "--owner", metavar="USER", type=user, help="who may attach to a TAP that was made to wait"
    )
    parser.add_argument(
        "--model", default="virtio-net-pci", help="the guest's device (%(default)s)"
    )
    parser.add_argument("--launch", action="store_true", help="start the command that follows --")
    # Split the arguments here: the command may have its own "--", and options like ours.
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    args = parser.parse_args(own[:cut])
    args.command = own[cut + 1 :]
    if bool(args.command) != args.launch:
        parser.error("--launch and a command go together: --launch -- QEMU ARGS...")
    return args


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(arguments())))
    except KeyboardInterrupt:  # before anything was done
        sys.exit(130)
