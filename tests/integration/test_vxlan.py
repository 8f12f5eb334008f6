"""The VXLAN example, with the kernel's own vxlan device and with itself as the other end.

One end is in the test's own namespace. A veth pair connects it with the other end's namespace.
"""

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
from vxlan import MOST_LEARNED, Vxlan

from ..helpers import ip, need
from .kernel import another_namespace, inside
from .test_examples import EXAMPLES, Service, check_failure, run, start
from .test_offload import TCP_CLIENT, TCP_SERVER

OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
ADDRESS = ["--address", "10.7.0.1/24", "--address", "fd07::1/64"]
MTU = {4: 1450, 6: 1430}

# The kernel leaves checksums and segmentation to a network card, and there is none on this path.
NO_OFFLOAD = """
    import array, fcntl, socket, struct, sys
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for command in (0x17, 0x1f):  # ETHTOOL_STXCSUM, ETHTOOL_STSO
        value = array.array("I", [command, 0])
        request = struct.pack("@16sP16x", sys.argv[1].encode(), value.buffer_info()[0])
        fcntl.ioctl(sock, 0x8946, request)  # SIOCETHTOOL
"""


@contextlib.contextmanager
def far(kind: str, version: int, vni: int = 42) -> Iterator[str]:
    """The other end, with 10.7.0.2 and fd07::2; yields its namespace."""
    with another_namespace("ip link set lo up") as there:
        ip("link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", there)
        ip("link", "set", "va", "up")
        inside(there, "ip", "link", "set", "vb", "up")
        for own, size in ((4, 24), (6, 64)):
            more = ["nodad"] if own == 6 else []
            ip("addr", "add", f"{OUTER[own][0]}/{size}", "dev", "va", *more)
            inside(there, "ip", "addr", "add", f"{OUTER[own][1]}/{size}", "dev", "vb", *more)
        one, other = OUTER[version]
        if kind == "ours":
            with ours(version, "--name", "far0", prefix=["nsenter", f"--net={there}"]):
                addresses(there)
                yield there
        else:
            add = f"ip link add far0 type vxlan id {vni} local {other} remote {one} dstport 4789"
            done = subprocess.run(
                ["nsenter", f"--net={there}", *add.split()], capture_output=True, text=True
            )
            if "Unknown device type" in done.stderr:
                pytest.skip("missing: the kernel's vxlan device (CONFIG_VXLAN)")
            assert done.returncode == 0, done.stderr
            inside(there, sys.executable, "-c", textwrap.dedent(NO_OFFLOAD), "far0")
            addresses(there)
            yield there


def addresses(there: str) -> None:
    inside(there, "ip", "addr", "add", "10.7.0.2/24", "dev", "far0")
    inside(there, "ip", "addr", "add", "fd07::2/64", "dev", "far0", "nodad")
    inside(there, "ip", "link", "set", "far0", "up")


@contextlib.contextmanager
def ours(version: int, *args: str, prefix: list[str]) -> Iterator[None]:
    """The example as the other end."""
    one, other = OUTER[version]
    command = [*prefix, sys.executable, "-W", "error", str(EXAMPLES / "vxlan.py"), "--vni", "42"]
    process = subprocess.Popen(
        [*command, "--local", other, "--remote", one, *args],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready far0\n"
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def near(version: int, *args: str, vni: int = 42) -> Iterator[Service]:
    one, other = OUTER[version]
    ends = ["--local", one, "--remote", other]
    with start("vxlan.py", "--name", "tap0", "--vni", str(vni), *ends, *ADDRESS, *args) as service:
        yield service


def ping(address: str, *options: str) -> int:
    command = [need("ping"), "-c", "3", "-i", "0.05", "-w", "10", *options, address]
    return subprocess.run(command, capture_output=True).returncode


KINDS = pytest.mark.parametrize("kind", ["ours", "kernel"])
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["over IPv4", "over IPv6"])
LOOPS = pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])


@KINDS
@VERSIONS
def test_pings_and_arp_cross_the_tunnel_and_the_mtu_fits(kind: str, version: int) -> None:
    with far(kind, version) as there, near(version) as service:
        assert ping("10.7.0.2") == 0
        assert ping("fd07::2") == 0
        inside(there, "ping", "-c", "2", "-i", "0.05", "-w", "10", "10.7.0.1")
        # Both ends have found each other's MAC by ARP.
        (far_link,) = ip_there(there)
        (found,) = ip("neigh", "show", "10.7.0.2", "dev", "tap0")
        assert found["lladdr"] == far_link["address"]
        (link,) = ip("link", "show", "tap0")
        assert link["mtu"] == MTU[version]
        # The largest that fits, and not one byte more.
        largest = MTU[version] - 28
        assert ping("10.7.0.2", "-s", str(largest), "-M", "do") == 0
        assert ping("10.7.0.2", "-s", str(largest + 1), "-M", "do", "-w", "1") != 0
        assert service.end() == ""


def ip_there(there: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        inside(there, "ip", "-j", "link", "show", "dev", "far0")
    )
    return found


