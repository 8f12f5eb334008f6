"""Every exception, raised by the real kernel in the condition that it stands for."""

import asyncio
import contextlib
import copy
import errno
import fcntl
import os
import pickle
import socket
import struct
from collections.abc import Awaitable
from typing import Any

import dpkt
import pytest

import aiotun
from aiotun._kernel import ioctl
from aiotun._kernel.abi import Iff, Ioctl

from ..helpers import REAL_ROOT, ip, make_icmp_echo
from .kernel import (
    ORDINARY,
    another_namespace,
    child,
    held,
    ipv6_switched_off,
    make,
    names,
    ordinary_child,
    state,
    with_node,
)

# The contract's table: the other base classes of each exception.
ALSO: dict[type[aiotun.AiotunError], tuple[type[Exception], ...]] = {
    aiotun.TunUnavailableError: (OSError,),
    aiotun.NotPermittedError: (PermissionError, OSError),
    aiotun.DeviceBusyError: (OSError,),
    aiotun.DeviceMismatchError: (OSError,),
    aiotun.DeviceClosedError: (),
    aiotun.DeviceLostError: (OSError,),
    aiotun.LinkDownError: (OSError,),
    aiotun.PacketError: (OSError, ValueError),
    aiotun.PacketTruncatedError: (aiotun.PacketError, OSError, ValueError),
    aiotun.PacketDecodeError: (ValueError,),
    aiotun.LinkError: (OSError,),
    aiotun.ResourceLimitError: (OSError,),
}

EVERY = (OSError, ValueError, PermissionError, TypeError)


def check(
    error: BaseException,
    kind: type[aiotun.AiotunError],
    code: int | None,
    name: str | None,
    *words: str,
) -> None:
    """Check everything that is promised of an exception.

    Args:
        error: the exception.
        kind: its class.
        code: its errno, or None if it has no errno.
        name: the interface, or None if no interface is concerned.
        words: words of the message: what failed and what to do.
    """
    assert type(error) is kind
    assert isinstance(error, aiotun.AiotunError)
    for each in EVERY:
        expected = any(issubclass(one, each) for one in ALSO[kind])
        assert isinstance(error, each) == expected
    for word in words:
        assert word in str(error)
    if isinstance(error, OSError):
        assert code is not None
        assert (error.errno, error.filename) == (code, name)
        assert error.strerror
        assert error.strerror in str(error)
        # The kernel's own words are not enough: they don't say what to do.
        assert error.strerror != os.strerror(code)
    else:
        assert code is None
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert again.args == error.args
        assert (str(again), repr(again)) == (str(error), repr(error))
        for attribute in ("errno", "strerror", "filename"):
            assert getattr(again, attribute, None) == getattr(error, attribute, None)


def check_said(said: Any, kind: type[Any], code: int, name: str | None, *words: str) -> None:
    """Like `check`, for the output of a child."""
    assert said["class"] == kind.__name__, said
    error = kind(said["errno"], said["strerror"], *([said["filename"]] if said["filename"] else []))
    check(error, kind, code, name, *words)


async def caught(awaitable: Awaitable[object]) -> Exception:
    """Await something that must fail, and return the error."""
    try:
        value = await awaitable
    except aiotun.AiotunError as error:
        return error
    if isinstance(value, aiotun.Device):
        await value.aclose()
    raise AssertionError(f"nothing was raised: {value!r}")


def test_every_exported_exception_has_its_promised_bases() -> None:
    """The table lists every exported exception."""
    exported = {
        value
        for value in vars(aiotun).values()
        if isinstance(value, type) and issubclass(value, aiotun.AiotunError)
    }
    assert exported == {aiotun.AiotunError, *ALSO}
    for kind, also in ALSO.items():
        for each in EVERY:
            assert issubclass(kind, each) == any(issubclass(one, each) for one in also)


