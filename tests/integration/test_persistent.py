"""Persistent devices on the real kernel, checked with `ip tuntap` and `ip -d link`."""

import asyncio
import errno
import fcntl
import grp
import itertools
import json
import os
import pwd
import struct
import subprocess
from typing import Any

import pytest

import aiotun
from aiotun._kernel import ioctl
from aiotun._kernel.abi import Iff, Ioctl

from ..helpers import REAL_ROOT, ip
from .kernel import (
    ORDINARY,
    another_namespace,
    changes,
    child,
    held,
    inside,
    link,
    make,
    names,
    ordinary_child,
    state,
    tun_data,
    with_node,
)


def tuntap(name: str) -> Any:
    """The output of `ip tuntap show` for one device, without its name; it reads sysfs."""
    script = "mount -t sysfs sysfs /sys && exec ip -j tuntap show"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], check=True, capture_output=True, text=True
    )
    (found,) = (each for each in json.loads(done.stdout) if each.pop("ifname") == name)
    return found


def shape(name: str) -> Any:
    """The output of `ip -d link`, without the attributes that are unique to a device."""
    shown = link(name)
    return {key: shown[key] for key in shown if key not in ("ifname", "ifindex", "address")}


OPTIONS = {
    "multi_queue": ("multi_queue", True),
    "packet_info": ("pi", True),
    "vnet_header": ("vnet_hdr", True),
    "owner": (f"user {ORDINARY}", ORDINARY),
    "group": (f"group {ORDINARY}", ORDINARY),
}


