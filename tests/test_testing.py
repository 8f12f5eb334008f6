"""The testing kit for users: devices in memory, fault injection, namespaces."""

import asyncio
import errno
import math
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun import DeviceClosedError, DeviceLostError, PacketError
from aiotun._kernel import isolation
from aiotun.testing import FaultCounts, FaultInjector, isolated, isolated_run, memory_pair

from .helpers import ip, make_icmp_echo, ordinary_python, wait_until


def packet(number: int, size_bytes: int = 30) -> bytes:
    return b"\x45" + number.to_bytes(4, "big").ljust(size_bytes - 1, b".")


def number(data: bytes) -> int:
    return int.from_bytes(data[1:5], "big")


# --- memory_pair ---------------------------------------------------------------------------------


async def test_a_memory_pair_passes_packets_both_ways() -> None:
    one, other = memory_pair()
    async with one, other:
        assert isinstance(one, aiotun.TunDevice)
        assert [(each.name, each.mtu, each.mode, each.index) for each in (one, other)] == [
            ("memory0", 1500, "tun", 0),
            ("memory1", 1500, "tun", 0),
        ]
        assert (one.offload, len(one.queues), one.closed) == ("off", 1, False)
        assert one.fileno() == one.queues[0].fileno() >= 0
        await one.send(packet(1))
        one.send_nowait(bytearray(packet(2)))
        assert await one.send_many([packet(3), memoryview(packet(4))]) == 2
        assert await other.recv() == packet(1)
        buffer = bytearray(100)
        assert await other.recv_into(buffer) == 30
        assert buffer[:30] == packet(2)
        assert other.recv_nowait() == packet(3)
        assert await other.recv_many() == [packet(4)]
        with pytest.raises(BlockingIOError):
            other.recv_nowait()
        await other.send(packet(5, 65_535))
        assert await one.recv() == packet(5, 65_535)
        await one.send(packet(6))
        with pytest.raises(aiotun.PacketTruncatedError):
            await other.recv_into(bytearray(3))
        assert other.stats.truncated == 1
        await one.send(make_icmp_echo("10.0.0.1", "10.0.0.2"))
        assert (await anext(other.decoded())).p == 1


async def test_a_pair_of_taps() -> None:
    one, other = memory_pair("tap", mtu=9000)
    async with one, other:
        assert isinstance(one, aiotun.TapDevice)
        assert (one.mode, one.mtu) == ("tap", 9000)
        with pytest.raises(PacketError, match="14-byte"):
            await one.send(bytes(13))
        await one.send(bytes(14))
        assert await other.recv() == bytes(14)
    wrong: Any = "bus"
    with pytest.raises(ValueError, match="'tun' or 'tap'"):
        memory_pair(wrong)


async def test_a_memory_device_refuses_what_the_kernel_would() -> None:
    one, other = memory_pair()
    async with one, other:
        for data in (b"", b"\x00"):
            with pytest.raises(PacketError) as caught:
                await one.send(data)
            assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "memory0")
            with pytest.raises(PacketError):
                one.send_nowait(data)
        with pytest.raises(PacketError) as caught:
            await one.send_many([packet(1), b"", packet(2)])
        assert caught.value.sent == 1
        assert one.stats.refused == 5
        assert await other.recv_many() == [packet(1)]


async def test_a_memory_device_refuses_what_takes_an_interface() -> None:
    one, other = memory_pair()
    tap, tap2 = memory_pair("tap")
    async with one, other, tap, tap2:
        link = one.link
        for request in (link.up, link.info, link.stats, link.addresses, link.routes):
            with pytest.raises(aiotun.LinkError, match="memory0 exists only in memory") as caught:
                await request()
            assert caught.value.errno == errno.EOPNOTSUPP
        with pytest.raises(aiotun.LinkError):
            async for _ in link.events():
                pass
        with pytest.raises(aiotun.LinkError):
            await link.set_mtu(1400)
        calls: list[Callable[[], None]] = [
            lambda: one.set_carrier(True),
            lambda: one.set_filter_ebpf(None),
            lambda: one.set_steering_ebpf(None),
            one.queues[0].disable,
            one.queues[0].enable,
            lambda: tap.attach_filter(None),
            lambda: tap.set_tx_filter([]),
        ]
        for call in calls:
            with pytest.raises(aiotun.DeviceMismatchError, match="no interface in the kernel"):
                call()