class TestTunUnavailable:
    def test_a_missing_node_names_modprobe(self) -> None:
        said = child("attempt(aiotun.open_tun('new0'))", prefix=with_node("none"))
        check_said(
            said, aiotun.TunUnavailableError, errno.ENOENT, None, "/dev/net/tun", "modprobe tun"
        )

    def test_a_node_without_a_driver_names_modprobe(self) -> None:
        said = child("attempt(aiotun.open_tun('new0'))", prefix=with_node("dead"))
        check_said(
            said, aiotun.TunUnavailableError, errno.ENODEV, None, "/dev/net/tun", "modprobe tun"
        )

    @pytest.mark.parametrize(("how", "code"), [("directory", errno.EISDIR), ("loop", errno.ELOOP)])
    def test_something_other_than_a_node_is_recognized(self, how: str, code: int) -> None:
        said = child("attempt(aiotun.open_tun('new0'))", prefix=with_node(how))
        words = ["/dev/net/tun is not a device node", "remove it", "--device /dev/net/tun"]
        check_said(said, aiotun.TunUnavailableError, code, None, *words)

    def test_the_node_of_something_else(self) -> None:
        """Another device node has been put in its place."""
        prefix = ["unshare", "-m", "sh", "-c", 'mount -B /dev/null /dev/net/tun && exec "$@"', "sh"]
        said = child("attempt(aiotun.open_tun('new0'))", prefix=prefix)
        check_said(said, aiotun.TunUnavailableError, errno.ENOTTY, None, "/dev/net/tun")