class TestCreating:
    @pytest.mark.parametrize("mode", ["tun", "tap"])
    @pytest.mark.parametrize(
        "chosen",
        [each for n in (0, 1, 2, 5) for each in itertools.combinations(OPTIONS, n)],
        ids="+".join,
    )
    async def test_created_devices_equal_those_of_ip_tuntap(
        self, mode: Any, chosen: tuple[str, ...]
    ) -> None:
        """In every attribute that iproute2 shows, from netlink and from sysfs."""
        options: Any = {name: OPTIONS[name][1] for name in chosen}
        assert await aiotun.create_persistent("ours0", mode, **options) == "ours0"
        words = [word for name in chosen for word in OPTIONS[name][0].split()]
        make("theirs0", mode, *words)
        assert shape("ours0") == shape("theirs0")
        assert tuntap("ours0") == tuntap("theirs0")
        ours, theirs = await aiotun.list_devices()
        assert [ours.name, theirs.name] == ["ours0", "theirs0"]
        for field in ("mode", "persist", "queues", "attached", *OPTIONS):
            assert getattr(ours, field) == getattr(theirs, field)

    async def test_create_persistent_takes_all_options_by_position(self) -> None:
        await aiotun.create_persistent("ours0", "tap", True, ORDINARY, ORDINARY, True, True)
        (found,) = await aiotun.list_devices()
        assert found == aiotun.TunTapInfo(
            name="ours0",
            index=link("ours0")["ifindex"],
            mode="tap",
            multi_queue=True,
            queues=0,
            persist=True,
            owner=ORDINARY,
            group=ORDINARY,
            packet_info=True,
            vnet_header=True,
            attached=False,
        )

    async def test_owner_and_group_by_name(self) -> None:
        user, group = pwd.getpwuid(0).pw_name, grp.getgrgid(0).gr_name
        await aiotun.create_persistent("ours0", owner=user, group=group)
        (found,) = await aiotun.list_devices()
        assert (found.owner, found.group) == (0, 0)

    @pytest.mark.parametrize("mode", ["tun", "tap"])
    async def test_the_kernel_picks_the_name(self, mode: Any) -> None:
        make(f"{mode}0", mode)
        assert await aiotun.create_persistent(mode=mode) == f"{mode}1"
        assert await aiotun.create_persistent("vpn%d", mode) == "vpn0"
        assert await aiotun.create_persistent("vpn%d", mode) == "vpn1"
        assert names() == [f"{mode}0", f"{mode}1", "vpn0", "vpn1"]

    async def test_a_created_device_can_be_opened(self) -> None:
        name = await aiotun.create_persistent("ours0", multi_queue=True)
        async with aiotun.open_tun(name, queues=2):
            assert tun_data(name)["numqueues"] == 2
        assert names() == [name]

    @pytest.mark.parametrize("kind", ["tun", "tap", "bridge", "lo"])
    async def test_an_existing_interface_is_refused_and_not_changed(self, kind: str) -> None:
        """Even if the existing device would fit."""
        name = "lo" if kind == "lo" else "old0"
        if kind == "bridge":
            ip("link", "add", "old0", "type", "bridge")
        elif kind != "lo":
            make("old0", kind, "pi")
        before = state(name)
        with pytest.raises(aiotun.DeviceBusyError, match=f"{name} exists already") as caught:
            await aiotun.create_persistent(name, "tap" if kind == "tap" else "tun", owner=ORDINARY)
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, name)
        assert "leave out" not in str(caught.value)
        assert changes(name, before) == []

    async def test_of_several_creations_at_once_one_succeeds(self) -> None:
        results = await asyncio.gather(
            *(aiotun.create_persistent("ours0") for _ in range(5)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in results) == ["DeviceBusyError"] * 4 + ["str"]
        assert names() == ["ours0"]

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"name": "a" * 16}, ValueError, "1 to 15"),
            ({"name": "%d%d"}, ValueError, "one '%d'"),
            ({"name": 7}, TypeError, "must be a str"),
            ({"mode": "veth"}, ValueError, "'tun' or 'tap'"),
            ({"mode": None}, ValueError, "'tun' or 'tap'"),
            ({"multi_queue": 1}, TypeError, "multi_queue must be True or False"),
            ({"vnet_header": 1}, TypeError, "vnet_header must be True or False"),
            ({"packet_info": "yes"}, TypeError, "packet_info must be True or False"),
            ({"owner": "nobody-of-that-name"}, ValueError, "no such user"),
            ({"group": "nobody-of-that-name"}, ValueError, "no such group"),
            ({"owner": -1}, ValueError, "owner must be"),
            ({"group": True}, TypeError, "group must be an int"),
            ({"netns": -1}, ValueError, "not a valid fd"),
        ],
    )
    async def test_create_persistent_refuses_invalid_arguments(
        self, options: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error, match=said):
            await aiotun.create_persistent(**options)
        assert names() == []

    @pytest.mark.parametrize("who", ["owner", "group"])
    def test_an_owner_that_stands_for_nobody(self, who: str) -> None:
        """A user namespace has one user, which is not 12345: the last step but one fails."""
        left, kind, said = child(
            f"""
            try:
                asyncio.run(aiotun.create_persistent("ours0", {who}=12345))
            except aiotun.AiotunError as error:
                said = type(error).__name__, str(error)
            print(json.dumps([sorted(os.listdir("/proc/sys/net/ipv4/conf")), *said]))
            """,
            prefix=["unshare", "-rn"],
        )
        assert "ours0" not in left
        assert kind == "DeviceMismatchError"
        assert "12345" in said
        assert "uid_map" in said

    @pytest.mark.parametrize("step", ["get_index", "set_group", "set_owner", "set_persist"])
    async def test_a_step_that_fails_leaves_nothing(
        self, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            assert names() == ["ours0"]
            raise aiotun.DeviceLostError(errno.EBADFD, "it went")

        monkeypatch.setattr(ioctl, step, fail)
        with pytest.raises(aiotun.DeviceLostError):
            await aiotun.create_persistent("ours0", owner=0, group=0)
        assert names() == []

    @pytest.mark.parametrize("multi_queue", [False, True])
    async def test_a_cancelled_creation_leaves_no_device(self, multi_queue: bool) -> None:
        """Cancels at every turn of the loop until the device has been created."""
        outcomes = set()
        for turns in range(30):
            task = asyncio.ensure_future(
                aiotun.create_persistent("ours0", multi_queue=multi_queue, owner=ORDINARY)
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                assert names() == []
            else:
                assert names() == ["ours0"]
                await aiotun.delete_persistent("ours0")
            outcomes.add(task.cancelled())
        assert True in outcomes

    async def cancelled_with(
        self, before: Any, monkeypatch: pytest.MonkeyPatch, netns: str | None = None
    ) -> None:
        """Cancel when the device has become persistent; `before` is called just before."""
        loop, original = asyncio.get_running_loop(), ioctl.set_persist

        def set_persist(fd: int, name: str, on: bool) -> None:
            original(fd, name, on)
            if on:
                before()
                loop.call_soon_threadsafe(task.cancel)

        monkeypatch.setattr(ioctl, "set_persist", set_persist)
        task = asyncio.ensure_future(
            aiotun.create_persistent("ours0", "tap", multi_queue=True, netns=netns)
        )
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_a_creation_cancelled_after_the_request_is_undone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        await self.cancelled_with(lambda: seen.extend(names()), monkeypatch)
        assert seen == ["ours0"]
        assert names() == []

    async def test_cancelled_after_somebody_attached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The device stays as long as that program holds it, and no longer."""
        other = held("ours0", Iff.TAP | Iff.NO_PI | Iff.MULTI_QUEUE)
        await self.cancelled_with(other.__enter__, monkeypatch)
        assert names() == ["ours0"]
        other.__exit__(None, None, None)
        assert names() == []

    async def test_undoing_does_not_touch_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another program deletes it and makes one of the same name."""

        def replace() -> None:
            ip("link", "del", "ours0")
            make("ours0", "tap", "multi_queue")

        await self.cancelled_with(replace, monkeypatch)
        assert names() == ["ours0"]
        assert tun_data("ours0")["persist"]

    async def test_undoing_is_in_the_same_namespace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make("ours0", "tap", "multi_queue")
        with another_namespace() as path:
            await self.cancelled_with(lambda: None, monkeypatch, netns=path)
            assert "ours0" not in inside(path, "ip", "-j", "link")
        assert tun_data("ours0")["persist"]


class TestDeleting:
    @pytest.mark.parametrize("mode", ["tun", "tap"])
    @pytest.mark.parametrize("words", [[], ["multi_queue"], ["pi", "vnet_hdr", "user", "0"]])
    async def test_devices_that_iproute2_made_are_deleted(
        self, mode: str, words: list[str]
    ) -> None:
        make("old0", mode, *words)
        make("other0", mode, *words)
        ip("link", "set", "old0", "up")
        assert await aiotun.delete_persistent("old0") is None  # type: ignore[func-returns-value]
        assert names() == ["other0"]

    @pytest.mark.parametrize("kind", ["bridge", "lo"])
    async def test_deleting_an_interface_that_is_neither_tun_nor_tap_is_refused(
        self, kind: str
    ) -> None:
        name = "lo" if kind == "lo" else "old0"
        if kind == "bridge":
            ip("link", "add", "old0", "type", "bridge")
        before = state(name)
        with pytest.raises(aiotun.DeviceMismatchError, match="not a TUN or TAP device") as caught:
            await aiotun.delete_persistent(name)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, name)
        assert changes(name, before) == []

    async def test_deleting_a_missing_device_raises_link_error(self) -> None:
        with pytest.raises(aiotun.LinkError, match="there is no interface old0") as caught:
            await aiotun.delete_persistent("old0")
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "old0")
        assert names() == []

    async def test_delete_persistent_refuses_invalid_arguments(self) -> None:
        with pytest.raises(ValueError, match="1 to 15"):
            await aiotun.delete_persistent("")
        with pytest.raises(TypeError, match="netns must be"):
            await aiotun.delete_persistent("old0", netns=True)

    @pytest.mark.parametrize("persist", [True, False])
    @pytest.mark.parametrize("queues", [1, 2])
    async def test_deleting_a_device_that_a_program_holds_is_refused(
        self, queues: int, persist: bool
    ) -> None:
        """This program holds it. It is not changed, and can be deleted when it is closed."""
        async with aiotun.open_tun("old0", queues=queues, persist=persist):
            before = state("old0")
            with pytest.raises(aiotun.DeviceBusyError, match="a program holds old0") as caught:
                await aiotun.delete_persistent("old0")
            assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "old0")
            assert changes("old0", before) == []
        assert names() == (["old0"] if persist else [])
        if persist:
            await aiotun.delete_persistent("old0")
            assert names() == []

    async def test_a_held_device_with_disabled_queues_is_not_deleted(self) -> None:
        async with aiotun.open_tun("old0", queues=2, persist=True) as tun:
            for queue in tun.queues:
                queue.disable()
            with pytest.raises(aiotun.DeviceBusyError):
                await aiotun.delete_persistent("old0")
            assert tun_data("old0")["persist"]

    async def test_a_held_device_without_a_carrier_is_not_deleted(self) -> None:
        """Netlink shows nothing else for a single-queue device: it looks as if nobody held it."""
        async with aiotun.open_tap("old0", persist=True, carrier=False):
            (found,) = await aiotun.list_devices()
            assert not found.attached
            with pytest.raises(aiotun.DeviceBusyError):
                await aiotun.delete_persistent("old0")

    @pytest.mark.parametrize("again", [False, True])
    async def test_somebody_deletes_it_meanwhile(
        self, again: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other program may make one of the same name, which stays; ours makes none."""
        make("old0")
        original = ioctl.open_node

        def open_node() -> int:
            ip("link", "del", "old0")
            if again:
                make("old0")
            return original()

        monkeypatch.setattr(ioctl, "open_node", open_node)
        with pytest.raises(aiotun.LinkError, match="deleted by another program") as caught:
            await aiotun.delete_persistent("old0")
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "old0")
        assert names() == (["old0"] if again else [])

    async def test_of_several_deletions_at_once_one_succeeds(self) -> None:
        make("old0")
        results = await asyncio.gather(
            *(aiotun.delete_persistent("old0") for _ in range(5)), return_exceptions=True
        )
        assert results.count(None) == 1
        # The others found it held by the first one, or deleted.
        for each in results:
            assert each is None or isinstance(each, aiotun.DeviceBusyError | aiotun.LinkError)
        assert names() == []

    async def test_cancelled_it_is_deleted_all_the_same(self) -> None:
        make("old0")
        task = asyncio.ensure_future(aiotun.delete_persistent("old0"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert names() == []


class TestListing:
    async def test_without_devices_the_list_is_empty(self) -> None:
        ip("link", "add", "br0", "type", "bridge")
        assert await aiotun.list_devices() == []

    async def test_listed_devices_agree_with_their_links(self) -> None:
        make("b0", "tap", "multi_queue", "user", "0")
        make("a0", "tun", "pi")
        ip("link", "add", "br0", "type", "bridge")
        ip("link", "set", "b0", "master", "br0")
        async with aiotun.open_tun("c0", queues=3):
            found = await aiotun.list_devices()
            told = [(await aiotun.Link(name).info()).tuntap for name in ("b0", "a0", "c0")]
        assert found == told
        assert [(each.name, each.persist, each.queues) for each in found] == [
            ("b0", True, 0),
            ("a0", True, 0),
            ("c0", False, 3),
        ]

    async def test_a_list_longer_than_one_netlink_message_is_complete(self) -> None:
        """The devices don't fit into one netlink message."""
        wanted = [f"m{number}" for number in range(60)]
        for name in wanted:
            make(name)
        assert [each.name for each in await aiotun.list_devices()] == wanted

    async def test_a_name_that_is_not_utf8(self) -> None:
        """The kernel allows any bytes; we show them as text, and the device works."""
        fd = ioctl.open_node()
        try:
            request = struct.pack("16sH22x", b"t\xff\xfe0", Iff.TUN | Iff.NO_PI)
            fcntl.ioctl(fd, Ioctl.TUNSETIFF, request)
            (found,) = await aiotun.list_devices()
            assert found.name == "t\udcff\udcfe0"
            device = aiotun.TunDevice.from_fd(fd)
        except BaseException:
            os.close(fd)
            raise
        async with device:
            assert device.name == (await device.link.info()).name == found.name
            await device.link.add_address("10.0.0.1/24")
            assert "10.0.0.1/24" in map(str, await device.link.addresses())
            await device.link.rename("tun0")
            assert device.name == "tun0"

    async def test_list_devices_refuses_a_netns_of_the_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="netns must be"):
            await aiotun.list_devices(netns=1.5)  # type: ignore[arg-type]


