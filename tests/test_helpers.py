"""The helpers are checked against the kernel, or the tests built on them would prove little."""

import asyncio
import socket

import pytest

from .helpers import checksum, ip, make_icmp_echo, udp_burst, wait_until


async def test_wait_until_waits_and_gives_up() -> None:
    seen: list[int] = []
    asyncio.get_running_loop().call_later(0.01, seen.append, 1)
    await wait_until(lambda: bool(seen))
    with pytest.raises(TimeoutError):
        await wait_until(lambda: False, timeout=0.01)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 7, bytes(range(100))])
def test_checksum_makes_the_whole_sum_up_to_zero(data: bytes) -> None:
    whole = data + bytes(len(data) % 2) + checksum(data).to_bytes(2, "big")
    assert checksum(whole) == 0


@pytest.mark.parametrize(
    ("address", "family", "protocol", "offset"),
    [
        ("127.0.0.1", socket.AF_INET, socket.IPPROTO_ICMP, 0),
        ("::1", socket.AF_INET6, socket.IPPROTO_ICMPV6, 40),
    ],
)
def test_the_kernel_answers_our_echo_request(
    address: str, family: socket.AddressFamily, protocol: int, offset: int
) -> None:
    packet = make_icmp_echo(address, address, ident=7, seq=9, payload=b"hello")
    with (
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as out,
        socket.socket(family, socket.SOCK_RAW, protocol) as back,
    ):
        back.settimeout(5)
        out.sendto(packet, (address, 0))
        kinds: set[int] = set()
        while not kinds & {0, 129}:  # the request comes by too
            got = back.recv(2048)
            body = got if family == socket.AF_INET6 else got[20:]
            kinds.add(body[0])
        assert body[4:] == packet[offset or 20 :][4:]


def test_udp_burst_sends_what_it_says() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sent = udp_burst("127.0.0.1", sock.getsockname()[1], 5)
        assert [sock.recv(100) for _ in range(5)] == sent


def test_ip_gives_parsed_output_and_fails_loudly() -> None:
    assert [link["ifname"] for link in ip("link", "show")] == ["lo"]
    with pytest.raises(AssertionError, match="nosuch0"):
        ip("link", "show", "dev", "nosuch0")
