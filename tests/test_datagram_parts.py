"""Which datagrams go in one run, which addresses are valid, and which kernels corrupt runs."""

import itertools
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotun._datagrams.addresses import check_address, family_of, packed
from aiotun._datagrams.cutting import cut
from aiotun._kernel.udp import corrupts_full_tails
from aiotun._packets import native
from aiotun.datagrams import segments_for

SIZES = st.lists(st.sampled_from([0, 1, 7, 600, 1400, 1400, 9000, 40_000, 65_507]), max_size=256)


def lengths(runs: list[tuple[int, int]]) -> list[int]:
    return [end - start for start, end in runs]


@given(SIZES, st.sampled_from([0, 1399, 1400, 65_507]), st.booleans())
def test_runs_hold_every_datagram_once_and_are_what_the_kernel_takes(
    sizes: list[int], largest: int, full_tails: bool
) -> None:
    runs = cut(sizes, largest, full_tails)
    assert list(itertools.chain(*(range(*run) for run in runs))) == [*range(len(sizes))]
    for start, end in runs:
        run = sizes[start:end]
        if len(run) == 1:
            continue
        assert set(run[:-1]) == {run[0]}
        assert 0 < run[-1] <= run[0] <= largest
        assert len(run) <= 64
        assert sum(run) <= 65_487
        assert full_tails or run[-1] < run[0]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1400] * 45, [45]),
        ([1400] * 44 + [200], [45]),
        ([1400] * 90, [45, 45]),
        ([1400] * 47, [23, 24]),
        ([100] * 65, [32, 33]),
        ([1400, 1400, 200, 1400, 1400], [3, 2]),
        ([200, 1400, 1400], [1, 2]),
        ([0, 0, 5], [1, 1, 1]),
        ([40_000] * 3, [1, 1, 1]),
    ],
)
def test_runs_are_cut_evenly(sizes: list[int], expected: list[int]) -> None:
    assert lengths(cut(sizes, 65_507)) == expected


def test_where_full_tails_are_corrupted_only_runs_with_a_shorter_tail_go() -> None:
    assert lengths(cut([1400] * 3, 65_507, full_tails=False)) == [1, 1, 1]
    assert lengths(cut([1400] * 3 + [5], 65_507, full_tails=False)) == [4]
    assert lengths(cut([1400] * 90 + [5], 65_507, full_tails=False)) == [1] * 45 + [46]


@pytest.mark.parametrize(
    ("release", "corrupts"),
    [
        ("6.18.44", False),
        ("7.0.0-rc1", True),
        ("7.0", True),
        ("7.1.4-generic", True),
        ("7.1.5", False),
        ("7.2.0", False),
        ("unknown", False),
    ],
)
def test_kernels_that_corrupt_runs_are_known_by_version(release: str, corrupts: bool) -> None:
    assert corrupts_full_tails(release) == corrupts


def test_addresses_become_what_the_kernel_tells() -> None:
    assert check_address(socket.AF_INET, ("192.0.2.1", 9)) == ("192.0.2.1", 9)
    assert check_address(socket.AF_INET6, ("FD00:0::1", 9)) == ("fd00::1", 9, 0, 0)
    assert check_address(socket.AF_INET6, ("fe80::1", 9, 0, 3)) == ("fe80::1", 9, 0, 3)
    mapped = check_address(socket.AF_INET6, ("::ffff:192.0.2.1", 9))
    assert mapped == ("::ffff:192.0.2.1", 9, 0, 0)
    assert family_of(("::", 0)) == socket.AF_INET6


@pytest.mark.parametrize(
    "address",
    [
        ("localhost", 1),
        ("", 1),
        ("192.0.2.1", -1),
        ("192.0.2.1", 65_536),
        ("192.0.2.1", 1, 0, 0),
        ("::1", 1),
        ("fe80::1%lo", 1),
        ("1.2.3.4\0", 1),
    ],
)
def test_what_is_no_address_of_the_family_is_a_value_error(address: Any) -> None:
    with pytest.raises(ValueError, match=r"not a(n IPv4| valid IP) address|must be 0 to|a zone"):
        check_address(socket.AF_INET, address)


@pytest.mark.parametrize("address", [None, "192.0.2.1:9", ("192.0.2.1",), (b"192.0.2.1", 9), 5])
def test_what_is_no_socket_tuple_is_a_type_error(address: Any) -> None:
    with pytest.raises(TypeError, match="must be a tuple"):
        family_of(address)


def test_a_tunnel_can_ask_how_many_packets_fit_a_run() -> None:
    assert segments_for(1420, 32) == 45
    assert segments_for(100, 32) == 64
    assert segments_for(65_000, 1000) == 1
    with pytest.raises(ValueError, match="mtu must be at least 1"):
        segments_for(0, 0)


@pytest.mark.skipif(not native.SPEEDUPS, reason="the Python twin leaves all to the caller")
class TestSendRun:
    """send_run of the C module; tests/integration/test_datagrams.py has what it sends."""

    @pytest.mark.parametrize(
        "datagrams",
        [
            [],
            [b"one"],
            [b"", b""],
            [b"ab", b"abc"],
            [b"ab", b"a", b"ab"],
            [b"ab", b""],
            [b"ab"] * 65,
            [bytes(1400)] * 47,
            [bytes(1401), bytes(1401)],
            [b"ab", bytearray(b"ab")],
            [b"ab", None],
        ],
    )
    def test_what_is_not_one_run_is_left_to_the_caller(self, datagrams: Any) -> None:
        assert native.send_run(0, datagrams, None, 1400) == 0

    def test_an_error_is_raised_and_nothing_was_sent(self) -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            native.send_run(0x7FFF_FFFF, [b"a", b"b"], None, 1400)

    @pytest.mark.parametrize(
        ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    )
    def test_the_address_is_the_kernels(self, family: int, host: str) -> None:
        with (
            socket.socket(family, socket.SOCK_DGRAM) as one,
            socket.socket(family, socket.SOCK_DGRAM) as other,
        ):
            other.bind((host, 0))
            where = other.getsockname()
            run: list[Any] = [b"ab", b"c"]
            assert native.send_run(one.fileno(), run, packed(where), 1400) == 2
            assert [other.recv(9, socket.MSG_DONTWAIT) for _ in range(2)] == run
            one.connect(where)
            assert native.send_run(one.fileno(), run, None, 1400) == 2

    def test_invalid_arguments(self) -> None:
        wrong: Any = ((0, [], None), (0, (), None, 1), (0, [], "x", 1), ("0", [], None, 1))
        for arguments in wrong:
            with pytest.raises(TypeError):
                native.send_run(*arguments)
        for fd, largest in ((-1, 1), (0, -1), (0, 1 << 16)):
            with pytest.raises(ValueError, match="must be 0 to"):
                native.send_run(fd, [], None, largest)