class TestNamespaces:
    @pytest.mark.parametrize("how", ["path", "fd"])
    async def test_devices_are_created_listed_and_deleted_in_another_namespace(
        self, how: str
    ) -> None:
        make("here0")
        with another_namespace() as path:
            fd = os.open(path, os.O_RDONLY)
            try:
                where = fd if how == "fd" else path
                assert await aiotun.create_persistent(netns=where) == "tun0"
                assert names() == ["here0"]
                assert [each.name for each in await aiotun.list_devices(where)] == ["tun0"]
                assert '"tun0"' in inside(path, "ip", "-j", "link")
                await aiotun.delete_persistent("tun0", netns=where)
                assert await aiotun.list_devices(netns=where) == []
            finally:
                os.close(fd)

    @pytest.mark.parametrize(
        "call",
        [
            lambda netns: aiotun.create_persistent(netns=netns),
            lambda netns: aiotun.delete_persistent("old0", netns),
            aiotun.list_devices,
        ],
    )
    async def test_a_missing_namespace_raises_link_error(self, call: Any) -> None:
        make("old0")
        with pytest.raises(aiotun.LinkError, match="ip netns add") as caught:
            await call("nowhere-at-all")
        assert caught.value.errno == errno.ENOENT
        assert names() == ["old0"]


