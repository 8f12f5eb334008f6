"""`ipv6_autoconf`: whether the kernel configures IPv6 by itself and solicits routers."""

import asyncio
import contextlib
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun import cli

from ..helpers import ip, wait_until
from .kernel import ORDINARY, addresses, changes, child, make, names, ordinary_child, state

both = pytest.mark.parametrize("open_it", [aiotun.open_tun, aiotun.open_tap], ids=["tun", "tap"])


def mode(name: str) -> str:
    (shown,) = ip("-d", "link", "show", "dev", name)
    return str(shown["inet6_addr_gen_mode"])


def solicitations(name: str) -> str:
    return Path(f"/proc/sys/net/ipv6/conf/{name}/router_solicitations").read_text().strip()


def link_locals(name: str) -> set[str]:
    return {each for each in addresses(name) if each.startswith("fe80:")}


@pytest.fixture(autouse=True)
def as_on_an_ordinary_machine(netns: None) -> None:
    """Enable IPv6 autoconfiguration, which the suite disables in its namespaces."""
    for name, value in (
        ("addr_gen_mode", "0"),
        ("router_solicitations", "-1"),
        ("router_solicitation_delay", "0"),
    ):
        Path(f"/proc/sys/net/ipv6/conf/default/{name}").write_text(value)


async def solicited(device: aiotun.TunDevice | aiotun.TapDevice) -> bool:
    """Whether the kernel solicits routers; without a delay it does so when the link comes up."""
    header = 14 if device.mode == "tap" else 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            async for packet in device:
                ipv6 = packet[header:]
                if ipv6[0] >> 4 == 6 and ipv6[6] == 58 and ipv6[40] == 133:
                    return True
    return False


@both
@pytest.mark.parametrize("how", [None, True])
async def test_by_default_the_kernel_configures_ipv6(open_it: Callable[..., Any], how: Any) -> None:
    async with open_it("new0", ipv6_autoconf=how) as device:
        assert await solicited(device)
        assert link_locals("new0")


@both
async def test_ipv6_autoconf_false_solicits_nothing_and_adds_no_address(
    open_it: Callable[..., Any],
) -> None:
    async with open_it("new0", ipv6_autoconf=False, addresses=["fd00::1/64"]) as device:
        assert addresses("new0") == {"fd00::1/64"}
        assert mode("new0") == "none"
        assert not await solicited(device)
        assert addresses("new0") == {"fd00::1/64"}


async def test_a_link_local_address_of_ones_own_solicits_nothing() -> None:
    async with aiotun.open_tun("new0", ipv6_autoconf=False) as tun:
        await tun.link.add_address("fe80::1/64")  # by default the kernel then solicits
        assert not await solicited(tun)
        assert link_locals("new0") == {"fe80::1/64"}


@both
async def test_false_removes_a_link_local_address_that_the_kernel_made(
    open_it: Callable[..., Any],
) -> None:
    kind = open_it.__name__.removeprefix("open_")
    make("old0", kind)
    async with open_it("old0"):
        await wait_until(lambda: bool(link_locals("old0")))
        ip("addr", "add", "fe80::1/64", "dev", "old0", "nodad")
    async with open_it("old0", ipv6_autoconf=False):
        assert link_locals("old0") == {"fe80::1/64"}
    async with open_it("old0", ipv6_autoconf=True):
        assert mode("old0") != "none"


async def test_a_failed_opening_restores_ipv6_autoconf() -> None:
    make("old0")
    ip("link", "set", "old0", "up")
    async with aiotun.open_tun("old0"):
        await wait_until(lambda: bool(link_locals("old0")))
        ip("-6", "addr", "flush", "dev", "old0")
        ip("addr", "add", "fe80::9/64", "dev", "old0", "nodad")
    before, sent = state("old0"), solicitations("old0")
    with pytest.raises(aiotun.LinkError):
        await aiotun.open_tun("old0", ipv6_autoconf=False, routes=["10.1.0.0/16 via 10.9.0.1"])
    assert changes("old0", before) == []
    assert (mode("old0"), solicitations("old0")) == ("random", sent)
    with pytest.raises(aiotun.LinkError):
        await aiotun.open_tun("new0", ipv6_autoconf=False, routes=["10.1.0.0/16 via 10.9.0.1"])
    assert names() == ["old0"]


@pytest.mark.parametrize("how", ["readonly", "small", "off"])
async def test_ipv6_autoconf_false_works_with_a_readonly_proc_sys(how: str) -> None:
    """As in containers, where /proc/sys is read-only; also on links without IPv6."""
    prefix = []
    code = "attempt(aiotun.open_tun('new0', ipv6_autoconf=False))"
    if how == "readonly":
        script = (
            'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'
        )
        prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    elif how == "small":
        code = "attempt(aiotun.open_tun('new0', ipv6_autoconf=False, mtu=1000))"
    else:
        setting = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        code = f"import pathlib; pathlib.Path('{setting}').write_text('1')\n{code}"
    assert child(code, prefix=prefix)["class"] is None


@pytest.mark.parametrize("said", ["off", "on", None])
async def test_a_persistent_device_keeps_it(said: str | None) -> None:
    words = [] if said is None else ["ipv6_autoconf", said]
    how = {"off": False, "on": True, None: None}[said]
    assert await asyncio.to_thread(cli.main, ["add", "old0", "mode", "tun", *words]) == 0
    await aiotun.create_persistent("old1", ipv6_autoconf=how)
    for name in ("old0", "old1"):
        async with aiotun.open_tun(name, addresses=["fd00::1/64"]):
            if said == "off":
                assert mode(name) == "none"
                assert link_locals(name) == set()
                assert solicitations(name) == "0"
            else:
                await wait_until(lambda: bool(link_locals(name)))  # noqa: B023
        ip("link", "set", name, "down")


def test_ipv6_autoconf_that_root_has_set_takes_no_privilege() -> None:
    for name, more in (("old0", ""), ("old1", "addrgenmode none")):
        make(name, "tun", "user", str(ORDINARY))
        ip("link", "set", name, "up", *more.split())
    said = ordinary_child("attempt(aiotun.open_tun('old1', ipv6_autoconf=False))")
    assert said["class"] is None
    said = ordinary_child("attempt(aiotun.open_tun('old0', ipv6_autoconf=False))")
    assert (said["class"], said["errno"]) == ("NotPermittedError", errno.EPERM)
    assert "switch the kernel's IPv6 autoconfiguration off" in said["strerror"]


def test_ipv6_autoconf_takes_only_on_or_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["add", "old0", "mode", "tun", "ipv6_autoconf", "maybe"]) == 2
    assert "'ipv6_autoconf' must be 'on' or 'off', got 'maybe'" in capsys.readouterr().err
    assert names() == []