async def test_closing_one_end_is_a_loss_at_the_other() -> None:
    """Earlier packets arrive, then every call raises the loss; at the closed end iteration ends."""
    one, other = memory_pair()
    await one.send(packet(1))
    waiting = asyncio.create_task(one.recv())
    await asyncio.sleep(0)
    await one.aclose()
    with pytest.raises(DeviceClosedError):
        await waiting
    assert [each async for each in one] == []
    assert await other.recv() == packet(1)
    for attempt in (other.recv(), other.recv_many(), other.recv_into(bytearray(9)), anext(other)):
        with pytest.raises(DeviceLostError):
            await attempt
    with pytest.raises(DeviceLostError):
        other.recv_nowait()
    with pytest.raises(DeviceLostError):
        await other.send(packet(2))
    assert not other.closed
    await other.aclose()


@pytest.mark.parametrize("many", [False, True])
async def test_the_loss_wakes_who_waits(many: bool) -> None:
    one, other = memory_pair()
    tasks = [asyncio.create_task(other.recv_many()) for _ in range(3)]
    if not many:
        tasks = [*tasks[:1], asyncio.create_task(other.queues[0].recv_many())]
    await asyncio.sleep(0)
    one.close()
    for task in tasks:
        with pytest.raises(DeviceLostError):
            await asyncio.wait_for(task, 5)
    await other.aclose()
    await one.aclose()


async def test_the_rest_of_a_batch_before_the_loss() -> None:
    one, other = memory_pair()
    await one.send_many([packet(1), packet(2)])
    await one.aclose()
    assert await other.recv_many() == [packet(1), packet(2)]
    with pytest.raises(DeviceLostError):
        await other.recv_many()
    await other.aclose()


async def test_a_sender_waits_for_the_other_end() -> None:
    one, other = memory_pair()
    async with one, other:
        task = asyncio.create_task(one.send_many(packet(n) for n in range(5000)))
        got = []
        async for data in other:
            got.append(number(data))
            if len(got) == 5000:
                break
        assert got == list(range(5000))
        assert await task == 5000


