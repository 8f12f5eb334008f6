"""The files of `networkd_units`, used by systemd-networkd and compared with opening a device.

networkd runs in the test's network namespace and in its own mount namespace, where /etc/systemd has
only these files, /run is empty, and /sys is read-only. The read-only /sys makes it believe that it
is in a container without udev, so it configures links by itself. udev would also give a TAP a
permanent MAC; the tests leave that out.
"""

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..helpers import REAL_ROOT, ip
from . import kernel

pytestmark = pytest.mark.peers

NETWORKD = Path("/lib/systemd/systemd-networkd")  # not on PATH

SCRIPT = """
mount -t sysfs -o ro sysfs /sys &&
mount -t tmpfs -o mode=0755 tmpfs /run &&
mkdir /run/systemd &&
mount -t tmpfs -o mode=0755 tmpfs /etc/systemd &&
mkdir /etc/systemd/network &&
mount --bind "$1" /etc/systemd/network &&
exec timeout --kill-after=5 50 "$2"
"""


class Networkd:
    """A running systemd-networkd."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def wait(self, name: str) -> None:
        """Wait until it has configured an interface."""
        deadline = time.monotonic() + 20
        state = ""
        while "ADMIN_STATE=configured\n" not in state:
            assert self._process.poll() is None, self.said()
            assert "ADMIN_STATE=failed" not in state, self.said()
            assert time.monotonic() < deadline, f"{state}\n{self.said()}"
            time.sleep(0.01)
            if name in kernel.names():
                index = kernel.link(name)["ifindex"]
                # Look in networkd's mount namespace, which has its own /run.
                seen = Path("/proc", str(self._process.pid), "root")
                with contextlib.suppress(FileNotFoundError):  # not made yet
                    state = (seen / f"run/systemd/netif/links/{index}").read_text()

    def said(self) -> str:
        """Its errors and warnings."""
        return self._log.read_text()


@contextlib.contextmanager
def networkd(folder: Path, units: dict[str, str]) -> Iterator[Networkd]:
    """Run systemd-networkd with these files."""
    if not NETWORKD.exists():
        pytest.skip(f"missing: {NETWORKD}; install systemd")
    if not REAL_ROOT:
        pytest.skip("networkd becomes another user, and a user namespace has only one")
    files = folder / "network"
    files.mkdir()
    files.chmod(0o755)  # for networkd's user
    for file, text in units.items():
        (files / file).write_text(text)
    log = folder / "log"
    with (
        log.open("w") as said,
        subprocess.Popen(
            ["unshare", "-m", "sh", "-c", SCRIPT, "sh", str(files), str(NETWORKD)],
            env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_LOG_TARGET": "console"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            text=True,
        ) as process,
    ):
        try:
            yield Networkd(process, log)
        finally:
            process.terminate()  # timeout(1) passes it on


# The options for aiotun, and those that only the attaching program passes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain tun": ("tun", {}),
    "plain tap": ("tap", {}),
    "tun": (
        "tun",
        {
            "owner": kernel.ORDINARY,
            "group": kernel.ORDINARY,
            "packet_info": True,
            "mtu": 1400,
            "addresses": [
                "10.81.0.1/24",
                "10.82.0.1 peer 10.82.0.2/32",
                "10.83.0.1 peer 10.84.0.1/24",
                "127.0.0.81/32",
                "fd81::1/64",
                "fd82::1 peer fd82::2/128",
                "fe80::81/64",
            ],
            "routes": [
                "default metric 77",
                "10.85.0.0/16 via 10.81.0.2",
                "10.86.0.1 via 10.82.0.2 metric 50 table 100",
                "fd85::/64 via fd81::2 metric 60",
                "fd86::/64 table 4000",
            ],
        },
    ),
    "several queues": ("tun", {"queues": 2, "offload": "raw", "addresses": ["10.81.0.1/24"]}),
    "small": ("tun", {"mtu": 576, "addresses": ["10.81.0.1/31"], "routes": ["default"]}),
    "large": ("tun", {"mtu": 65535}),
    "down": ("tun", {"up": False, "addresses": ["10.81.0.1/24", "fd81::1/64"]}),
    "tap": (
        "tap",
        {
            "owner": kernel.ORDINARY,
            "multi_queue": True,
            "offload": "raw",
            "mac": "02:00:00:00:00:81",
            "mtu": 9000,
            "addresses": ["10.81.0.1/24", "fd81::1/64"],
            "routes": ["10.85.0.0/16 via 10.81.0.2 metric 5"],
        },
    ),
    "bridged": ("tap", {"bridge": "br81", "mac": "02:00:00:00:00:82"}),
}


def shape(name: str, mac: bool) -> list[str]:
    """An interface's state without the parts that may differ.

    networkd gives IPv4 addresses a broadcast address, which the kernel knows anyway. Its routes
    have another protocol, which only names their origin. The kernel derives routes from addresses
    at any time. A MAC is random unless given.
    """
    found = kernel.state(name)
    for key in ("ifindex", *(() if mac else ("address",))):
        found["link"].pop(key, None)
    routes = [each for each in found["routes"] if each.pop("protocol") != "kernel"]
    several = (*found["addresses"], *routes)
    for each in several:
        each.pop("broadcast", None)
    # networkd adds them in a different order.
    return [str(found["link"]), *sorted(str(sorted(each.items())) for each in several)]


@pytest.mark.parametrize(("mode", "options"), CASES.values(), ids=CASES)
def test_networkd_makes_what_opening_makes(
    mode: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    ip("link", "add", "br81", "type", "bridge")
    units = aiotun.networkd_units("nd0", mode, **options)
    with networkd(tmp_path, {**units, "60.netdev": "[NetDev]\nName=br81\nKind=bridge\n"}) as daemon:
        daemon.wait("nd0")
        made = shape("nd0", "mac" in options)
        info = asyncio.run(aiotun.Link("nd0").info())
        assert daemon.said() == ""

    assert info.tuntap is not None
    assert info.tuntap.mode == mode
    assert info.tuntap.persist
    assert info.tuntap.multi_queue == (options.get("queues", 1) > 1 or "multi_queue" in options)
    assert info.tuntap.packet_info == options.get("packet_info", False)
    assert info.tuntap.vnet_header == (options.get("offload") == "raw")
    assert info.tuntap.owner == options.get("owner")
    assert info.tuntap.group == options.get("group")
    assert info.mtu == options.get("mtu", 1500)
    assert info.mac == options.get("mac", info.mac)
    assert info.master == options.get("bridge")
    assert info.up == options.get("up", True)

    # A program without privileges needs no change, so it can open the device.
    said = kernel.ordinary_child(f"attempt(aiotun.open_{mode}('nd0', **{options!r}))")
    assert said["class"] is None, said

    ip("link", "del", "dev", "nd0")

    async def opened() -> None:
        opener = aiotun.open_tun if mode == "tun" else aiotun.open_tap
        await (await opener("nd0", persist=True, **options)).aclose()

    asyncio.run(opened())
    assert made == shape("nd0", "mac" in options)


def test_networkd_joins_bridges_only_that_it_knows(tmp_path: Path) -> None:
    """This is the reason for the comment in the file."""
    ip("link", "add", "br81", "type", "bridge")
    units = aiotun.networkd_units("nd0", "tap", bridge="br81")
    with networkd(tmp_path, units) as daemon:
        daemon.wait("nd0")
        assert "br81 NetDev could not be found" in daemon.said()
        assert "master" not in kernel.link("nd0")


def test_a_setting_that_networkd_does_not_know_would_be_noticed(tmp_path: Path) -> None:
    units = aiotun.networkd_units("nd0", mtu=1400)
    units["50-nd0.network"] = units["50-nd0.network"].replace("MTUBytes", "MTUOctets")
    with networkd(tmp_path, units) as daemon:
        daemon.wait("nd0")
        assert "MTUOctets" in daemon.said()
        assert kernel.link("nd0")["mtu"] == 1500
