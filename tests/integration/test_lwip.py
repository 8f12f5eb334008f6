"""lwIP, another TCP/IP stack, and its own driver for TAP devices, on a bridge with ours."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..helpers import ip
from . import dhcp, kernel
from .programs import Program, need, running

pytestmark = pytest.mark.peers

HERE = Path(__file__).parent
HEADERS = Path("/usr/include/lwip")  # Debian's


@pytest.fixture(scope="module")
def lwip_host(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C program, compiled."""
    compiler = need("cc", "gcc")
    if not (HEADERS / "netif/tapif.h").exists():
        pytest.skip("missing: lwIP; install liblwip-dev")
    made = tmp_path_factory.mktemp("lwip") / "lwip_host"
    source = str(HERE / "lwip_host.c")
    words = ["-Wall", "-Wextra", "-Werror", f"-I{HEADERS}", "-o", str(made), source, "-llwip"]
    done = subprocess.run([compiler, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(made)


@pytest.fixture
def lwip(lwip_host: str) -> Iterator[Program]:
    """An lwIP host on a TAP of the bridge br0, as its documentation wants it prepared."""
    dhcp.add_bridge()
    kernel.make("lwip0", "tap")
    ip("link", "set", "lwip0", "master", "br0", "up")
    env = {**os.environ, "PRECONFIGURED_TAPIF": "lwip0"}
    with running([lwip_host, str(dhcp.SERVER)], env=env) as program:
        yield program


def test_a_lease_and_pings_both_ways(lwip: Program) -> None:
    """It asks before the server is there, and again; then it pings it, and is pinged."""
    with dhcp.serving("--probe", "0.1") as server, dhcp.host() as place:
        lwip.expect("lease 10.85.0.10")
        lwip.expect(f"pong {dhcp.SERVER}")
        kernel.inside(place, "ip", "addr", "add", "10.85.0.200/24", "dev", "eth0")
        kernel.inside(place, "ping", "-c", "3", "-i", "0.01", "-W", "5", "10.85.0.10")
        found = dhcp.counters(server)
    assert (found["ack_sent"], found.get("nak_sent", 0)) == (1, 0)
    assert found["ping"] >= 1