class TestNotPermitted:
    def test_a_node_with_a_closed_mode_names_chmod(self) -> None:
        said = ordinary_child("attempt(aiotun.open_tun('new0'))", prefix=with_node("closed"))
        check_said(said, aiotun.NotPermittedError, errno.EACCES, None, "chmod 0666 /dev/net/tun")

    def test_a_nodev_mount_names_the_remount(self) -> None:
        """On a nodev mount not even root can open the node, whatever its mode is."""
        said = child("attempt(aiotun.open_tun('new0'))", prefix=with_node("nodev"))
        words = ["'nodev'", "'mount -o remount,bind,dev /dev/net'"]
        check_said(said, aiotun.NotPermittedError, errno.EACCES, None, *words)

    def test_a_containers_rules_for_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The device cgroup's error is simulated, as a test would need its own cgroup."""

        def refuse(*args: object) -> int:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(aiotun.NotPermittedError) as caught:
                ioctl.open_node()
        words = ["--device /dev/net/tun", "DeviceAllow=/dev/net/tun rw"]
        check(caught.value, aiotun.NotPermittedError, errno.EPERM, None, *words)

    @pytest.mark.parametrize("what", ["address", "route"])
    async def test_ipv6_is_switched_off(self, what: str) -> None:
        """The kernel says EACCES, but the cause is not a missing privilege."""
        options: Any = {"addresses": ["fd00::1/64"]}
        if what == "route":
            options = {"routes": ["fd01::/64"]}
        with ipv6_switched_off():
            async with aiotun.open_tun("new0", addresses=["10.0.0.1/24"]) as tun:
                add = tun.link.add_address if what == "address" else tun.link.add_route
                with pytest.raises(aiotun.NotPermittedError) as later:
                    await add("fd00::1/64" if what == "address" else "fd01::/64")
            with pytest.raises(aiotun.NotPermittedError) as caught:
                await aiotun.open_tun("new0", **options)
        words = [
            f"add the {what}", "IPv6 is switched off for new0",
            "sysctl -w net.ipv6.conf.all.disable_ipv6=0",
            "--sysctl net.ipv6.conf.all.disable_ipv6=0",
        ]  # fmt: skip
        for each in (later, caught):
            check(each.value, aiotun.NotPermittedError, errno.EACCES, "new0", *words)
            assert "CAP_NET_ADMIN" not in str(each.value)
        assert names() == []

    @pytest.mark.parametrize("mode", ["tun", "tap"])
    def test_creating_a_device_names_the_capability(self, mode: str) -> None:
        said = ordinary_child(f"attempt(aiotun.open_{mode}('new0'))")
        words = ["CAP_NET_ADMIN", "unshare -rn", f"ip tuntap add dev new0 mode {mode}"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, "new0", *words)
        assert names() == []

    @pytest.mark.parametrize("mode", ["tun", "tap"])
    def test_creating_with_a_name_of_the_kernels_choice(self, mode: str) -> None:
        said = ordinary_child(f"attempt(aiotun.open_{mode}())")
        words = ["CAP_NET_ADMIN", f"ip tuntap add dev {mode}0 mode {mode}"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, None, *words)

    @pytest.mark.parametrize("whose", [["user", "12"], ["group", "12"]])
    def test_a_device_of_another_user_is_refused(self, whose: list[str]) -> None:
        if not REAL_ROOT:
            pytest.skip("a user namespace like this has one user only")
        make("old0", "tun", *whose)
        said = ordinary_child("attempt(aiotun.open_tun('old0'))")
        words = ["old0 belongs to another user or group", "ip tuntap"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, "old0", *words)

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"addresses": ["10.0.0.1/24"]}, "add the address 10.0.0.1/24"),
            ({"mtu": 1400}, "set the MTU to 1400"),
            ({"txqueuelen": 5}, "set the queue length to 5"),
            ({"gso_max_segs": 5}, "set the GSO segments to 5"),
            ({"routes": ["10.1.0.0/16"]}, "add the route 10.1.0.0/16"),
            ({"mac": "02:00:00:00:00:01"}, "set the MAC to 02:00:00:00:00:01"),
            ({"bridge": "br0"}, "set the master to br0"),
        ],
    )
    def test_configuring_ones_own_device_names_the_capability(
        self, options: dict[str, Any], word: str
    ) -> None:
        """An owner may attach to the device, but may not change it."""
        ip("link", "add", "br0", "type", "bridge")
        make("old0", "tap", "user", str(ORDINARY))
        ip("link", "set", "old0", "up")
        before = state("old0")
        said = ordinary_child(f"attempt(aiotun.open_tap('old0', **{options!r}))")
        words = [word, "old0", "CAP_NET_ADMIN", "run as root"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, "old0", *words)
        assert state("old0") == before

    def test_bringing_ones_own_device_up_names_the_capability(self) -> None:
        make("old0", "tun", "user", str(ORDINARY))
        said = ordinary_child("attempt(aiotun.open_tun('old0'))")
        words = ["bring the link up", "CAP_NET_ADMIN", "run as root"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, "old0", *words)

    def test_entering_a_namespace_names_the_capability(self) -> None:
        with another_namespace() as path:
            fd = os.open(path, os.O_RDONLY)
            try:
                said = ordinary_child(f"attempt(aiotun.open_tun('new0', netns={fd}))", fds=[fd])
            finally:
                os.close(fd)
        check_said(
            said, aiotun.NotPermittedError, errno.EPERM, None, "CAP_SYS_ADMIN", "run as root"
        )


