"""Links that move to another network namespace, on the real kernel."""

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotun
from aiotun import Link, LinkError, NotPermittedError

from ..helpers import REAL_ROOT, ip
from .kernel import another_namespace, inside, make, names, ordinary_child
from .rig import udp


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The path of another namespace."""
    with another_namespace() as path:
        yield path


def index_there(path: str, name: str) -> int:
    return int(inside(path, "ip", "-o", "link", "show", "dev", name).split(":")[0])


def udp_from(source: str) -> bytes:
    return udp(source, 9, "10.0.0.1", 7777, b"in")


class TestDevice:
    async def test_a_moved_device_still_carries_packets(self, elsewhere: str) -> None:
        async with aiotun.open_tun("m0", addresses=["10.0.0.1/24"], queues=2) as tun:
            async with asyncio.timeout(10):
                await tun.link.move_to_netns(elsewhere)
                assert names() == []
                assert index_there(elsewhere, "m0") == tun.index
                # As the kernel leaves it: down, without its addresses and routes.
                assert not (await tun.link.info()).up
                assert await tun.link.addresses() == []
                with pytest.raises(aiotun.LinkDownError):
                    await tun.send(udp_from("10.0.0.2"))
                await tun.link.add_address("10.0.0.1/24")
                await tun.link.up()
                assert "10.0.0.1/24" in inside(elsewhere, "ip", "addr", "show", "m0")
                # Out: a datagram that a program in that namespace sends.
                inside(elsewhere, "bash", "-c", "echo -n out > /dev/udp/10.0.0.2/9")
                while not (packet := await tun.recv()).endswith(b"out"):
                    pass
                # In: the kernel answers that the port is closed.
                await tun.send(udp_from("10.0.0.2"))
                while (packet := await tun.recv())[9:10] != b"\x01":
                    pass
                assert packet[16:20] == socket.inet_aton("10.0.0.2")

    async def test_the_number_is_taken_there(self, elsewhere: str) -> None:
        """This is common, as each namespace counts the indices of its interfaces."""
        async with aiotun.open_tun("m0", up=False) as tun:
            before = tun.index
            inside(elsewhere, *f"ip link add x0 index {before} type bridge".split())
            await tun.link.move_to_netns(elsewhere)
            assert tun.index == index_there(elsewhere, "m0") != before
            await tun.link.set_mtu(1400)
            assert tun.mtu == (await tun.link.info()).mtu == 1400
            assert "mtu 1400" in inside(elsewhere, "ip", "link", "show", "m0")
            await tun.link.rename("m1")
            assert tun.name == "m1"
            # And back again.
            await tun.link.move_to_netns("/proc/self/ns/net")
            assert names() == ["m1"]
            assert tun.index == socket.if_nametoindex("m1")

    async def test_a_moved_device_holds_its_new_namespace(self) -> None:
        """The namespace lives as long as the device that moved there."""
        async with aiotun.open_tun("m0", addresses=["10.0.0.1/24"]) as tun:
            with another_namespace() as path:
                await tun.link.move_to_netns(path)
            await tun.link.add_address("10.0.0.1/24")
            await tun.link.up()
            await tun.send(udp_from("10.0.0.2"))


class TestLink:
    @pytest.mark.parametrize("how", ["str", "path", "fd"])
    async def test_a_moved_link_works_in_its_new_namespace(self, elsewhere: str, how: str) -> None:
        make("m0", "tap")
        link = Link("m0")
        fd = os.open(elsewhere, os.O_RDONLY)
        ways: dict[str, str | Path | int] = {"str": elsewhere, "path": Path(elsewhere), "fd": fd}
        await link.move_to_netns(ways[how])
        os.close(fd)
        assert names() == []
        await link.up()
        assert (await link.info()).index == index_there(elsewhere, "m0")
        await link.down()  # Linux 5.10 renames no link that is up
        await link.rename("m1")
        await link.up()
        assert "m1" in inside(elsewhere, "ip", "link", "show", "up")

    async def test_a_link_moves_to_a_named_namespace(self) -> None:
        if not REAL_ROOT:
            pytest.skip("'ip netns add' does not work in a user namespace")
        make("m0", "tap")
        ip("netns", "add", "blue")
        try:
            await Link("m0").move_to_netns("blue")
            assert "m0" in inside("/run/netns/blue", "ip", "link")
        finally:
            ip("netns", "del", "blue")

    async def test_a_link_moves_between_two_other_namespaces(self, elsewhere: str) -> None:
        with another_namespace("ip tuntap add m0 mode tun") as start:
            link = Link("m0", netns=start)
            here = os.stat("/proc/thread-self/ns/net").st_ino
            await link.move_to_netns(elsewhere)
            assert os.stat("/proc/thread-self/ns/net").st_ino == here
            await link.set_mtu(1400)
            assert "mtu 1400" in inside(elsewhere, "ip", "link", "show", "m0")

    async def test_moving_to_its_own_namespace_changes_nothing(self) -> None:
        make("m0", "tap")
        ip("link", "set", "m0", "up")
        link = Link("m0")
        await link.move_to_netns("/proc/self/ns/net")
        assert (await link.info()).up

    async def test_requests_at_the_same_time(self, elsewhere: str) -> None:
        """Each request runs in the namespace where the link is then, before or after the move."""
        make("m0", "tap")
        link = Link("m0")
        for _ in range(5):
            mtus = [link.set_mtu(1400 + number) for number in range(4)]
            await asyncio.gather(*mtus, link.move_to_netns(elsewhere), link.set_alias("there"))
            shown = inside(elsewhere, "ip", "link", "show", "m0")
            assert "mtu 140" in shown
            assert "there" in shown
            await asyncio.gather(link.move_to_netns("/proc/self/ns/net"), link.set_mtu(1300))
            assert names() == ["m0"]

    async def test_cancelled_it_is_done_all_the_same(self, elsewhere: str) -> None:
        make("m0", "tap")
        link = Link("m0")
        task = asyncio.ensure_future(link.move_to_netns(elsewhere))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await link.info()).index == index_there(elsewhere, "m0")

    async def test_a_moved_link_holds_one_namespace_only(self, elsewhere: str) -> None:
        make("m0", "tap")
        link = Link("m0")
        await link.info()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await link.move_to_netns(elsewhere)
            await link.move_to_netns("/proc/self/ns/net")
        await link.info()  # the earlier threads have ended after this
        assert len(os.listdir("/proc/self/fd")) == before


class TestRefused:
    """The link has not moved, and still works."""

    async def check(self, link: Link) -> None:
        await link.set_mtu(1400)
        (shown,) = ip("link", "show", "dev", link.name)
        assert shown["mtu"] == 1400

    async def test_the_name_is_taken_there(self, elsewhere: str) -> None:
        make("m0", "tap")
        inside(elsewhere, *["ip", "tuntap", "add", "m0", "mode", "tap"])
        link = Link("m0")
        with pytest.raises(LinkError) as caught:
            await link.move_to_netns(elsewhere)
        assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, "m0")
        for words in ("move the link", elsewhere, "rename"):
            assert words in str(caught.value)
        await self.check(link)

    async def test_an_interface_that_cannot_be_moved_is_refused(self, elsewhere: str) -> None:
        link = Link("lo")
        with pytest.raises(LinkError, match="can't be moved") as caught:
            await link.move_to_netns(elsewhere)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "lo")
        await self.check(link)

    async def test_a_missing_namespace_is_refused(self) -> None:
        make("m0", "tap")
        link = Link("m0")
        for missing in ("nowhere", "/nowhere/net"):
            with pytest.raises(LinkError, match="ip netns add") as caught:
                await link.move_to_netns(missing)
            assert caught.value.errno == errno.ENOENT
        assert not os.access("/run/netns/nowhere", os.F_OK)
        await self.check(link)

    async def test_an_fd_that_is_no_namespace_is_refused(self) -> None:
        make("m0", "tap")
        link = Link("m0")
        fd = os.open("/dev/null", os.O_RDONLY)
        with pytest.raises(LinkError, match="not a network namespace"):
            await link.move_to_netns(fd)
        os.close(fd)
        await self.check(link)

    async def test_moving_a_missing_interface_is_refused(self, elsewhere: str) -> None:
        with pytest.raises(LinkError, match="no interface nowhere0") as caught:
            await Link("nowhere0").move_to_netns(elsewhere)
        assert caught.value.errno == errno.ENODEV

    @pytest.mark.parametrize("netns", [None, 1.5, True, b"name"])
    async def test_a_netns_of_the_wrong_type_is_refused(self, netns: object) -> None:
        with pytest.raises(TypeError, match="netns"):
            await Link("lo", netns="nowhere").move_to_netns(netns)  # type: ignore[arg-type]

    async def test_an_invalid_netns_is_refused(self) -> None:
        for netns in ("", "a\0b", -1):
            with pytest.raises(ValueError, match="netns"):
                await Link("lo", netns="nowhere").move_to_netns(netns)

    def test_moving_without_privilege_names_the_capability(self, elsewhere: str) -> None:
        make("m0", "tap")
        fd = os.open(elsewhere, os.O_RDONLY)
        try:
            said = ordinary_child(
                f"""
                async def main():
                    try:
                        await aiotun.Link("m0").move_to_netns({fd})
                    except aiotun.NotPermittedError as error:
                        print(json.dumps([error.errno, error.strerror]))
                asyncio.run(main())
                """,
                fds=[fd],
            )
        finally:
            os.close(fd)
        assert said[0] == errno.EPERM
        assert "CAP_SYS_ADMIN" in said[1]
        assert names() == ["m0"]
        assert issubclass(NotPermittedError, PermissionError)
