#!/usr/bin/env python3
"""Answers pings without any privilege: only opening the device needs root.

    sudo python examples/drop_privileges.py --name tun0 --address 10.0.0.1/24 --user nobody

opens the queues as root, becomes an ordinary user for good, and serves. With --separate

    sudo python examples/drop_privileges.py --separate --name tun0 --address 10.0.0.1/24

root starts a child as that user, which never has a privilege, passes it the queues through a socket
(SCM_RIGHTS), and closes its own. Then it only waits for the child.

Prints "ready NAME" when it serves, and ends cleanly on SIGINT and SIGTERM.
"""

import argparse
import asyncio
import ctypes
import os
import pwd
import socket
import subprocess
import sys

from _service import Networks, addresses_of, echo, on_signals, parser, run_main

import aiotun

# linux/prctl.h, linux/capability.h
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
CAPABILITY_VERSION_3 = 0x2008_0522
CAPABILITIES = 64  # version 3 has room for this many

MANY = 253  # the most fds in one message (SCM_MAX_FD)


libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if libc[name](*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def become(user: pwd.struct_passwd) -> None:
    """Become an ordinary user, irreversibly. The order of the steps matters.

    With no_new_privs, programs that are started later (setuid programs, for example) can't give
    privileges back either.

    Raises:
        PermissionError, OSError: a step failed. The program must not go on.
    """
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(CAPABILITIES):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # EINVAL: this kernel has no more of them
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    os.setgroups([])
    # Set all three ids: the saved id would be a way back.
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    # The kernel has cleared all sets of capabilities with that, unless securebits forbid it.
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    check()


def check() -> None:
    """Check with the kernel that no privilege is left."""
    with open("/proc/self/status") as file:
        said = dict(line.strip().partition(":")[::2] for line in file)
    sets = ("CapInh", "CapPrm", "CapEff", "CapAmb")
    left = {key: said[key].split() for key in ("Uid", "Gid", "Groups", "NoNewPrivs", *sets)}
    roots = "0" in left["Uid"] + left["Gid"] + left["NoNewPrivs"]
    if roots or left["Groups"] or any(int(left[key][0], 16) for key in sets):
        raise PermissionError(f"privileges are left: {left}")


async def alone() -> None:
    """Wait until this is the only thread, because other threads would keep their privileges.

    The ids belong to the process, but capabilities and no_new_privs belong to each thread. The
    thread that opened the device may still be ending.

    Raises:
        PermissionError: another thread keeps running.
    """
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) == 1:
            return
        await asyncio.sleep(0.001)
    raise PermissionError("another thread runs, and would keep its privileges")


async def serve(tun: aiotun.TunDevice, networks: Networks) -> None:
    unsent = 0
    async for packet in tun:
        answer = echo(packet, networks)
        if answer is not None:
            try:
                await tun.send(answer)
            except (aiotun.LinkDownError, aiotun.PacketError):
                unsent += 1  # the link went down in between; it may come up again
    if unsent:
        print(f"{unsent} answers could not be sent", file=sys.stderr)


# --- In one process ------------------------------------------------------------------------------


async def open_and_drop(args: argparse.Namespace) -> None:
    addresses = addresses_of(args)
    async with aiotun.open_tun(args.name, addresses=addresses, queues=args.queues) as tun:
        await alone()
        become(args.user)
        on_signals(tun.close)
        print(f"ready {tun.name}", flush=True)
        await serve(tun, Networks(addresses))


# --- In two --------------------------------------------------------------------------------------


def start_child(args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the child as the ordinary user, before there are fds to inherit."""
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:], "--take", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            user=args.user.pw_uid,
            group=args.user.pw_gid,
            extra_groups=[],
        )
    return child, ours


async def open_and_hand_over(args: argparse.Namespace) -> None:
    child, sock = start_child(args)
    with sock:
        try:
            opener = aiotun.open_tun(args.name, addresses=addresses_of(args), queues=args.queues)
            async with opener as tun:
                # From here on a signal ends the child, and this process ends with the child.
                on_signals(child.terminate)
                socket.send_fds(sock, [b"queues"], [queue.fileno() for queue in tun.queues])
        except BaseException:
            child.kill()
            child.wait()
            raise
    if await asyncio.to_thread(child.wait) != 0:
        raise ValueError(f"the child ended with status {child.returncode}")


async def take_and_serve(args: argparse.Namespace) -> None:
    with socket.socket(fileno=args.take) as sock:
        _, fds, _, _ = socket.recv_fds(sock, 100, MANY)
    if not fds:
        raise ValueError("no queues came: the parent process has ended")
    await alone()
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    check()
    async with aiotun.TunDevice.from_fd(*fds) as tun:
        on_signals(tun.close)
        print(f"ready {tun.name}", flush=True)
        await serve(tun, Networks(addresses_of(args)))


# --- The command ---------------------------------------------------------------------------------


def user(text: str) -> pwd.struct_passwd:
    try:
        found = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no user {text}") from None
    if found.pw_uid == 0 or found.pw_gid == 0:
        raise argparse.ArgumentTypeError(f"{text} is not an ordinary user")
    return found


def count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MANY):
        raise argparse.ArgumentTypeError(f"1 to {MANY} queues")
    return int(text)


def start(args: argparse.Namespace) -> int:
    # uvloop before 0.23 uses io_uring, for which the kernel starts a thread when the loop is made.
    # That thread stays root after the process has dropped its privileges (as in CVE-2024-22017 of
    # Node.js).
    os.environ["UV_USE_IO_URING"] = "0"
    if args.take is not None:
        return run_main(lambda: take_and_serve(args), args.uvloop)
    if os.geteuid() != 0:
        print(f"{sys.argv[0]}: start this as root; it drops the privileges itself", file=sys.stderr)
        return 1
    main = open_and_hand_over if args.separate else open_and_drop
    return run_main(lambda: main(args), args.uvloop)


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument(
        "--user", type=user, default="nobody", help="the user to become (default: %(default)s)"
    )
    command.add_argument(
        "--queues", type=count, default=1, metavar="N", help="queues (default: %(default)s)"
    )
    command.add_argument(
        "--separate", action="store_true", help="serve in a child that was never root"
    )
    command.add_argument("--take", type=int, help=argparse.SUPPRESS)
    sys.exit(start(command.parse_args()))
