"""The examples' UDP socket: runs of datagrams, with and without the kernel's segmentation."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any

import pytest
from _datagrams import Address, DatagramSocket, Run, bind, resolve

from ..helpers import ip, wait_until

HERE: dict[int, tuple[socket.AddressFamily, Address]] = {
    4: (socket.AF_INET, ("127.0.0.1", 0)),
    6: (socket.AF_INET6, ("::1", 0, 0, 0)),
}
SIZES = [1000] * 100 + [400] + [1200] * 3 + [0, 0, 1200, 1300] + [9000] * 10 + [7]


class Pair:
    """Two sockets. `got` has what the second received; `runs` has the datagrams of each read."""

    def __init__(self, version: int, offload: bool = True) -> None:
        self.one = DatagramSocket(bind(*HERE[version]), offload=offload)
        self.other = DatagramSocket(bind(*HERE[version]), offload=offload)
        self.got: list[bytes] = []
        self.runs: list[int] = []
        self._take = self.other._take
        self.other._take = self._counted  # type: ignore[method-assign]
        self.other.start(self._received)

    def _counted(self) -> Run:
        run = self._take()
        self.runs.append(len(run[0]))
        return run

    def _received(self, runs: list[Run]) -> None:
        for datagrams, source in runs:
            assert source == self.one.address
            self.got += datagrams

    def close(self) -> None:
        self.one.close()
        self.other.close()


def numbered(sizes: list[int]) -> list[bytes]:
    return [(bytes([number]) * size) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("offload", [True, False])
async def test_datagrams_come_as_they_were_sent(version: int, offload: bool) -> None:
    pair = Pair(version, offload)
    sent = numbered(SIZES)
    await pair.one.send(sent, pair.other.address)
    await wait_until(lambda: len(pair.got) >= len(sent))
    assert pair.got == sent
    assert not pair.one.unsent
    assert (max(pair.runs) > 40) == offload
    pair.close()


async def test_runs_that_do_not_fit_the_path_go_singly() -> None:
    ip("link", "set", "lo", "mtu", "1280")
    pair = Pair(4)
    sent = numbered([1400] * 50 + [1000] * 50)
    await pair.one.send(sent, pair.other.address)
    await wait_until(lambda: len(pair.got) >= len(sent))
    assert pair.got == sent
    assert not pair.one.unsent
    assert max(pair.runs) > 40  # the smaller ones still went in runs
    pair.close()


async def test_refused_datagrams_are_counted() -> None:
    pair = Pair(4)
    await pair.one.send([b"too large" * 8000, b"fits"], pair.other.address)
    await pair.one.send([b"a", b"b"], ("192.0.2.1", 9))
    await wait_until(lambda: pair.got == [b"fits"])
    assert pair.one.unsent == {"EMSGSIZE": 1, "ENETUNREACH": 2}
    pair.close()


async def test_what_comes_from_one_address_is_given_at_once() -> None:
    pair, third = Pair(4, offload=False), DatagramSocket(bind(*HERE[4]))
    given: list[tuple[int, Address]] = []
    pair.other._received = lambda runs: given.extend((len(run), source) for run, source in runs)
    pair.other._burst = True
    for sock in (pair.one, third, pair.one):
        await sock.send(numbered([100] * 20), pair.other.address)
    await wait_until(lambda: sum(count for count, _ in given) == 60)
    one, other = pair.one.address, third.address
    assert given == [(20, one), (20, other), (20, one)]
    third.close()
    pair.close()


async def test_datagrams_dropped_from_a_full_buffer_are_counted() -> None:
    one, other = (DatagramSocket(bind(*HERE[4])) for _ in range(2))
    other._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    await one.send(numbered(list(range(1000, 1100))), other.address)  # not in runs
    came = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            came += len(other._take()[0])
    assert 0 < came < 100
    assert other.overflowed == 100 - came
    one.close()
    other.close()


class Old:
    """A socket of a kernel without UDP_SEGMENT and UDP_GRO, or one whose route lacks offload."""

    def __init__(self, real: socket.socket, number: int) -> None:
        self.real, self.number, self.refused = real, number, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        raise OSError(errno.ENOPROTOOPT, "no such option")

    def sendmsg(self, *args: Any) -> int:
        self.refused += 1
        raise OSError(self.number, "no such control message")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
async def test_without_segmentation_datagrams_go_singly(number: int) -> None:
    old = Old(bind(*HERE[4]), number)
    pair = Pair(4)
    one = DatagramSocket(old)  # type: ignore[arg-type]
    pair.one.close()
    pair.one = one
    sent = numbered([1000] * 60 + [500] * 60)
    await one.send(sent, pair.other.address)
    await wait_until(lambda: len(pair.got) >= len(sent))
    assert pair.got == sent
    assert not one.unsent
    assert max(pair.runs) == 1
    # A smaller run may fit another path. Without any offload no run goes.
    assert old.refused == (2 if number == errno.EINVAL else 1)
    pair.close()


class Full:
    """A socket whose buffer is full until the test makes room."""

    def __init__(self, real: socket.socket) -> None:
        self.real, self.room = real, 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def sendto(self, *args: Any) -> int:
        if not self.room:
            raise BlockingIOError
        self.room -= 1
        return self.real.sendto(*args)


async def test_send_waits_while_the_buffer_is_full() -> None:
    pair = Pair(4, offload=False)
    full = Full(pair.one._sock)
    waits = 0
    writable: Callable[[], Any] = pair.one._writable

    async def room() -> None:
        nonlocal waits
        waits += 1
        full.room = 2
        await writable()

    pair.one._sock = full  # type: ignore[assignment]
    pair.one._writable = room  # type: ignore[method-assign]
    sent = numbered([100] * 7)
    await asyncio.wait_for(pair.one.send(sent, pair.other.address), 5)
    await wait_until(lambda: pair.got == sent)
    assert waits == 3
    full.room = 2
    pair.one.send_nowait(sent, pair.other.address)
    assert pair.one.unsent == {"EAGAIN": 5}
    pair.one._sock = full.real
    pair.close()


def test_resolve_takes_host_and_port_and_refuses_anything_else() -> None:
    assert resolve("127.0.0.1:80") == (socket.AF_INET, ("127.0.0.1", 80))
    assert resolve("[::1]:80") == (socket.AF_INET6, ("::1", 80, 0, 0))
    with pytest.raises(ValueError, match="HOST:PORT"):
        resolve("nowhere")
