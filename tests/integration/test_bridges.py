"""Bridges on the real kernel, checked with `ip`."""

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun._link.session import Session

from ..helpers import ip
from .kernel import another_namespace, child, inside, is_up, link, make, names, ordinary_child


def bridge_data(name: str) -> Any:
    """The attributes that netlink gives for bridges only."""
    shown = link(name)["linkinfo"]
    assert shown["info_kind"] == "bridge"
    return shown["info_data"]


class TestCreating:
    async def test_a_bridge_is_up_with_the_kernels_defaults(self) -> None:
        """STP is off, and everything else is as the kernel chooses it."""
        ip("link", "add", "plain0", "type", "bridge")
        await aiotun.create_bridge("br0")
        assert names() == ["br0", "plain0"]
        assert is_up("br0")
        ours, plain = bridge_data("br0"), bridge_data("plain0")
        # Leave out what is made from the MAC, and running timers.
        for key in [key for key in ours if "timer" in key or "id" in key or "root" in key]:
            del ours[key], plain[key]
        assert ours == plain
        assert ours["stp_state"] == 0

    async def test_up_false_leaves_the_bridge_down(self) -> None:
        await aiotun.create_bridge("br0", up=False)
        assert not is_up("br0")

    @pytest.mark.parametrize("seconds", [2, 2.5, 30])
    async def test_stp_takes_the_given_forward_delay(self, seconds: float) -> None:
        await aiotun.create_bridge("br0", stp=True, forward_delay=seconds)
        data = bridge_data("br0")
        assert (data["stp_state"], data["forward_delay"]) == (1, seconds * 100)

    async def test_stp_with_the_kernels_delay(self) -> None:
        await aiotun.create_bridge("br0", stp=True)
        data = bridge_data("br0")
        assert (data["stp_state"], data["forward_delay"]) == (1, 1500)

    async def test_a_given_mac_stays_when_ports_join(self) -> None:
        """Without a given MAC the bridge would take the lowest MAC of its ports."""
        await aiotun.create_bridge("br0", mac="02:00:00:00:0A:01")
        assert link("br0")["address"] == "02:00:00:00:0a:01"
        async with aiotun.open_tap(bridge="br0", mac="02:00:00:00:00:01"):
            assert link("br0")["address"] == "02:00:00:00:0a:01"

    async def test_of_several_creations_at_once_one_succeeds(self) -> None:
        results = await asyncio.gather(
            *(aiotun.create_bridge("br0") for _ in range(5)), return_exceptions=True
        )
        errors = [each for each in results if each is not None]
        assert [type(each) for each in errors] == [aiotun.DeviceBusyError] * 4
        assert names() == ["br0"]

    @pytest.mark.parametrize("kind", ["bridge", "tun", "lo"])
    async def test_an_existing_interface_is_refused_and_not_changed(self, kind: str) -> None:
        name = "lo" if kind == "lo" else "old0"
        if kind == "tun":
            make("old0")
        elif kind == "bridge":
            ip("link", "add", "old0", "type", "bridge")
        before = link(name)
        with pytest.raises(aiotun.DeviceBusyError, match=f"{name} exists already") as caught:
            await aiotun.create_bridge(name, mac="02:00:00:00:00:01")
        assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, name)
        assert link(name) == before

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"name": "a" * 16}, ValueError, "1 to 15"),
            ({"name": "br%d"}, ValueError, "write the number"),
            ({"name": 7}, TypeError, "must be a str"),
            ({"stp": 1}, TypeError, "stp must be True or False"),
            ({"up": None}, TypeError, "up must be True or False"),
            ({"mac": "01:00:00:00:00:01"}, ValueError, "multicast"),
            ({"forward_delay": 15}, ValueError, "needs stp=True"),
            ({"forward_delay": 1.9, "stp": True}, ValueError, "2 to 30 seconds"),
            ({"forward_delay": 31, "stp": True}, ValueError, "2 to 30 seconds"),
            ({"forward_delay": float("nan"), "stp": True}, ValueError, "2 to 30 seconds"),
            ({"forward_delay": "15", "stp": True}, TypeError, "number of seconds"),
            ({"netns": ""}, ValueError, "not a valid name or path"),
        ],
    )
    async def test_create_bridge_refuses_invalid_arguments(
        self, options: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error, match=said):
            await aiotun.create_bridge(**{"name": "br0", **options})
        assert names() == []

    async def test_a_name_that_the_kernel_reserves_raises_link_error(self) -> None:
        with pytest.raises(aiotun.LinkError, match="could not create the bridge all: ") as caught:
            await aiotun.create_bridge("all")
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "all")

    async def test_a_cancelled_creation_leaves_no_bridge(self) -> None:
        """Cancels at every turn of the loop until the bridge has been created."""
        outcomes = set()
        for turns in range(50):
            task = asyncio.ensure_future(aiotun.create_bridge("br0"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            outcomes.add(task.cancelled())
            assert names() == ([] if task.cancelled() else ["br0"])
            if not task.cancelled():
                await aiotun.delete_bridge("br0")
        assert True in outcomes

    async def test_a_creation_cancelled_after_the_request_is_undone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The request can't be taken back, so the bridge is deleted again."""
        loop, original = asyncio.get_running_loop(), Session.create_bridge

        async def create(self: Session, *args: Any, **options: Any) -> Any:
            made = await original(self, *args, **options)
            assert names() == ["br0"]
            loop.call_soon_threadsafe(task.cancel)
            return made

        monkeypatch.setattr(Session, "create_bridge", create)
        task = asyncio.ensure_future(aiotun.create_bridge("br0"))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert names() == []

    def test_creating_a_bridge_without_privilege_is_refused(self) -> None:
        said = ordinary_child(
            """
            try:
                asyncio.run(aiotun.create_bridge("br0"))
            except aiotun.NotPermittedError as error:
                print(json.dumps([error.errno, str(error.strerror), error.filename]))
            """
        )
        assert said[::2] == [errno.EPERM, "br0"]
        assert "CAP_NET_ADMIN" in said[1]
        assert "could not create the bridge br0: " in said[1]


class TestDeleting:
    @pytest.mark.parametrize("up", [True, False])
    async def test_deleting_a_bridge_leaves_its_ports(self, up: bool) -> None:
        await aiotun.create_bridge("br0", up=up)
        async with aiotun.open_tap("tap0", bridge="br0") as tap:
            assert link("tap0")["master"] == "br0"
            await aiotun.delete_bridge("br0")
            assert names() == ["tap0"]
            assert "master" not in link("tap0")
            assert (await tap.link.info()).up

    @pytest.mark.parametrize("kind", ["tun", "tap", "lo"])
    async def test_deleting_an_interface_that_is_no_bridge_is_refused(self, kind: str) -> None:
        name = "lo" if kind == "lo" else "old0"
        if name == "old0":
            make("old0", kind)
        before = link(name)
        with pytest.raises(aiotun.DeviceMismatchError, match=f"{name} is not a bridge") as caught:
            await aiotun.delete_bridge(name)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, name)
        assert ("'tun'" in str(caught.value)) == (name == "old0")
        assert link(name) == before

    async def test_deleting_a_missing_bridge_raises_link_error(self) -> None:
        with pytest.raises(aiotun.LinkError, match="there is no interface br0") as caught:
            await aiotun.delete_bridge("br0")
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "br0")

    async def test_delete_bridge_refuses_invalid_arguments(self) -> None:
        with pytest.raises(ValueError, match="1 to 15"):
            await aiotun.delete_bridge("")
        with pytest.raises(TypeError, match="netns must be"):
            await aiotun.delete_bridge("br0", netns=True)

    async def test_cancelled_it_is_deleted_all_the_same(self) -> None:
        await aiotun.create_bridge("br0")
        task = asyncio.ensure_future(aiotun.delete_bridge("br0"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert names() == []

    def test_deleting_a_bridge_without_privilege_is_refused(self) -> None:
        ip("link", "add", "br0", "type", "bridge")
        said = ordinary_child(
            """
            try:
                asyncio.run(aiotun.delete_bridge("br0"))
            except aiotun.NotPermittedError as error:
                print(json.dumps([error.errno, str(error.strerror), error.filename]))
            """
        )
        assert said[::2] == [errno.EPERM, "br0"]
        assert "could not delete br0: " in said[1]
        assert names() == ["br0"]


class TestJoining:
    async def test_frames_go_from_one_tap_to_the_other(self) -> None:
        """One TAP joins when it is opened, the other later."""
        await aiotun.create_bridge("br0")
        frame = bytes.fromhex("ffffffffffff 020000000009 88b5") + b"hello over the bridge".ljust(50)
        async with aiotun.open_tap(bridge="br0") as one, aiotun.open_tap() as two:
            await two.link.set_master("br0")
            # The kernel starts forwarding to a port some time after the port has a carrier.
            async with asyncio.timeout(5):
                got = asyncio.ensure_future(receive(two, frame))
                while not got.done():
                    await one.send(frame)
                    await asyncio.wait([got], timeout=0.01)
                await got

    async def test_a_tun_is_refused_with_the_reason(self) -> None:
        await aiotun.create_bridge("br0")
        async with aiotun.open_tun() as tun:
            with pytest.raises(aiotun.LinkError, match="use a TAP") as caught:
                await tun.link.set_master("br0")
            assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, tun.name)
        assert names() == ["br0"]


def named_namespaces() -> list[str]:
    folder = Path("/run/netns")
    return [each.name for each in folder.iterdir()] if folder.is_dir() else []


async def receive(tap: aiotun.TapDevice, frame: bytes) -> None:
    async for each in tap:
        if each == frame:
            return


class TestNamespaces:
    @pytest.mark.parametrize("how", ["path", "fd"])
    async def test_bridges_are_created_and_deleted_in_another_namespace(self, how: str) -> None:
        with another_namespace() as path:
            fd = os.open(path, os.O_RDONLY)
            try:
                where = fd if how == "fd" else path
                await aiotun.create_bridge("br0", netns=where)
                assert names() == []
                assert '"br0"' in inside(path, "ip", "-j", "link", "show", "type", "bridge")
                await aiotun.delete_bridge("br0", netns=where)
                assert inside(path, "ip", "-j", "link", "show", "type", "bridge") in ("[]\n", "")
            finally:
                os.close(fd)

    async def test_a_cancelled_creation_is_undone_in_its_namespace(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The bridge is deleted in the namespace where it was made."""
        ip("link", "add", "br0", "type", "bridge")
        original = Session.create_bridge

        async def create(self: Session, *args: Any, **options: Any) -> Any:
            made = await original(self, *args, **options)
            loop.call_soon_threadsafe(task.cancel)
            return made

        monkeypatch.setattr(Session, "create_bridge", create)
        loop = asyncio.get_running_loop()
        with another_namespace() as path:
            task = asyncio.ensure_future(aiotun.create_bridge("br0", netns=path))
            with pytest.raises(asyncio.CancelledError):
                await task
            assert "br0" not in inside(path, "ip", "-j", "link")
        assert names() == ["br0"]

    @pytest.mark.parametrize("call", [aiotun.create_bridge, aiotun.delete_bridge])
    async def test_a_missing_namespace_raises_link_error(self, call: Any) -> None:
        with pytest.raises(aiotun.LinkError, match="ip netns add") as caught:
            await call("br0", netns="nowhere-at-all")
        assert caught.value.errno == errno.ENOENT
        assert "nowhere-at-all" not in named_namespaces()


def test_an_error_holds_no_namespace_open() -> None:
    """The fd is closed even if a program keeps the error."""
    said = child(
        """
        def fds():
            return len(os.listdir("/proc/self/fd"))

        async def main():
            before, kept = fds(), []
            for _ in range(3):
                try:
                    await aiotun.delete_bridge("br0")
                except aiotun.LinkError as error:
                    kept.append(error)
            return len(kept), fds() - before

        print(json.dumps(asyncio.run(main())))
        """
    )
    assert said == [3, 0]