class TestUnprivileged:
    """An ordinary user can open a device that root has prepared, with the same options."""

    CODE = """
        import pathlib
        import socket

        status = pathlib.Path("/proc/self/status").read_text()
        assert "CapEff:\\t0000000000000000" in status

        async def main():
            options = dict(
                addresses=["10.0.0.1/24", "fd00::1/64"],
                routes=["10.1.0.0/16 via 10.0.0.2"],
                mtu=1400,
                txqueuelen=77,
                owner=OWNER,
                persist=True,
                sndbuf=100_000,
                MORE
            )
            async with aiotun.open_KIND("old0", **options) as device:
                assert (device.mtu, device.closed) == (1400, False)
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sock.bind(("10.0.0.1", 0))
                sock.settimeout(5)
                sock.sendto(b"out", ("10.0.0.2", 9))
                async with asyncio.timeout(5):
                    while b"out" not in (packet := await device.recv()) and KIND_IS_TUN:
                        pass
                if KIND_IS_TUN:
                    # The same datagram the other way round.
                    answer = bytearray(packet)
                    answer[12:16], answer[16:20] = packet[16:20], packet[12:16]
                    answer[20:22], answer[22:24] = packet[22:24], packet[20:22]
                    await device.send(answer)
                    assert sock.recv(10) == b"out"
                sock.close()

        asyncio.run(main())
        print(json.dumps("done"))
    """

    @pytest.mark.parametrize(
        ("kind", "more"),
        [
            ("tun", ""),
            ("tap", ""),
            ("tun", "queues=2"),
            ("tap", "queues=2"),
            ("tap", "offload='raw'"),
        ],
    )
    def test_an_owner_can_use_a_prepared_device(self, kind: str, more: str) -> None:
        make("old0", kind, "user", str(ORDINARY), *(["multi_queue"] if "queues" in more else []))
        ip("link", "set", "old0", "mtu", "1400", "txqueuelen", "77", "up")
        ip("addr", "add", "10.0.0.1/24", "dev", "old0")
        ip("addr", "add", "fd00::1/64", "dev", "old0", "nodad")
        ip("route", "add", "10.1.0.0/16", "via", "10.0.0.2", "dev", "old0")
        before = state("old0")
        code = self.CODE.replace("OWNER", str(ORDINARY)).replace("MORE", more)
        code = code.replace("KIND_IS_TUN", str(kind == "tun")).replace("KIND", kind)
        assert ordinary_child(code) == "done"
        now = state("old0")
        if more == "offload='raw'":  # an owner may set the header, and nothing else
            assert now["link"]["linkinfo"]["info_data"].pop("vnet_hdr") is True
            assert before["link"]["linkinfo"]["info_data"].pop("vnet_hdr") is False
        assert now == before

    @pytest.mark.parametrize("kind", ["tun", "tap"])
    async def test_options_that_hold_already_take_no_privilege(self, kind: str) -> None:
        """An option that holds already, in any spelling, needs no request and so no privilege."""
        options: dict[str, Any] = {
            "addresses": [
                "10.0.0.1/24",
                "10.2.0.1/32",
                "10.3.0.1 peer 10.3.0.2/32",
                "fd00::1/64",
                "fd00:0:0:1::1/64",
                "fd01::1 peer fd01::2/128",
            ],
            "routes": [
                "default",
                "default via fd00::2",
                "10.4.0.0/16 via 10.0.0.2",
                "10.5.0.1",
                "10.6.0.0/16 metric 5 table 100",
                "10.7.0.0/16 metric 0",
                "10.8.0.0/16 table 254",
                "fd02::/64",
                "fd03::/64 metric 1024",
                "fd04::/64 metric 5 via fd00::2",
                "fd05::/64 table 100",
                "FD06::0/64",
            ],
            "mtu": 1400,
        }
        if kind == "tap":
            ip("link", "add", "br0", "type", "bridge")
            options |= {"mac": "02:00:00:00:00:AB", "bridge": "br0"}
        opener: Any = aiotun.open_tap if kind == "tap" else aiotun.open_tun
        async with opener("old0", persist=True, owner=ORDINARY, **options):
            pass
        before = state("old0")
        code = f"attempt(aiotun.open_{kind}('old0', persist=True, owner={ORDINARY}, **{options!r}))"
        assert ordinary_child(code) == {"class": None}
        assert state("old0") == before

    def test_an_option_that_changes_something_takes_privilege(self) -> None:
        make("old0", "tun", "user", str(ORDINARY))
        ip("link", "set", "old0", "mtu", "1400", "up")
        ip("addr", "add", "10.0.0.1/24", "dev", "old0")
        code = "attempt(aiotun.open_tun('old0', addresses=['10.0.0.1/24'], mtu={}))"
        assert ordinary_child(code.format(1400)) == {"class": None}
        said = ordinary_child(code.format(1401))
        words = ["set the MTU to 1401", "CAP_NET_ADMIN", "run as root"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, "old0", *words)

    def test_a_group_is_enough(self) -> None:
        make("old0", "tun", "group", str(ORDINARY))
        ip("link", "set", "old0", "up")
        assert ordinary_child("attempt(aiotun.open_tun('old0'))") == {"class": None}

    def test_owner_and_group_must_both_fit(self) -> None:
        if not REAL_ROOT:
            pytest.skip("a user namespace like this has one group only")
        make("old0", "tun", "user", str(ORDINARY), "group", "12")
        ip("link", "set", "old0", "up")
        said = ordinary_child("attempt(aiotun.open_tun('old0'))")
        words = ["both must match", "ip tuntap"]
        check_said(said, aiotun.NotPermittedError, errno.EPERM, "old0", *words)

    def test_anybody_may_where_there_is_no_owner(self) -> None:
        make("old0", "tun")
        ip("link", "set", "old0", "up")
        assert ordinary_child("attempt(aiotun.open_tun('old0'))") == {"class": None}


