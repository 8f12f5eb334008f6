"""asyncssh's tunnels on aiotun's devices, with the code that docs/how-to/migrating.md shows."""

import asyncio
import re
import types
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..documents import blocks_of
from ..helpers import ROOT, ip, need, wait_until
from .kernel import another_namespace, names

asyncssh = pytest.importorskip("asyncssh", reason="missing: asyncssh")

pytestmark = pytest.mark.peers

OURS, THEIRS = "10.9.0.1", "10.9.0.2"
OUR_UNIT, THEIR_UNIT = 5, 6
TUN, TAP = 1, 2  # asyncssh's modes


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of the page, in the place of asyncssh's own."""
    page = ROOT / "docs" / "how-to" / "migrating.md"
    (block,) = (each for each in blocks_of(page) if "class AsStream" in each.text)
    module = types.ModuleType("as_stream")
    exec(compile(block.text, str(page), "exec"), module.__dict__)
    return module


class Server(asyncssh.SSHServer):  # type: ignore[name-defined,misc]  # it may be missing
    """Lets anybody in, and forwards packets of the unit that is asked for."""

    def begin_auth(self, username: str) -> bool:
        return False

    def tun_requested(self, unit: int | None) -> bool:
        return True

    def tap_requested(self, unit: int | None) -> bool:
        return True


def put_there(
    port: types.ModuleType, monkeypatch: pytest.MonkeyPatch, netns: str
) -> dict[int, Any]:
    """Let asyncssh use the port; the server's device is in another namespace, like its machine."""
    transports: dict[int, Any] = {}

    def create_tuntap(factory: Any, mode: int, unit: int) -> Any:
        where = netns if unit == THEIR_UNIT else None
        with monkeypatch.context() as patch:
            for kind in ("open_tun", "open_tap"):
                opening = getattr(aiotun, kind)
                options = {"netns": where, "addresses": [f"{THEIRS if where else OURS}/24"]}
                patch.setattr(aiotun, kind, lambda name, o=opening, more=options: o(name, **more))
            transport, protocol = port.create_tuntap(factory, mode, unit)
        transports[unit] = transport
        return transport, protocol

    monkeypatch.setattr(asyncssh.connection, "create_tuntap", create_tuntap)
    return transports


@pytest.mark.parametrize("mode", [TUN, TAP])
async def test_packets_go_through_a_tunnel_of_asyncssh(
    mode: int, port: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with another_namespace() as netns:
        transports = put_there(port, monkeypatch, netns)
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.create_server(Server, "127.0.0.1", 0, server_host_keys=[key])
        async with (
            server,
            asyncssh.connect(
                "127.0.0.1", server.get_port(), known_hosts=None, username="x", config=None
            ) as client,
        ):
            forward = client.forward_tun if mode == TUN else client.forward_tap
            async with await forward(OUR_UNIT, THEIR_UNIT):
                ping = await asyncio.create_subprocess_exec(
                    *(need("ping"), "-c", "20", "-i", "0.01", "-s", "1200", "-w", "20", THEIRS),
                    stdout=asyncio.subprocess.PIPE,
                )
                # With -w ping waits for the answers, however slow the machine is.
                said, _ = await asyncio.wait_for(ping.communicate(), 25)
                received = re.search(rb"(\d+) received", said)
                assert received is not None
                assert int(received[1]) >= 20, said
            await wait_until(lambda: names() == [])
    assert set(transports) == {OUR_UNIT, THEIR_UNIT}
    assert all(each.is_closing() for each in transports.values())


async def test_a_deleted_interface_ends_the_tunnel(
    port: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_namespace() as netns:
        transports = put_there(port, monkeypatch, netns)
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.create_server(Server, "127.0.0.1", 0, server_host_keys=[key])
        async with (
            server,
            asyncssh.connect(
                "127.0.0.1", server.get_port(), known_hosts=None, username="x", config=None
            ) as client,
        ):
            await client.forward_tun(OUR_UNIT, THEIR_UNIT)
            ip("link", "del", f"tun{OUR_UNIT}")
            await wait_until(transports[OUR_UNIT].is_closing)
            await wait_until(lambda: transports[THEIR_UNIT].is_closing())
