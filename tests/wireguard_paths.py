"""The two paths of the WireGuard example's data: lists, and runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from wireguard.cookies import Endpoint
from wireguard.interface import Interface
from wireguard.runs import Opener, Sealer

from aiotun._packets.runs import Layout, leading, place
from aiotun.runs import Run

__all__ = ["by_runs", "messages_run", "packets_run", "runs_of"]

_ROOM = 1 << 17


def packets_run(packets: Sequence[bytes], mtu: int = 1420) -> Run:
    """The run that `recv_run` returns for packets of one size and pair of addresses."""
    buffer = memoryview(bytearray(b"\xa5" * _ROOM))
    measures = place(buffer, Layout(16, 16, 16, mtu, 256), packets)
    assert measures is not None
    count, size, last, stride = measures
    return Run(buffer, 16, stride, size, last, count)


def messages_run(messages: Sequence[bytes]) -> Run:
    """The run that a socket's `recv_run` returns for datagrams of one size."""
    buffer = memoryview(bytearray(_ROOM))
    data = b"".join(messages)
    buffer[: len(data)] = data
    size = len(messages[0])
    return Run(buffer, 0, size, size, len(messages[-1]), len(messages))


def runs_of(packets: Iterable[bytes], mtu: int = 1420) -> Iterator[list[bytes]]:
    """Divide packets as `recv_run` does."""
    left = list(packets)
    while left:
        run = leading(left, Layout(16, 16, 16, mtu, 45), _ROOM, False)
        yield run
        del left[: len(run)]


def datagram_runs(datagrams: Iterable[bytes]) -> Iterator[list[bytes]]:
    run: list[bytes] = []
    for datagram in datagrams:
        if run and (len(run[-1]) != len(run[0]) or len(datagram) > len(run[0])):
            yield run
            run = []
        run.append(datagram)
    if run:
        yield run


def by_runs(patch: pytest.MonkeyPatch) -> None:
    """Have interfaces send and receive by runs, and with lists only what runs leave to them."""
    send: Callable[..., None] = Interface.send
    receive: Callable[..., list[bytes]] = Interface.receive

    def send_runs(self: Interface, packets: Iterable[bytes], now: float) -> None:
        for run in runs_of(packets, self.mtu):
            messages = packets_run(run, self.mtu)
            endpoint = Sealer(self).seal(messages, now)
            if endpoint is None:
                send(self, run, now)
            else:
                self.outgoing.append((endpoint, messages.segments()))

    def receive_runs(
        self: Interface, datagrams: Sequence[bytes], source: Endpoint, now: float
    ) -> list[bytes]:
        packets: list[bytes] = []
        for run in datagram_runs(datagrams):
            opened = Opener(self).open(messages_run(run), source, now)
            if opened is None:
                packets += receive(self, run, source, now)
            else:
                packets += opened.segments()
        return packets

    patch.setattr(Interface, "send", send_runs)
    patch.setattr(Interface, "receive", receive_runs)