class TestDeviceBusy:
    async def test_its_only_queue_is_taken(self) -> None:
        with held("old0"):
            error = await caught(aiotun.open_tun("old0"))
        check(error, aiotun.DeviceBusyError, errno.EBUSY, "old0", "close it there", "another name")

    async def test_exclusive_refuses_an_existing_device(self) -> None:
        make("old0")
        error = await caught(aiotun.open_tun("old0", exclusive=True))
        words = ["exists already", "leave out exclusive"]
        check(error, aiotun.DeviceBusyError, errno.EBUSY, "old0", *words)

    async def test_the_257th_queue_raises_device_busy_error(self) -> None:
        with held("old0", Iff.TUN | Iff.NO_PI | Iff.MULTI_QUEUE, 256):
            error = await caught(aiotun.open_tun("old0", multi_queue=True))
        check(error, aiotun.DeviceBusyError, errno.E2BIG, "old0", "256 queues", "open fewer")


class TestDeviceMismatch:
    def check(self, error: BaseException, name: str, *words: str) -> None:
        check(error, aiotun.DeviceMismatchError, errno.EINVAL, name, *words)

    async def test_opening_a_tap_as_a_tun_is_refused(self) -> None:
        make("old0", "tap")
        error = await caught(aiotun.open_tun("old0"))
        self.check(error, "old0", "a TAP device, not a TUN", "choose another name")

    async def test_opening_a_tun_as_a_tap_is_refused(self) -> None:
        make("old0", "tun")
        error = await caught(aiotun.open_tap("old0"))
        self.check(error, "old0", "a TUN device, not a TAP", "choose another name")

    @pytest.mark.parametrize("kind", ["veth", "bridge", "loopback"])
    async def test_another_kind_of_interface(self, kind: str) -> None:
        name = "lo" if kind == "loopback" else "old0"
        if name != "lo":
            ip("link", "add", name, "type", kind)
        for opener in (aiotun.open_tun(name), aiotun.open_tap(name)):
            error = await caught(opener)
            self.check(error, name, "another kind of interface", "choose another name")

    async def test_single_queue_as_multi_queue(self) -> None:
        make("old0")
        for opener in (
            aiotun.open_tun("old0", queues=2),
            aiotun.open_tun("old0", multi_queue=True),
        ):
            error = await caught(opener)
            self.check(error, "old0", "single-queue", "queues=1")

    async def test_multi_queue_as_single_queue(self) -> None:
        make("old0", "tun", "multi_queue")
        error = await caught(aiotun.open_tun("old0"))
        self.check(error, "old0", "a multi-queue device", "multi_queue=True")

    @pytest.mark.parametrize(
        ("theirs", "options", "words"),
        [
            (Iff.VNET_HDR | Iff.NO_PI, {}, "a virtio-net header"),
            (Iff.NO_PI, {"offload": "raw"}, "no virtio-net header"),
            (Iff(0), {}, "a packet-info header"),
            (Iff.NO_PI, {"packet_info": True}, "no packet-info header"),
        ],
    )
    async def test_headers_that_others_rely_on(
        self, theirs: Iff, options: dict[str, Any], words: str
    ) -> None:
        with held("old0", Iff.TUN | Iff.MULTI_QUEUE | theirs):
            error = await caught(aiotun.open_tun("old0", multi_queue=True, **options))
        self.check(error, "old0", words, "same offload and packet_info", "end that program")

    async def test_a_header_of_another_size(self) -> None:
        flags = Iff.TUN | Iff.NO_PI | Iff.MULTI_QUEUE | Iff.VNET_HDR
        with held("old0", flags) as (fd,):
            fcntl.ioctl(fd, Ioctl.TUNSETVNETHDRSZ, struct.pack("i", 12))
            error = await caught(aiotun.open_tun("old0", multi_queue=True, offload="raw"))
        self.check(error, "old0", "header of 12 bytes", "end that program")

    async def test_a_multi_queue_tap_as_a_tun(self) -> None:
        """Two things don't fit; the error names the mode."""
        make("old0", "tap", "multi_queue")
        error = await caught(aiotun.open_tun("old0"))
        self.check(error, "old0", "a TAP device, not a TUN", "choose another name")

    @pytest.mark.parametrize("word", ["disable", "enable"])
    async def test_a_queue_in_that_state_already(self, word: str) -> None:
        async with aiotun.open_tun("old0", queues=2) as tun:
            queue = tun.queues[1]
            if word == "disable":
                queue.disable()
            with pytest.raises(aiotun.DeviceMismatchError) as raised:
                getattr(queue, word)()
            self.check(raised.value, "old0", word, "already")

    async def test_disabling_the_only_queue(self) -> None:
        async with aiotun.open_tun("old0") as tun:
            with pytest.raises(aiotun.DeviceMismatchError) as raised:
                tun.queues[0].disable()
        self.check(raised.value, "old0", "disable this queue", "multi-queue")

    async def test_a_filter_on_a_tun(self) -> None:
        """The ioctl exists for TAP devices only, and `TunDevice` does not offer it."""
        assert not hasattr(aiotun.TunDevice, "set_tx_filter")
        async with aiotun.open_tap("old0") as tap:
            with pytest.raises(aiotun.DeviceMismatchError) as raised:
                tap.attach_filter([(0xFFFF, 0, 0, 0)])
        self.check(raised.value, "old0", "filter")

    async def test_a_name_that_only_the_kernel_knows_to_be_wrong(self) -> None:
        """aiotun checks names before; the check is bypassed here to get the kernel's error."""
        with pytest.raises((ValueError, aiotun.DeviceMismatchError)):
            await aiotun.open_tun("à0")
        assert names() == []