@KINDS
@LOOPS
def test_100_mb_of_tcp(kind: str, loop: list[str]) -> None:
    with far(kind, 4) as there, near(4, *loop) as service:
        assert ping("10.7.0.2") == 0
        for address, prefix_server, prefix_client in (
            ("10.7.0.2", ["nsenter", f"--net={there}"], []),
            ("fd07::1", [], ["nsenter", f"--net={there}"]),
        ):
            transfer(address, prefix_server, prefix_client)
        assert service.end(signal.SIGINT) == ""


def transfer(address: str, prefix_server: list[str], prefix_client: list[str]) -> None:
    args = [address, "5000", "100000000"]
    python = [sys.executable, "-c"]
    server = subprocess.Popen(
        [*prefix_server, *python, textwrap.dedent(TCP_SERVER), *args],
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            client = [*prefix_client, *python, textwrap.dedent(TCP_CLIENT), *args]
            sent = subprocess.run(client, capture_output=True, text=True, timeout=40, check=True)
            got, _ = server.communicate(timeout=20)
        finally:
            server.kill()
    assert got == sent.stdout
    assert got.split()[0] == "100000000"


def test_another_network_is_another_network() -> None:
    with far("kernel", 4), near(4, vni=43) as service:
        assert ping("10.7.0.2", "-w", "1") != 0
        service.process.send_signal(signal.SIGUSR1)
        assert service.process.stderr is not None
        assert "of another network" in service.process.stderr.readline()
        assert service.end() == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--vni", "16777216"], "16777216"),
        (["--vni", "-1"], "from 0"),
        (["--port", "65536"], "65536"),
        (["--remote", "2001:db8::1"], "one version"),
        (["--local", "here"], "here"),
    ],
)
def test_vxlan_refuses_invalid_arguments(args: list[str], said: str) -> None:
    ends = ["--vni", "1", "--local", "192.0.2.1", "--remote", "192.0.2.2"]
    check_failure(run("vxlan.py", *ends, *args), 2, said)


def test_a_local_address_that_is_not_there_is_one_line() -> None:
    ends = ["--vni", "1", "--local", "192.0.2.1", "--remote", "192.0.2.2"]
    check_failure(run("vxlan.py", *ends), 1, "no interface has the address")


# --- Without I/O ---------------------------------------------------------------------------------

A, B, C = ("192.0.2.1", 4789), ("192.0.2.2", 4789), ("192.0.2.9", 4789)
MAC1, MAC2, ALL = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", b"\xff" * 6


def frame(target: bytes, source: bytes) -> bytes:
    return target + source + b"\x08\0" + bytes(50)


def test_a_datagram_begins_with_the_vxlan_header() -> None:
    ((_, (datagram,)),) = Vxlan(0x123456, [A]).send([frame(ALL, MAC1)], 0.0)
    assert datagram == bytes.fromhex("08000000 12345600") + frame(ALL, MAC1)


def test_stations_are_learned_moved_and_forgotten() -> None:
    vxlan = Vxlan(7, [A, B])
    (head,) = {datagrams[0][:8] for _, datagrams in vxlan.send([frame(MAC2, MAC1)], 0.0)}
    assert len(vxlan.send([frame(MAC1, MAC2)], 0.0)) == 2  # to both remotes: not learned yet
    assert vxlan.receive([head + frame(MAC2, MAC1)], B, 0.0) == [frame(MAC2, MAC1)]
    assert [remote for remote, _ in vxlan.send([frame(MAC1, MAC2)], 299.0)] == [B]
    assert len(vxlan.send([frame(MAC1, MAC2)], 300.0)) == 2
    vxlan.receive([head + frame(MAC2, MAC1)], ("192.0.2.1", 55555), 300.0)  # the station has moved
    assert [remote for remote, _ in vxlan.send([frame(MAC1, MAC2)], 301.0)] == [A]
    assert len(vxlan.send([frame(ALL, MAC2)], 301.0)) == 2
    vxlan.receive([head + frame(MAC2, ALL)], A, 301.0)
    assert ALL not in vxlan._learned
    vxlan.receive([head + frame(MAC2, b"\2" + n.to_bytes(5, "big")) for n in range(9000)], A, 302.0)
    assert len(vxlan._learned) <= MOST_LEARNED


def test_dropped_datagrams_are_counted() -> None:
    vxlan = Vxlan(7, [A])
    ((_, (good,)),) = vxlan.send([frame(ALL, MAC1)], 0.0)
    assert vxlan.receive([good], C, 0.0) == []
    bad = [b"", good[:21], b"\0" + good[1:], good[:6] + b"\1" + good[7:]]
    assert vxlan.receive(bad, A, 0.0) == []
    assert vxlan.dropped == {"not from a remote": 1, "no VXLAN": 3, "of another network": 1}
    # The other flags and the reserved bits are ignored.
    assert len(vxlan.receive([b"\xff\1\2\3" + good[4:7] + b"\4" + good[8:]], A, 0.0)) == 1
