"""The helpers are checked with the kernel, or the tests that use them would prove little."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from .documents import programs
from .helpers import checksum, ip, make_icmp_echo, need, udp_burst, wait_until
from .integration.kernel import inside


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
        while not kinds & {0, 129}:  # the socket receives the request, too
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


def test_need_finds_a_program_also_where_only_roots_path_leads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Path(need("unshare")).name == "unshare"
    (tmp_path / "ping").write_text("#!/bin/sh\n")
    (tmp_path / "ping").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert need("ping") == str(tmp_path / "ping")
    assert need("ldconfig").endswith("/sbin/ldconfig")  # the C library's
    assert need(sys.executable) == sys.executable


def test_need_skips_a_test_whose_program_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nsenter").symlink_to(need("nsenter"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="missing: ping; install iputils-ping"):
        need("ping")
    with pytest.raises(pytest.skip.Exception, match="missing: ping; install iputils-ping"):
        inside("/proc/self/ns/net", "ping", "-c", "1", "127.0.0.1")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("ping -c 3 10.0.0.2", ["ping"]),
        ("unshare -rn sh -c 'python x.py & sleep 1; ping -c 3 10.0.0.2; kill $!'",
         ["ping", "unshare"]),
        ("sudo tcpdump -i tun0 &\ncurl -s http://x | grep ping", ["curl", "tcpdump"]),
        ('run("ping", "-c", "1")\nping = await go()\nping(1)', ["ping"]),
        ("python ping.py --ping 10.0.0.2  # ping", []),
    ],
)  # fmt: skip
def test_the_programs_of_a_page_are_found(code: str, found: list[str]) -> None:
    assert programs(code) == found