class TestDevice:
    async def test_calls_on_a_closed_device_raise_device_closed_error(self) -> None:
        async with aiotun.open_tun("old0") as tun:
            pass
        for awaitable in (tun.recv(), tun.send(b""), tun.recv_many(), tun.send_many([b"x"])):
            error = await caught(awaitable)
            check(error, aiotun.DeviceClosedError, None, None, "old0", "open")
            assert not hasattr(error, "errno")
        for call in (tun.recv_nowait, lambda: tun.send_nowait(b"x"), lambda: tun.set_carrier(True)):
            with pytest.raises(aiotun.DeviceClosedError) as raised:
                call()
            check(raised.value, aiotun.DeviceClosedError, None, None, "old0", "open")

    async def test_calls_on_a_deleted_device_raise_device_lost_error(self) -> None:
        async with aiotun.open_tun("old0") as tun:
            ip("link", "del", "old0")
            packet = make_icmp_echo("10.0.0.2", "10.0.0.1")
            for awaitable in (tun.recv(), tun.send(packet), tun.send_many([packet])):
                error = await caught(awaitable)
                words = ["old0 is gone", "open it again"]
                check(error, aiotun.DeviceLostError, errno.EBADFD, "old0", *words)
            with pytest.raises(aiotun.DeviceLostError) as raised:
                tun.set_carrier(True)
            check(raised.value, aiotun.DeviceLostError, errno.EBADFD, "old0", "open it again")

    async def test_a_device_is_lost_with_the_namespace_it_was_moved_to(self) -> None:
        """A device is deleted with the namespace that it was moved to."""
        async with aiotun.open_tun("old0") as tun:
            with another_namespace() as path:
                ip("link", "set", "dev", "old0", "netns", path.split("/")[2])
                waiting = asyncio.create_task(tun.recv())
                await asyncio.sleep(0)
                assert not waiting.done()
            # The kernel destroys namespaces later, one at a time on the whole machine.
            error = await caught(asyncio.wait_for(waiting, 45))
            words = ["old0 is gone", "namespace ended", "open it again"]
            check(error, aiotun.DeviceLostError, errno.EBADFD, "old0", *words)

    async def test_sending_on_a_link_that_is_down_raises_link_down_error(self) -> None:
        async with aiotun.open_tun("old0", up=False) as tun:
            packet = make_icmp_echo("10.0.0.2", "10.0.0.1")
            for awaitable in (tun.send(packet), tun.send_many([packet])):
                error = await caught(awaitable)
                check(error, aiotun.LinkDownError, errno.EIO, "old0", "link.up()", "not sent")


