"""The host in a Python program: a real kernel finds and pings it over a bridge."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..helpers import ip
from .programs import example, running
from .test_examples import (
    LOOPS,
    Pinger,
    Service,
    check_failure,
    example_module,
    pingers,
    run,
    start,
)

HOST = "virtual_host.py"
MAC, OTHER_MAC = "02:00:00:00:00:51", "02:00:00:00:00:52"
HOST4, HOST6 = "10.84.0.1", "fd84::1"
# Without a link-local address the kernel can't check that an IPv6 neighbor is still reachable.
KERNEL = ["10.84.0.254/24", "fd84::ff/64", "fe80::ff/64"]


def options(mac: str = MAC, name: str = "ex0", four: str = HOST4, six: str = HOST6) -> list[str]:
    addresses = ["--address", f"{four}/24", "--address", f"{six}/64"]
    return ["--name", name, "--mac", mac, *addresses]


def bridge() -> list[str]:
    """Make a bridge on which the kernel has addresses; return the option for it."""
    ip("link", "add", "br0", "type", "bridge")
    for each in KERNEL:
        ip("addr", "add", each, "dev", "br0")
    ip("link", "set", "br0", "up")
    return ["--bridge", "br0"]


@contextlib.contextmanager
def host(*args: str) -> Iterator[tuple[Service, Pinger, Pinger]]:
    with start(HOST, *args) as service, pingers() as (four, six):
        yield service, four, six
        assert service.end() == ""


def neighbours(device: str = "br0") -> dict[str, str | None]:
    """The MACs that the kernel knows, by address; None if nobody has answered."""
    found = ip("-4", "neigh", "show", "dev", device) + ip("-6", "neigh", "show", "dev", device)
    return {each["dst"]: each.get("lladdr") for each in found}


@LOOPS
def test_it_is_found_and_pinged_over_a_bridge(loop: list[str]) -> None:
    with host(*options(), *bridge(), *loop) as (service, four, six):
        assert service.name == "ex0"
        for size in (0, 1, 56, 57, 1400, 1452):
            four.check(HOST4, size)
            six.check(HOST6, size)
        assert neighbours()[HOST4] == neighbours()[HOST6] == MAC
        # The kernel checks that it is still there, with a request to this MAC only.
        for address in (HOST4, HOST6):
            ip("neigh", "change", address, "lladdr", MAC, "dev", "br0", "nud", "probe")
            wait_for_state(address, "REACHABLE")


def wait_for_state(address: str, wanted: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        (found,) = ip("neigh", "show", address, "dev", "br0")
        if found["state"] == [wanted]:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def test_the_host_answers_for_its_own_addresses_only() -> None:
    with host(*options(), *bridge()) as (_, four, six):
        four.check(HOST4)
        six.check(HOST6)
        ip("neigh", "add", "10.84.0.3", "lladdr", MAC, "dev", "br0")
        ip("neigh", "add", "fd84::3", "lladdr", MAC, "dev", "br0")
        for pinger, own, others in (
            (four, HOST4, ["10.84.0.2", "10.84.0.3", "10.84.0.255"]),
            (six, HOST6, ["fd84::2", "fd84::3", "fd84::1:0:1"]),
        ):
            for address in others:
                pinger.ask(address)
                pinger.check(own)
        known = neighbours()
        assert [known.get(each) for each in ("10.84.0.2", "fd84::2", "fd84::1:0:1")] == [None] * 3


def test_the_host_answers_frames_to_its_own_mac_only() -> None:
    """A bridge floods frames to unknown MACs, so the host receives frames for others."""
    with host(*options(), *bridge()) as (_, four, six):
        for pinger, address in ((four, HOST4), (six, HOST6)):
            ip("neigh", "add", address, "lladdr", OTHER_MAC, "dev", "br0")
            pinger.ask(address)
            ip("neigh", "replace", address, "lladdr", MAC, "dev", "br0")
            pinger.check(address)


def test_two_hosts_on_one_bridge() -> None:
    more = bridge()
    others = options(OTHER_MAC, "ex1", "10.84.0.2", "fd84::2")
    with host(*options(), *more) as (_, four, six), host(*others, *more):
        for _ in range(3):
            for pinger, addresses in ((four, [HOST4, "10.84.0.2"]), (six, [HOST6, "fd84::2"])):
                for address in addresses:
                    pinger.check(address)
        known = neighbours()
        assert (known[HOST4], known["10.84.0.2"]) == (MAC, OTHER_MAC)
        assert (known[HOST6], known["fd84::2"]) == (MAC, OTHER_MAC)


def test_the_host_works_without_a_bridge_and_a_given_mac() -> None:
    with start(HOST, "--address", "10.84.0.1/24") as service, Pinger(4) as four:
        assert service.name == "tap0"
        ip("addr", "add", KERNEL[0], "dev", "tap0")
        four.check(HOST4)
        found = neighbours("tap0")[HOST4]
        assert found is not None
        assert found.startswith("02:")
        assert service.end() == ""


def test_nobody_else_may_take_its_address() -> None:
    """The kernel's own duplicate address detection."""
    with host(*options(), *bridge()):
        Path("/proc/sys/net/ipv6/conf/br0/accept_dad").write_text("1")
        ip("addr", "add", f"{HOST6}/64", "dev", "br0")
        deadline = time.monotonic() + 10
        while not any(
            each["local"] == HOST6 and each.get("dadfailed")
            for each in ip("-6", "addr", "show", "dev", "br0")[0]["addr_info"]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)


