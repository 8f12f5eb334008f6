"""Simulates gVisor's kernel on Linux, as gVisor's sources describe it.

Its driver supports TUNSETIFF with IFF_TUN, IFF_TAP and IFF_NO_PI, and TUNGETIFF, and nothing else.
Its netlink has no attributes of TUN and TAP devices and no extended acknowledgments.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import aiotun
from aiotun._cli import doctor, probe
from aiotun._kernel import ioctl
from aiotun._kernel.abi import Iff, Ioctl, Siocgif
from aiotun._link import messages

from ..helpers import ip
from .kernel import addresses, held, make, names

_KNOWN = Iff.TUN | Iff.TAP | Iff.NO_PI


def _gvisors_ioctl(fd: Any, request: int, argument: Any = 0, mutate: bool = True) -> Any:
    code = None
    if request == Ioctl.TUNSETIFF:
        (flags,) = struct.unpack_from("H", argument, 16)
        code = errno.EINVAL if flags & ~_KNOWN else None
    elif request == Siocgif.ETHTOOL:
        code = errno.EOPNOTSUPP
    elif request in set(Ioctl) - {Ioctl.TUNGETIFF}:
        code = errno.ENOTTY
    if code is not None:
        raise OSError(code, os.strerror(code))
    return fcntl.ioctl(fd, request, argument, mutate)


class _Socket(socket.socket):
    def setsockopt(self, level: int, *rest: Any) -> None:
        if level == 270:  # SOL_NETLINK
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        super().setsockopt(level, *rest)


@pytest.fixture(autouse=True)
def gvisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ioctl, "fcntl", SimpleNamespace(ioctl=_gvisors_ioctl))
    monkeypatch.setattr(messages, "_tuntap", lambda message: None)
    monkeypatch.setattr(socket, "socket", _Socket)


@pytest.mark.parametrize("open_it", [aiotun.open_tun, aiotun.open_tap])
@pytest.mark.parametrize("name", ["new0", "new%d", None])
async def test_a_device_can_be_opened(open_it: Callable[..., Any], name: str | None) -> None:
    async with open_it(name, addresses=["10.0.0.1/24"], mtu=1400, exclusive=True) as device:
        assert device.mtu == 1400
        assert "10.0.0.1/24" in addresses(device.name)
        ip("link", "show", "dev", device.name)
    assert names() == []


async def test_an_opening_that_fails_leaves_nothing() -> None:
    with pytest.raises(aiotun.LinkError):
        await aiotun.open_tun("new0", routes=["10.1.0.0/16 via 10.9.0.1"])
    assert names() == []


async def test_one_that_is_there_is_attached_to() -> None:
    make("old0")
    async with aiotun.open_tun("old0"):
        pass
    assert names() == ["old0"]


async def test_exclusive_refuses_one_that_is_there() -> None:
    make("old0")
    with pytest.raises(aiotun.DeviceBusyError, match="old0 exists already"):
        await aiotun.open_tun("old0", exclusive=True)
    with held("held0"), pytest.raises(aiotun.DeviceBusyError, match="is in use"):
        await aiotun.open_tun("held0")


@pytest.mark.parametrize(
    ("options", "word"),
    [({"offload": "split"}, "VNET_HDR"), ({"queues": 2}, "MULTI_QUEUE"), ({"napi": True}, "NAPI")],
)
async def test_options_that_gvisor_lacks_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(aiotun.DeviceMismatchError, match=word) as caught:
        await aiotun.open_tun("new0", **options)
    assert "gVisor" in str(caught.value)
    assert names() == []


@pytest.mark.parametrize(
    "options", [{"persist": True}, {"owner": 0}, {"group": 0}, {"sndbuf": 9999}, {"carrier": True}]
)
async def test_a_request_that_it_lacks_is_told(options: dict[str, Any]) -> None:
    with pytest.raises(
        aiotun.DeviceMismatchError, match=r"new0 can't .*does not support it"
    ) as caught:
        await aiotun.open_tun("new0", **options)
    assert caught.value.errno == errno.ENOTTY
    assert names() == []
    with pytest.raises(aiotun.DeviceMismatchError, match="does not support it"):
        await aiotun.create_persistent("new0")
    assert names() == []


def test_the_doctor_recognizes_gvisor() -> None:
    assert probe.try_device() == []
    node = doctor.Check("node", "ok", "")
    driver, may_create = doctor._driver(node)
    assert (driver.status, may_create) == ("note", True)
    assert "gVisor" in driver.said
