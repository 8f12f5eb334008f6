"""Several queues: their number, the queue of each flow, and the kernel's other settings."""

import asyncio
import ctypes
import errno
import os
import platform
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

import aiotun
from aiotun import DeviceBusyError, DeviceMismatchError, LinkDownError

from ..helpers import ip
from .rig import OURS, THEIRS, number, rest, rig, udp, waiting


async def test_a_device_has_at_most_256_queues() -> None:
    with pytest.raises(ValueError, match="1 to 256"):
        aiotun.open_tun(queues=257)
    async with aiotun.open_tun("many0", queues=256, addresses=["10.9.0.1/24"]) as tun:
        assert len({queue.fileno() for queue in tun.queues}) == 256
        with pytest.raises(DeviceBusyError, match="all 256 queues of many0") as caught:
            await aiotun.open_tun("many0", multi_queue=True)
        assert (caught.value.errno, caught.value.filename) == (errno.E2BIG, "many0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(300):
                sock.sendto(b"x", (THEIRS, 9))
            got = 0
            while got < 300:
                got += len(await asyncio.wait_for(tun.recv_many(), 5))
        task = await waiting(tun.recv())
        tun.close()
        with pytest.raises(aiotun.DeviceClosedError):
            await task


async def test_a_flow_keeps_to_one_queue_both_ways() -> None:
    """The device sends on the queue of the flow's hash; the kernel answers on the same queue."""
    async with aiotun.open_tun("flow0", queues=4, addresses=[f"{OURS}/24"]) as tun:
        used = set()
        for place in range(24):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((OURS, 0))
                sock.connect((THEIRS, 5000 + place))
                await tun.send(udp(THEIRS, 5000 + place, OURS, sock.getsockname()[1], b"ask"))
                assert sock.recv(10, socket.MSG_DONTWAIT) == b"ask"
                for _ in range(3):
                    sock.send(b"answer")
            counts = []
            for queue in tun.queues:
                found = 0
                try:
                    while queue.recv_nowait():
                        found += 1
                except BlockingIOError:
                    counts.append(found)
            assert sorted(counts) == [0, 0, 0, 3]
            used.add(counts.index(3))
        assert len(used) > 1


async def test_disabled_queues_are_passed_over() -> None:
    async with rig("group") as r:
        packets = [udp(THEIRS, 5000 + place, OURS, 7777, b"x") for place in range(40)]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OURS, 7777))
            for queue in r.tun.queues[1:]:
                queue.disable()
                assert queue.disabled
            assert await r.tun.send_many(packets) == 40
            # The kernel chooses the only queue that is left for every flow.
            r.inject(20)
            assert await rest(r.tun.queues[0], 20) == list(range(20))
            r.tun.queues[0].disable()
            with pytest.raises(LinkDownError, match=r"enable\(\)"):
                await r.tun.send(packets[0])
            with pytest.raises(LinkDownError):
                r.tun.send_nowait(packets[0])
            for queue in r.tun.queues:
                queue.enable()
                assert not queue.disabled
            assert await r.tun.send_many(packets) == 40


async def test_a_disabled_queue_goes_on_waiting() -> None:
    async with rig("member") as r:
        task = await waiting(r.io.recv())
        queue = r.tun.queues[1]
        queue.disable()
        r.inject(1)
        assert number(await asyncio.wait_for(r.tun.recv(), 5)) == 0
        assert not task.done()
        queue.enable()
        await queue.send(udp(THEIRS, 9, OURS, r.sock.getsockname()[1]))
        r.inject(1)
        assert number(await asyncio.wait_for(task, 5)) == 1


async def test_disabling_or_enabling_twice_is_refused() -> None:
    async with aiotun.open_tun("many0", queues=2) as tun:
        queue = tun.queues[0]
        with pytest.raises(DeviceMismatchError):
            queue.enable()
        queue.disable()
        with pytest.raises(DeviceMismatchError) as caught:
            queue.disable()
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "many0")
        queue.enable()


async def test_a_single_queue_has_no_such_thing() -> None:
    async with aiotun.open_tun("one0") as tun:
        with pytest.raises(DeviceMismatchError, match="multi-queue"):
            tun.queues[0].disable()
        assert not tun.queues[0].disabled


async def test_set_carrier_switches_the_carrier() -> None:
    async with aiotun.open_tun("wire0") as tun:
        assert (await tun.link.info()).carrier
        tun.set_carrier(False)
        assert not (await tun.link.info()).carrier
        tun.set_carrier(True)
        assert (await tun.link.info()).carrier


# Programs in the kernel


def bpf_program(returns: int) -> int:
    """Load a socket filter that returns a constant (bpf(2), BPF_PROG_LOAD); its fd."""
    number = {"x86_64": 321, "aarch64": 280, "riscv64": 280}.get(platform.machine())
    if number is None:
        pytest.skip(f"no number of bpf(2) known here for {platform.machine()}")
    # r0 = returns; exit
    code = struct.pack("=BBhi", 0xB7, 0, 0, returns) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    instructions = ctypes.create_string_buffer(code)
    license_ = ctypes.create_string_buffer(b"MIT")
    attributes = struct.pack(
        "=IIQQIIQI", 1, 2, ctypes.addressof(instructions), ctypes.addressof(license_), 0, 0, 0, 0
    ).ljust(128, b"\0")
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(number, 5, ctypes.create_string_buffer(attributes), 128)
    if fd < 0:
        code_ = ctypes.get_errno()
        if code_ == errno.EPERM:
            pytest.skip("an ordinary user may load no BPF programs")
        raise OSError(code_, "bpf(2) refused the program")
    return fd