async def test_a_peer_process_that_dies_with_packets_waiting() -> None:
    """It never read our packets: the kernel reports the end immediately."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with aiotun.Queue.from_fd(left.detach()) as queue:
        with right:
            peer = await asyncio.create_subprocess_exec("sleep", "60", stdin=right.fileno())
        await queue.send_many([packet(1), packet(2)])
        tasks = [asyncio.create_task(queue.recv()) for _ in range(2)]
        await asyncio.sleep(0)
        peer.kill()
        for task in tasks:
            with pytest.raises(DeviceLostError):
                await asyncio.wait_for(task, 5)
        with pytest.raises(DeviceLostError):
            await queue.send(packet(3))
        await peer.wait()


# --- FaultInjector -------------------------------------------------------------------------------


async def through(count: int = 1000, **faults: Any) -> tuple[list[bytes], FaultCounts]:
    """Send numbered packets through an injector; return those that arrive."""
    one, other = memory_pair()
    faulty = FaultInjector(one, **faults)
    got: list[bytes] = []

    async def collect() -> None:
        async for batch in other.batches():
            got.extend(batch)

    task = asyncio.create_task(collect())
    for n in range(count):
        await faulty.send(packet(n))
    if faults.get("delay") or faulty.reorder:
        await asyncio.sleep(faulty.delay_by * 1.5)
    counts = faulty.sent
    expected = counts.packets - counts.dropped + counts.duplicated
    await wait_until(lambda: len(got) >= expected)
    await faulty.aclose()
    with pytest.raises(DeviceLostError):
        await task
    await other.aclose()
    assert faulty.sent.lost == 0
    assert faulty.received == FaultCounts()
    return got, counts


def near(count: int, rate: float, of: int = 1000) -> bool:
    return abs(count - rate * of) < 0.3 * rate * of


async def test_a_pair_of_rates_is_for_received_and_for_sent_packets() -> None:
    one, other = memory_pair()
    async with FaultInjector(one, drop=(1, 0), corrupt=(0, 1)) as faulty, other:
        await faulty.send(packet(1))
        assert await other.recv() != packet(1)
        await other.send(packet(2))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(faulty.recv(), 0.01)
        assert (faulty.received.dropped, faulty.sent.dropped) == (1, 0)
        faulty.drop = 0
        await other.send(packet(3))
        assert await faulty.recv() == packet(3)


@pytest.mark.parametrize(
    ("rate", "error"),
    [((0.1,), TypeError), ((0, 0, 0), TypeError), ("0.1", TypeError), ((0, 1.1), ValueError)],
)
async def test_a_rate_is_a_number_or_a_pair(rate: Any, error: type[Exception]) -> None:
    one, other = memory_pair()
    async with one, other:
        with pytest.raises(error, match="a rate must be a number"):
            FaultInjector(one, drop=rate)


async def test_without_faults_every_packet_passes_in_order() -> None:
    got, counts = await through()
    assert [number(each) for each in got] == list(range(1000))
    assert counts == FaultCounts(packets=1000)


async def test_drop_loses_the_given_share_and_repeats_with_the_seed() -> None:
    got, counts = await through(drop=0.2)
    assert near(counts.dropped, 0.2)
    assert len(got) == 1000 - counts.dropped
    assert [number(each) for each in got] == sorted({number(each) for each in got})
    assert await through(drop=0.2) == (got, counts)  # only the seed decides
    assert await through(drop=0.2, seed=1) != (got, counts)
    # A second kind of fault does not change which packets are dropped.
    beside, _ = await through(drop=0.2, duplicate=0.5)
    assert {number(each) for each in beside} == {number(each) for each in got}
    got, counts = await through(drop=1)
    assert (got, counts.dropped) == ([], 1000)


async def test_duplicate_repeats_the_given_share() -> None:
    got, counts = await through(duplicate=0.2)
    assert near(counts.duplicated, 0.2)
    times = Counter(number(each) for each in got)
    assert sorted(times) == list(range(1000))
    assert sum(count == 2 for count in times.values()) == counts.duplicated
    assert max(times.values()) == 2


async def test_corrupt_flips_one_bit_in_the_given_share() -> None:
    got, counts = await through(corrupt=0.2)
    assert near(counts.corrupted, 0.2)
    changed = 0
    for place, data in enumerate(got):
        assert data[0] == 0x45
        difference = int.from_bytes(data, "big") ^ int.from_bytes(packet(place), "big")
        assert difference.bit_count() <= 1
        changed += difference.bit_count()
    assert changed == counts.corrupted


async def test_reorder_changes_the_order_and_loses_nothing() -> None:
    got, counts = await through(reorder=0.2)
    assert near(counts.reordered, 0.2)
    numbers = [number(each) for each in got]
    assert sorted(numbers) == list(range(1000))
    assert numbers != sorted(numbers)
    assert await through(reorder=0.2) == (got, counts)
    # No packet follows, so they are released after a time.
    got, counts = await through(3, reorder=1)
    assert sorted(number(each) for each in got) == [0, 1, 2]


async def test_what_is_held_back_follows_the_next() -> None:
    one, other = memory_pair()
    async with FaultInjector(one, reorder=0.5, delay_by=1000) as faulty, other:
        expected: list[int] = []
        held: list[int] = []
        for n in range(50):
            before = faulty.sent.reordered
            await faulty.send(packet(n))
            if faulty.sent.reordered > before:
                held.append(n)
            else:
                expected += [n, *held]
                held = []
        assert 10 < faulty.sent.reordered < 40
        assert [number(each) for each in await other.recv_many()] == expected
    assert faulty.sent.lost == len(held)


async def test_delayed_packets_for_several_receivers() -> None:
    one, other = memory_pair()
    async with FaultInjector(one, delay=1, duplicate=1, delay_by=0.01) as faulty, other:
        tasks = [asyncio.create_task(faulty.recv()) for _ in range(2)]
        await other.send(packet(1))
        assert await asyncio.wait_for(asyncio.gather(*tasks), 5) == [packet(1)] * 2


async def test_delayed_packets_wait_for_room() -> None:
    """All are released at the same time, and the other end has no room for them."""
    one, other = memory_pair()
    async with FaultInjector(one, delay=1, delay_by=0.001) as faulty, other:
        assert await faulty.send_many(packet(n) for n in range(3000)) == 3000
        got: list[int] = []
        while len(got) < 3000:
            got += map(number, await asyncio.wait_for(other.recv_many(), 5))
        assert sorted(got) == list(range(3000))
        assert faulty.sent.lost == 0


async def test_delay_holds_packets_back_and_loses_nothing() -> None:
    got, counts = await through(delay=0.2)
    assert near(counts.delayed, 0.2)
    numbers = [number(each) for each in got]
    assert sorted(numbers) == list(range(1000))
    assert numbers != sorted(numbers)
    start = asyncio.get_running_loop().time()
    await through(1, delay=1, delay_by=0.2)
    assert asyncio.get_running_loop().time() - start >= 0.2


async def incoming(count: int, **faults: Any) -> tuple[list[int], FaultCounts]:
    """Receive numbered packets through an injector, by every method in turn."""
    one, other = memory_pair()
    async with FaultInjector(one, **faults) as faulty, other:
        feed = asyncio.create_task(other.send_many(packet(n) for n in range(count)))
        got: list[int] = []
        buffer = bytearray(100)
        step = 0

        def expected() -> int:
            counts = faulty.received
            return counts.packets - counts.dropped + counts.duplicated

        while faulty.received.packets < count or len(got) < expected():
            step += 1
            try:
                async with asyncio.timeout(0.5):
                    match step % 5:
                        case 0:
                            got.append(number(await faulty.recv()))
                        case 1:
                            got += map(number, await faulty.recv_many(3))
                        case 2:
                            length = await faulty.recv_into(buffer)
                            got.append(number(bytes(buffer[:length])))
                        case 3:
                            got.append(number(await anext(aiter(faulty))))
                        case _:
                            got.append(number(faulty.recv_nowait()))
            except (BlockingIOError, TimeoutError):
                continue
        await feed
        assert faulty.sent == FaultCounts()
        return got, faulty.received


async def test_faults_of_what_is_received() -> None:
    assert await incoming(300) == (list(range(300)), FaultCounts(packets=300))
    got, counts = await incoming(300, drop=0.1, duplicate=0.1)
    assert counts.dropped > 10
    assert counts.duplicated > 10
    assert got == sorted(got)
    assert (got, counts) == await incoming(300, drop=0.1, duplicate=0.1)
    got, counts = await incoming(100, reorder=0.3)
    assert sorted(got) == list(range(100))
    assert got != sorted(got)
    got, counts = await incoming(100, delay=0.3, delay_by=0.01)
    assert sorted(got) == list(range(100))
    assert counts.delayed > 10


async def test_cancellation_loses_nothing_behind_faults() -> None:
    """Several receivers, some of which are cancelled at any time."""
    one, other = memory_pair()
    async with FaultInjector(one) as faulty, other:
        got: list[int] = []

        async def take() -> None:
            got.append(number(await faulty.recv()))

        sent = 0
        while sent < 200:
            tasks = [asyncio.create_task(take()) for _ in range(4)]
            for turn in range(sent % 5):
                if turn == 1:
                    await other.send_many(packet(n) for n in range(sent, sent + 2))
                await asyncio.sleep(0)
            if sent % 5 < 2:
                await other.send_many(packet(n) for n in range(sent, sent + 2))
            sent += 2
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        while len(got) < 200:
            await asyncio.wait_for(take(), 5)
        assert got == list(range(200))
        with pytest.raises(BlockingIOError):
            faulty.recv_nowait()


async def test_closing_a_faulty_device_wakes_its_receivers() -> None:
    one, other = memory_pair()
    faulty = FaultInjector(one, delay=1, delay_by=1000)
    await faulty.send(packet(1))
    await other.send(packet(2))
    tasks = [asyncio.create_task(faulty.recv()) for _ in range(2)]
    await wait_until(lambda: faulty.received.delayed == 1)
    await faulty.aclose()
    for task in tasks:
        with pytest.raises(DeviceClosedError):
            await asyncio.wait_for(task, 5)
    assert (faulty.sent.lost, faulty.received.lost) == (1, 1)
    assert faulty.closed
    assert [each async for each in faulty] == []
    for attempt in (faulty.send(packet(1)), faulty.send_many([packet(1)]), faulty.recv()):
        with pytest.raises(DeviceClosedError):
            await attempt
    with pytest.raises(DeviceClosedError):
        faulty.send_nowait(packet(1))
    await other.aclose()

    one, other = memory_pair()
    async with FaultInjector(one) as faulty:
        task = asyncio.create_task(faulty.recv())
        await asyncio.sleep(0)
        await other.aclose()
        with pytest.raises(DeviceLostError):
            await asyncio.wait_for(task, 5)


async def test_a_real_device_behind_faults() -> None:
    async with aiotun.open_tun("bad0", addresses=["10.9.0.1/24"]) as tun:
        faulty = FaultInjector(tun, duplicate=1)
        assert (faulty.name, faulty.mode, faulty.mtu) == ("bad0", "tun", 1500)
        assert (faulty.index, faulty.offload, faulty.link) == (tun.index, "off", tun.link)
        assert faulty.fileno() == tun.fileno()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.9.0.2", 9))
        first = await asyncio.wait_for(faulty.recv(), 5)
        assert await asyncio.wait_for(faulty.recv(), 5) == first
        decoded = aiotun.decode_packet(first)
        assert decoded.udp.data == b"x"
        await tun.link.down()
        with pytest.raises(aiotun.LinkDownError):
            await faulty.send(first)
        assert faulty.sent == FaultCounts(packets=1, duplicated=1, lost=1)


def test_rates_are_checked() -> None:
    one, other = memory_pair()
    for wrong in ({"drop": -0.1}, {"delay": 1.1}, {"corrupt": float("nan")}, {"delay_by": -1}):
        with pytest.raises(ValueError, match="must be"):
            FaultInjector(one, **wrong)
    one.close()
    other.close()


# --- Namespaces ----------------------------------------------------------------------------------


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_isolated_enters_a_new_namespace_and_comes_back() -> None:
    ip("tuntap", "add", "dev", "outer0", "mode", "tun")
    outside = here()
    with isolated() as fd:
        assert os.fstat(fd).st_ino == here() != outside
        assert socket.if_nameindex() == [(1, "lo")]
        assert "UP" in ip("link", "show", "lo")[0]["flags"]
        with isolated():
            assert here() not in (outside, os.fstat(fd).st_ino)
        assert os.fstat(fd).st_ino == here()
    assert here() == outside

    def fail() -> None:
        with isolated():
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert here() == outside


def test_isolated_moves_one_thread() -> None:
    seen = []
    outside = here()
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        seen.append(here())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with isolated():
        inside.set()
        done.wait(10)
    thread.join()
    assert seen == [outside]


def test_isolated_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When unshare(2) fails, and when it returns success without doing anything."""
    outside = here()
    ran = []

    def attempt() -> None:
        with isolated():
            ran.append(1)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("aiotun._kernel.isolation._libc_call", refuse)
    with pytest.raises(aiotun.NotPermittedError, match="--aiotun-isolate"):
        attempt()
    monkeypatch.setattr("aiotun._kernel.isolation._libc_call", lambda *_: None)
    with pytest.raises(RuntimeError, match="did not move this thread"):
        attempt()
    assert (ran, here()) == ([], outside)