class TestOrdinaryUsers:
    CODE = """
        async def main():
            try:
                await aiotun.CALL
            except aiotun.AiotunError as error:
                return [type(error).__name__, error.errno, error.filename, error.strerror]
            return [None] * 4

        print(json.dumps(asyncio.run(main())))
    """

    def ask(self, call: str, prefix: list[str] | None = None) -> Any:
        return ordinary_child(self.CODE.replace("CALL", call), prefix=prefix or [])

    def test_creating_takes_a_capability(self) -> None:
        kind, code, name, text = self.ask("create_persistent('ours0', 'tap')")
        assert (kind, code, name) == ("NotPermittedError", errno.EPERM, "ours0")
        for words in ("CAP_NET_ADMIN", "unshare -rn", "ip tuntap add dev ours0 mode tap"):
            assert words in text
        assert names() == []

    def test_an_owner_deletes_without_any(self) -> None:
        make("old0", "tap", "user", str(ORDINARY), "multi_queue")
        assert self.ask("delete_persistent('old0')")[0] is None
        assert names() == []

    def test_a_device_of_another_user_cannot_be_deleted(self) -> None:
        if not REAL_ROOT:
            pytest.skip("already run by an ordinary user: there is no other user")
        make("old0", "tap", "user", "1")
        kind, code, name, text = self.ask("delete_persistent('old0')")
        assert (kind, code, name) == ("NotPermittedError", errno.EPERM, "old0")
        assert "belongs to another user or group; delete it as its owner, or as root" in text
        assert tun_data("old0")["persist"]

    def test_listing_takes_no_privilege(self) -> None:
        make("old0", "tap")
        found = ordinary_child(
            "print(json.dumps([each.name for each in asyncio.run(aiotun.list_devices())]))"
        )
        assert found == ["old0"]

    @pytest.mark.parametrize(
        ("how", "kind", "said"),
        [
            ("none", "TunUnavailableError", "modprobe tun"),
            ("closed", "NotPermittedError", "chmod 0666"),
        ],
    )
    @pytest.mark.parametrize("call", ["create_persistent()", "delete_persistent('old0')"])
    def test_an_unusable_node_names_the_command_that_fixes_it(
        self, call: str, how: str, kind: str, said: str
    ) -> None:
        make("old0", "tap", "user", str(ORDINARY))
        found = self.ask(call, with_node(how))
        assert found[0] == kind
        assert said in found[3]
        assert names() == ["old0"]