# --- Its own pings -------------------------------------------------------------------------------


def answered(lines: list[str], address: str) -> list[int]:
    """The numbers of the answered pings; checks that their times are plausible."""
    line = re.compile(
        rf"64 bytes from {re.escape(address)}: icmp_seq=(\d+) ttl=64 time=(\d+\.\d+) ms"
    )
    found = [match for each in lines if (match := line.fullmatch(each))]
    assert all(0 < float(match[2]) < 10_000 for match in found)
    return [int(match[1]) for match in found]


@LOOPS
@pytest.mark.parametrize(
    ("own", "target"), [(f"{HOST4}/24", "10.84.0.254"), (f"{HOST6}/64", "fd84::ff")]
)
def test_the_host_pings_the_kernel(own: str, target: str, loop: list[str]) -> None:
    """It ends immediately after the last answer."""
    words = [*bridge(), "--address", own, "--ping", target, "--count", "3", "--interval", "0.01"]
    done = run(HOST, *words, *loop)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines, last = done.stdout.splitlines()
    assert first == "ready tap0"
    assert answered(lines, target) == [1, 2, 3]
    assert len(lines) == 3
    assert last.startswith("3 sent, 3 answered, in ")


def test_pings_that_nobody_answers_exit_with_1() -> None:
    words = [*bridge(), "--address", f"{HOST4}/24", "--ping", "10.84.0.2"]
    done = run(HOST, *words, "--count", "2", "--interval", "0.01")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        "ready tap0\nicmp_seq=1: nobody answers for 10.84.0.2\n"
        "icmp_seq=2: nobody answers for 10.84.0.2\n2 sent, 0 answered\n"
    )


def test_two_hosts_ping_each_other() -> None:
    """Until a signal comes. A host that returns with another MAC is found again."""
    more = [*bridge(), "--interval", "0.05"]
    first = example(HOST, *options(), *more, "--ping", "fd84::2")
    second = options(OTHER_MAC, "ex1", "10.84.0.2", "fd84::2")
    with running(first, "ready ex0") as one:
        with running(example(HOST, *second, *more, "--ping", HOST4), "ready ex1") as two:
            one.expect("64 bytes from fd84::2")
            two.expect(f"64 bytes from {HOST4}")
            lines = two.end(signal.SIGINT)
        assert answered(lines, HOST4)
        one.expect("nobody answers for fd84::2")
        second[second.index(OTHER_MAC)] = "02:00:00:00:00:53"
        with running(example(HOST, *second, *more), "ready ex1") as two:
            one.expect("64 bytes from fd84::2")
            two.end()
        *_, last = one.end()
    assert re.fullmatch(r"\d+ sent, \d+ answered, in [\d./]+ ms \(min/mean/max\)", last)


@LOOPS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number: signal.Signals, loop: list[str]) -> None:
    with start(HOST, *options(), *bridge(), *loop) as service, Pinger(4) as four:
        four.check(HOST4)
        for _ in range(100):
            four.ask(HOST4)
        assert service.end(number) == ""


def test_an_interface_that_is_deleted_is_one_line() -> None:
    with start(HOST, *options()) as service:
        ip("link", "delete", "ex0")
        said = service.process.communicate(timeout=10)[1]
        assert service.process.returncode == 1
        assert "ex0" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["--mac", "02:00:00:00:00"], 2, "02:00:00:00:00:01"),
        (["--mac", "03:00:00:00:00:01"], 2, "02:00:00:00:00:01"),
        (["--mac", "00:00:00:00:00:00"], 2, "02:00:00:00:00:01"),
        (["--mac", "020000000001"], 2, "02:00:00:00:00:01"),
        (["--mac", "home"], 2, "02:00:00:00:00:01"),
        (["--address", "10.84.0.1/33"], 2, "10.84.0.1/33"),
        (["--ping", "10.84.0.1"], 2, "10.84.0.1"),
        (["--address", "10.84.0.1/24", "--ping", "10.84.0.1"], 2, "another host"),
        (["--address", "10.84.0.1/24", "--ping", "home"], 2, "home"),
        (["--count", "3"], 2, "--ping"),
        (["--address", "10.84.0.1/24", "--ping", "10.84.0.2", "--count", "0"], 2, "--count"),
        (["--address", "10.84.0.1/24", "--ping", "10.84.0.2", "--interval", "0"], 2, "--interval"),
        (["--name", "much-too-long-name"], 2, "1 to 15"),
        (["--bridge", "none0"], 1, "none0"),
        (["--name", "lo"], 1, "not a TAP device"),
    ],
)
def test_failures_are_one_line_with_an_exit_status(
    args: Sequence[str], status: int, said: str
) -> None:
    check_failure(run(HOST, *args), status, said)


def test_help_lists_the_options() -> None:
    done = run(HOST, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--name", "--address", "--mac", "--bridge", "--uvloop", "--ping", "--count"):
        assert option in done.stdout


def test_truncated_frames_are_not_answered() -> None:
    """No length raises, and no other frame is answered."""
    module: Any = example_module("virtual_host")
    args = module.parser("").parse_args(["--address", "10.84.0.1/24"])
    args.mac = module.host_mac(MAC)
    answer = module.Host(args).answer
    for ethertype in (b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\x81\x00"):
        for length in range(14, 100):
            assert answer((args.mac + bytes(6) + ethertype + bytes(100))[:length]) is None