def _look(*more: int, key: str = "") -> dict[str, Any]:
    return {
        "inode": here(),
        "names": [name for _, name in socket.if_nameindex()],
        "sysfs": os.stat("/sys").st_dev,
        "uid": os.geteuid(),
        "arguments": (more, key),
    }


async def _open() -> str:
    async with aiotun.open_tun(addresses=["10.0.0.1/24"]) as tun:
        return tun.name


def _open_one() -> str:
    return asyncio.run(_open())


def _raise() -> None:
    raise LookupError("from inside")


def _die() -> None:
    os._exit(3)


def _give_a_lambda() -> object:
    return lambda: None


def test_isolated_run_calls_a_function_in_new_namespaces() -> None:
    ip("tuntap", "add", "dev", "outer0", "mode", "tun")
    seen = isolated_run(_look, 1, 2, key="three")
    assert seen.pop("inode") != here()
    assert seen.pop("sysfs") != os.stat("/sys").st_dev  # a new mount, for that namespace
    assert seen == {"names": ["lo"], "uid": 0, "arguments": ((1, 2), "three")}
    assert isolated_run(_open_one) == "tun0"
    with pytest.raises(LookupError, match="from inside") as caught:
        isolated_run(_raise)
    assert "in _raise" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="status 3"):
        isolated_run(_die)
    with pytest.raises(RuntimeError, match="can't be sent back"):
        isolated_run(_give_a_lambda)