async def test_steering_by_a_program() -> None:
    async with rig("group") as r:
        program = bpf_program(returns=6)
        try:
            r.tun.set_steering_ebpf(program)
            r.inject(10)
            assert await rest(r.tun.queues[2], 10) == list(range(10))  # 6 modulo 4
            r.tun.set_steering_ebpf(None)
        finally:
            os.close(program)
        with pytest.raises(DeviceMismatchError, match="BPF"):
            r.tun.set_steering_ebpf(r.sock.fileno())


async def test_filtering_by_a_program() -> None:
    async with rig() as r:
        for returns, length in ((0, 0), (24, 24)):
            program = bpf_program(returns)
            try:
                r.tun.set_filter_ebpf(program)
            finally:
                os.close(program)
            r.inject(1)
            if length:
                assert len(r.tun.recv_nowait()) == length
            else:
                with pytest.raises(BlockingIOError):
                    r.tun.recv_nowait()
        r.tun.set_filter_ebpf(None)
        r.inject(1)
        assert await rest(r.tun, 1) == [2]


async def test_filters_of_a_tap() -> None:
    """A classic filter and an address filter; TUN devices have neither."""
    assert not hasattr(aiotun.TunDevice, "attach_filter")
    assert not hasattr(aiotun.TunDevice, "set_tx_filter")
    async with aiotun.open_tap("tap0", mac="02:00:00:00:00:01") as tap:
        peer, other = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("tap0", 0x88B5))

            def send(target: str, data: bytes = b"") -> None:
                frame = bytes.fromhex(target.replace(":", "")) + b"\x02\0\0\0\0\x01\x88\xb5" + data
                sock.send(frame)

            def received() -> list[bytes]:
                found = []
                try:
                    while True:
                        frame = tap.recv_nowait()
                        if frame[12:14] == b"\x88\xb5":
                            found.append(frame[14:])
                except BlockingIOError:
                    return found

            tap.set_tx_filter([peer])
            send(peer, b"1")
            send(other, b"2")
            send("ff:ff:ff:ff:ff:ff", b"3")
            assert received() == [b"1"]
            tap.set_tx_filter([peer, "ff:ff:ff:ff:ff:ff"])
            send("ff:ff:ff:ff:ff:ff", b"4")
            send("03:00:00:00:00:01", b"5")
            assert received() == [b"4"]
            tap.set_tx_filter([peer], all_multicast=True)
            send("03:00:00:00:00:01", b"6")
            assert received() == [b"6"]
            tap.set_tx_filter([])
            send(other, b"7")
            assert received() == [b"7"]
            with pytest.raises(ValueError, match="not a valid MAC"):
                tap.set_tx_filter(["nobody"])
            # ldb [14]; jeq #'y', keep all, drop
            tap.attach_filter(
                [(0x30, 0, 0, 14), (0x15, 0, 1, 121), (0x06, 0, 0, 0xFFFF), (6, 0, 0, 0)]
            )
            send(other, b"x")
            send(other, b"y")
            assert received() == [b"y"]
            tap.attach_filter(None)
            send(other, b"x")
            assert received() == [b"x"]
            with pytest.raises(DeviceMismatchError, match="filter"):
                tap.attach_filter([(0xFFFF, 0, 0, 0)])
            for wrong in ("x", [6], [(6, 0, 0)], [(6, 0, 0, -1)]):
                given: Any = wrong
                with pytest.raises(TypeError, match="4 integers"):
                    tap.attach_filter(given)
            with pytest.raises(DeviceMismatchError, match="filter"):  # not one instruction
                tap.attach_filter([(6, 0, 0, 0)] * 65_537)
            with pytest.raises(ValueError, match=r"at most 65,535 addresses, got 65,536"):
                tap.set_tx_filter([peer] * 65_536)
            given = "all"
            with pytest.raises(TypeError, match="all_multicast must be True or False"):
                tap.set_tx_filter([peer], all_multicast=given)
            for fd in (-1, 1 << 20, 1 << 40):
                with pytest.raises(ValueError, match="is not open"):
                    tap.set_filter_ebpf(fd)
                with pytest.raises(ValueError, match="is not open"):
                    tap.set_steering_ebpf(fd)


async def test_calls_on_a_closed_device_raise_device_closed_error() -> None:
    async with aiotun.open_tap("tap0") as tap:
        pass
    calls: list[Callable[[], object]] = [
        lambda: tap.set_carrier(True),
        lambda: tap.set_steering_ebpf(None),
        lambda: tap.set_filter_ebpf(None),
        lambda: tap.attach_filter(None),
        lambda: tap.set_tx_filter([]),
        tap.queues[0].disable,
        tap.queues[0].enable,
    ]
    for call in calls:
        with pytest.raises(aiotun.DeviceClosedError):
            call()


async def test_calls_on_a_deleted_device_raise_device_lost_error() -> None:
    async with aiotun.open_tap("tap0") as tap:
        ip("link", "del", "tap0")
        with pytest.raises(aiotun.DeviceLostError, match="deleted"):
            tap.set_carrier(True)
        with pytest.raises(aiotun.DeviceLostError):
            tap.queues[0].disable()