class TestPacket:
    @pytest.mark.parametrize("packet", [b"", b"\0" * 20, b"\x55" + b"\0" * 19])
    async def test_a_tun_refuses_what_is_neither_ipv4_nor_ipv6(self, packet: bytes) -> None:
        async with aiotun.open_tun("old0") as tun:
            error = await caught(tun.send(packet))
            check(error, aiotun.PacketError, errno.EINVAL, "old0", "neither IPv4 nor IPv6")
            assert tun.stats.refused == 1

    async def test_a_tap_refuses_what_is_shorter_than_an_ethernet_header(self) -> None:
        async with aiotun.open_tap("old0") as tap:
            error = await caught(tap.send(bytes(13)))
            check(error, aiotun.PacketError, errno.EINVAL, "old0", "14-byte Ethernet header")

    async def test_raw_offload_refuses_a_cut_off_virtio_header(self) -> None:
        async with aiotun.open_tun("old0", offload="raw") as tun:
            error = await caught(tun.send(b"\1" * 9))
            check(error, aiotun.PacketError, errno.EINVAL, "old0", "header")

    async def test_a_packet_too_long_for_the_kernel_is_refused(self) -> None:
        async with aiotun.open_tun("old0") as tun:
            error = await caught(tun.send(b"\x45" + bytes(8 << 20)))
            code = error.errno if isinstance(error, OSError) and error.errno else 0
            assert code in (errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE)
            check(error, aiotun.PacketError, code, "old0", "shorter")

    async def test_the_count_of_sent_packets_survives_pickling(self) -> None:
        """`sent` is the number of packets that went before the error."""
        async with aiotun.open_tun("old0") as tun:
            good = make_icmp_echo("10.0.0.2", "10.0.0.1")
            error = await caught(tun.send_many([good, good, b"", good]))
            check(error, aiotun.PacketError, errno.EINVAL, "old0")
            assert isinstance(error, aiotun.PacketError)
            assert error.sent == 2
            assert pickle.loads(pickle.dumps(error)).sent == 2

    async def test_a_buffer_too_small_raises_packet_truncated_error(self) -> None:
        async with aiotun.open_tun("old0", addresses=["10.0.0.1/24"]) as tun:
            _send_to("10.0.0.2")
            error = await caught(tun.recv_into(bytearray(10)))
            words = ["29 bytes", "10", "larger buffer"]
            check(error, aiotun.PacketTruncatedError, errno.EMSGSIZE, "old0", *words)
            assert tun.stats.truncated == 1

    async def test_decode_errors_chain_the_parsers_error(self) -> None:
        """The parser's error is the cause of the PacketDecodeError."""
        async with aiotun.open_tap("old0") as tap:
            with contextlib.closing(_raw_socket("old0")) as raw:
                # dpkt reads an 802.3 length, and then expects an IPX header, which is missing.
                raw.send(b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x81\x00" + b"\0")
            decoded = tap.decoded(errors="raise")
            error = await caught(anext(decoded))
            check(error, aiotun.PacketDecodeError, None, None, "bytes")
            assert isinstance(error.__cause__, dpkt.Error)
            assert tap.stats.undecodable == 1

    @pytest.mark.parametrize("data", [b"", b"\x45", b"\x60" + bytes(10), b"\x10" * 20])
    def test_decode_packet_refuses_malformed_bytes(self, data: bytes) -> None:
        with pytest.raises(aiotun.PacketDecodeError) as raised:
            aiotun.decode_packet(data)
        check(raised.value, aiotun.PacketDecodeError, None, None)
        if data[:1] in (b"\x45", b"\x60"):
            assert isinstance(raised.value.__cause__, dpkt.Error)


class TestLink:
    async def test_a_missing_namespace_names_ip_netns_add(self) -> None:
        error = await caught(aiotun.open_tun("old0", netns="missing"))
        path = "/run/netns/missing"
        check(error, aiotun.LinkError, errno.ENOENT, path, path, "ip netns add")

    async def test_a_missing_bridge_names_ip_link(self) -> None:
        error = await caught(aiotun.open_tap("old0", bridge="missing0"))
        check(error, aiotun.LinkError, errno.ENODEV, "missing0", "ip link")

    async def test_a_missing_interface_raises_link_error(self) -> None:
        error = await caught(aiotun.Link("missing0").info())
        check(error, aiotun.LinkError, errno.ENODEV, "missing0", "ip link")

    async def test_an_mtu_too_small_for_ipv6(self) -> None:
        async with aiotun.open_tun("new0", mtu=1279) as tun:
            words = ["at least 1280 bytes", "the MTU of new0 is 1279"]
            with pytest.raises(aiotun.LinkError) as caught:
                await tun.link.add_address("fd00::1/64")
            check(caught.value, aiotun.LinkError, errno.EINVAL, "new0", *words)
            with pytest.raises(aiotun.LinkError) as caught:
                await tun.link.add_route("fd01::/64")
            check(caught.value, aiotun.LinkError, errno.ENODEV, "new0", *words)

    async def test_the_kernels_own_words(self) -> None:
        error = await caught(
            aiotun.open_tun("old0", addresses=["10.0.0.1/24"], routes=["10.1.0.0/16 via 192.0.2.1"])
        )
        words = [
            "Nexthop has invalid gateway",
            "10.1.0.0/16 via 192.0.2.1",
            "the gateway 192.0.2.1",
            "onlink",
        ]
        check(error, aiotun.LinkError, errno.ENETUNREACH, "old0", *words)

    async def test_the_link_of_a_lost_device(self) -> None:
        async with aiotun.open_tun("old0") as tun:
            ip("link", "del", "old0")
            error = await caught(tun.link.up())
            check(error, aiotun.LinkError, errno.ENODEV, "old0", "ip link")


def _send_to(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (address, 9))


def _raw_socket(name: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    raw.bind((name, 0))
    return raw