def test_isolated_run_as_an_ordinary_user() -> None:
    """It uses a user namespace; if those are forbidden, it raises and runs nothing."""
    python, env = ordinary_python()
    code = """if True:
    import os, socket
    from aiotun.testing import isolated, isolated_run

    if __name__ == "__main__":
        before = os.stat("/proc/self/ns/net").st_ino
        try:
            with isolated():
                print("never")
        except PermissionError as error:
            print("refused", "isolated_run" in error.strerror)
        print(isolated_run(os.geteuid), isolated_run(socket.if_nameindex))
        print(os.stat("/proc/self/ns/net").st_ino == before, os.geteuid() != 0)
    """
    # Start in a folder that this user may enter, as spawned processes must; the checkout may not
    # be.
    done = subprocess.run([*python, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.stdout.splitlines() == ["refused True", "0 [(1, 'lo')]", "True True"], done.stderr
    code = """if True:
    import os
    from aiotun.testing import isolated_run

    if __name__ == "__main__":
        try:
            isolated_run(os.mkdir, "/run/aiotun-user/never")
        except PermissionError as error:
            print("refused", error.strerror)
    """
    wrapped = ["unshare", "-r", "sh", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"']
    command = [*python[: python.index("--") + 1], *wrapped, "sh", "setpriv", "--bounding-set=-all"]
    command += ["--inh-caps=-all", *python[python.index("--") + 1 :]]
    done = subprocess.run([*command, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.stdout.startswith("refused private namespaces are not allowed here"), done.stderr


def test_a_process_with_threads_is_not_moved() -> None:
    outside = here()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="only a process with one thread"):
            isolation.enter()
    finally:
        done.set()
        thread.join()
    assert here() == outside


async def test_a_pair_is_captured_as_any_device_is(tmp_path: Path) -> None:
    one, other = memory_pair()
    async with one, other:
        writer = aiotun.capture.PcapWriter(tmp_path / "pair.pcap")
        with one.capture(writer):
            await one.send(packet(1))
            await other.send(packet(2))
            assert await one.recv() == packet(2)
            with pytest.raises(PacketError):
                one.send_nowait(b"")
        await other.send(packet(3))
        assert await one.recv() == packet(3)
        await writer.aclose()
        await other.aclose()
        with pytest.raises(DeviceLostError):
            await one.recv()
    written = (tmp_path / "pair.pcap").read_bytes()
    assert [packet(each) in written for each in (1, 2, 3)] == [True, True, False]


async def test_bandwidth_lets_packets_through_one_after_the_other() -> None:
    """100 packets of 1,000 bytes take 80 ms at 10 Mbit/s, and stay in order."""
    one, other = memory_pair()
    packets = [packet(number, 1000) for number in range(100)]
    async with FaultInjector(one, bandwidth=10e6) as faulty, other:
        began = time.monotonic()
        for each in packets:
            await faulty.send(each)
        got = [await other.recv() for _ in packets]
        assert time.monotonic() - began >= 0.079
        assert got == packets
        assert faulty.sent == FaultCounts(packets=100)


async def test_bandwidth_of_each_direction() -> None:
    one, other = memory_pair()
    async with FaultInjector(one, bandwidth=(math.inf, 1.0)) as faulty, other:
        await faulty.send(packet(0, 100))
        await other.send(packet(1, 100))
        assert await faulty.recv() == packet(1, 100)
        with pytest.raises(BlockingIOError):
            other.recv_nowait()
    assert faulty.sent.lost == 1


async def test_a_line_of_small_bandwidth_overflows() -> None:
    one, other = memory_pair()
    async with FaultInjector(one, bandwidth=1.0) as faulty, other:
        for number in range(1100):
            await faulty.send(packet(number, 100))
        assert faulty.sent.overflowed == 100


@pytest.mark.parametrize("bandwidth", [0, -1.0, (1.0, 0.0), float("nan")])
async def test_what_is_no_bandwidth(bandwidth: float | tuple[float, float]) -> None:
    one, other = memory_pair()
    async with one, other:
        with pytest.raises(ValueError, match="bandwidth"):
            FaultInjector(one, bandwidth=bandwidth)


def test_without_delays_packets_pass_without_a_loop() -> None:
    one, other = memory_pair()
    faulty = FaultInjector(one)
    try:
        faulty.send_nowait(packet(1))
        assert other.recv_nowait() == packet(1)
    finally:
        faulty.close()
        other.close()


# --- arguments of a wrong type --------------------------------------------------------------------


class _Protocol(asyncio.DatagramProtocol):
    pass


A_CLASS: Any = _Protocol
TEXT: Any = "tun0"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda tun: tun.capture("packets.pcap"), "capture needs a PcapWriter, got 'packets.pcap'"),
        (lambda tun: tun.set_carrier("on"), "on must be True or False, got 'on'"),
        (lambda tun: tun.set_steering_ebpf("x"), "program must be the fd of a BPF program"),
        (lambda tun: tun.set_filter_ebpf("x"), "program must be the fd of a BPF program"),
        (lambda tun: aiotun.endpoint(tun, A_CLASS), r"write _Protocol\(\)"),
        (lambda _: FaultInjector(TEXT), "device must be an open device, got 'tun0'"),
    ],
)
async def test_an_argument_of_a_wrong_type_is_named(
    call: Callable[[Any], object], said: str
) -> None:
    one, other = memory_pair()
    with pytest.raises(TypeError, match=said):
        call(one)
    assert not one.closed
    await one.aclose()
    await other.aclose()


async def test_what_is_not_a_run_is_not_sent() -> None:
    one, other = memory_pair()
    not_a_run: Any = b"packets"
    with pytest.raises(TypeError, match=r"send_run needs an aiotun\.runs\.Run, not bytes"):
        await one.send_run(not_a_run)
    async with aiotun.open_datagrams(("127.0.0.1", 0), receive_bytes=1 << 20) as sock:
        with pytest.raises(TypeError, match=r"send_run needs an aiotun\.runs\.Run, not bytes"):
            await sock.send_run(not_a_run, ("127.0.0.1", 9))
    await one.aclose()
    await other.aclose()
