"""`aiotun doctor`: what it finds on machines that lack this or that; and it leaves no trace."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aiotun._cli import doctor as doctor_command
from aiotun._cli import probe
from aiotun._packets import native

from ..commandline import in_terminal, piped
from ..helpers import REAL_ROOT, ordinary_python
from .kernel import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    ORDINARY,
    held,
    ipv6_switched_off,
    limited,
    make,
    with_node,
    without_unshare,
)

USER = "nobody" if REAL_ROOT else "root"


def doctor(
    command: Sequence[str] = (sys.executable,), env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Run it, and give its status and what it found, by name."""
    before = socket.if_nameindex()
    done = subprocess.run(
        [*command, "-m", "aiotun", "doctor", "--json"],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    assert socket.if_nameindex() == before
    found = json.loads(done.stdout)
    assert found["usable"] == (done.returncode == 0)
    return done.returncode, {each["name"]: each for each in found["checks"] + found["works"]}


def statuses(found: dict[str, Any], *names: str) -> list[str]:
    return [found[name]["status"] for name in names]


WORKS = ("create a device", "attach to one", "one of its own", "listen to any")


class TestAsRoot:
    def test_all_is_well(self) -> None:
        status, found = doctor()
        assert status == 0
        assert statuses(found, *WORKS) == ["ok", "note", "ok", "ok"]
        assert statuses(found, "node", "driver", "offload", "capabilities", "namespaces") == (
            ["ok"] * 5
        )
        assert found["driver"]["said"].startswith("tun tap multi_queue vnet_hdr")
        assert found["offload"]["said"] == "checksum, TSO, USO"
        assert found["pyroute2"]["said"] == importlib.metadata.version("pyroute2")
        assert statuses(found, "dpkt", "uvloop") == ["ok", "ok"]
        assert (found["C module"]["status"] == "ok") == native.SPEEDUPS

    def test_it_asks_without_making_anything(self) -> None:
        """The kernel numbers interfaces in order: one in between would leave a gap."""
        make("old0")
        assert probe.may_create()
        make("old1")
        indices = {name: index for index, name in socket.if_nameindex()}
        assert indices["old1"] == indices["old0"] + 1

    def test_without_the_capability(self) -> None:
        """Root in name only."""
        setpriv = shutil.which("setpriv")
        assert setpriv is not None
        bare = [setpriv, "--bounding-set=-all", "--inh-caps=-all", sys.executable]
        _, found = doctor(bare)
        assert found["create a device"]["status"] == "no"
        assert found["capabilities"]["status"] == "note"
        assert found["listen to any"]["status"] == "note"

    def test_attaching(self) -> None:
        make("old0")
        make("old1", "tap", "multi_queue")
        with held("old0"):
            _, found = doctor()
            assert found["attach to one"]["said"] == "old1"
        _, found = doctor()
        assert found["attach to one"]["said"] == "old0, old1"

    def test_no_node(self, tmp_path: Path) -> None:
        hide = f'mount --bind "{tmp_path}" /dev/net && exec "$@"'
        status, found = doctor(["unshare", "-m", "sh", "-c", hide, "sh", sys.executable])
        assert status == 1
        assert statuses(found, "node", "driver", *WORKS) == ["no", "note", "no", "no", "no", "ok"]
        assert found["node"]["mend"].startswith("modprobe tun")

    def test_something_else_in_its_place(self, tmp_path: Path) -> None:
        cover = 'mount --bind /dev/null /dev/net/tun && exec "$@"'
        status, found = doctor(["unshare", "-m", "sh", "-c", cover, "sh", sys.executable])
        assert status == 1
        assert "no character device 10:200" in found["node"]["said"]
        assert found["driver"]["status"] == "note"

    @pytest.mark.parametrize(
        ("how", "said", "mend"),
        [
            ("directory", "is a directory", "rmdir /dev/net/tun && "),
            ("loop", "symbolic links", "rm /dev/net/tun && "),
            ("nodev", "'nodev'", "mount -o remount,bind,dev /dev/net"),
        ],
    )
    def test_a_node_that_no_mode_helps(self, how: str, said: str, mend: str) -> None:
        status, found = doctor([*with_node(how), sys.executable])
        assert status == 1
        assert said in found["node"]["said"]
        assert mend in found["node"]["mend"]
        if how == "nodev":
            return
        # What it says to do does help.
        script = f'{found["node"]["mend"].partition(" (")[0]} && exec "$@"'
        prefix = [*with_node(how), "sh", "-c", script, "sh", sys.executable]
        prefix[4] = prefix[4].replace(",nodev", "")
        if REAL_ROOT:
            assert doctor(prefix)[1]["node"]["status"] == "ok"

    def test_ipv6(self) -> None:
        assert doctor()[1]["IPv6"]["status"] == "ok"
        with ipv6_switched_off():
            status, found = doctor()
        assert status == 0
        assert found["IPv6"]["status"] == "note"
        assert "sysctl -w net.ipv6.conf.all.disable_ipv6=0" in found["IPv6"]["mend"]
        assert "--sysctl net.ipv6.conf.all.disable_ipv6=0" in found["IPv6"]["mend"]


class TestAsAnOrdinaryUser:
    def test_only_private_ones(self) -> None:
        python, env = ordinary_python()
        status, found = doctor(python, env)
        assert status == 0
        assert statuses(found, *WORKS) == ["no", "note", "ok", "note"]
        assert "CAP_NET_ADMIN" in found["create a device"]["mend"]
        assert found["attach to one"]["mend"] == f"sudo aiotun add dev tun0 mode tun user {USER}"
        said = "private ones can be had without root, by a helper process"
        assert found["namespaces"]["said"] == said

    @pytest.mark.parametrize(
        ("words", "ours"),
        [
            (("user", str(ORDINARY)), True),
            (("group", str(ORDINARY)), True),
            ((), True),
            (("user", "1"), False),
            (("group", "1"), False),
            (("user", str(ORDINARY), "group", "1"), False),
        ],
    )
    def test_what_root_prepared(self, words: tuple[str, ...], ours: bool) -> None:
        python, env = ordinary_python()
        make("old0", "tun", *words)
        _, found = doctor(python, env)
        assert found["attach to one"]["status"] == ("ok" if ours else "note")
        # It says what is so.
        code = "import asyncio, aiotun; asyncio.run(aiotun.open_tun('old0', up=False).__aenter__())"
        done = subprocess.run([*python, "-c", code], env={**os.environ, **env}, capture_output=True)
        assert (done.returncode == 0) == ours, done.stderr

    def test_a_node_for_root_only(self) -> None:
        python, env = ordinary_python()
        ours = Path("/run/aiotun-node-0600")
        os.mknod(ours, 0o020600, os.makedev(10, 200))
        try:
            cover = f'mount --bind {ours} /dev/net/tun && exec "$@"'
            status, found = doctor(["unshare", "-m", "sh", "-c", cover, "sh", *python], env)
        finally:
            ours.unlink()
        assert status == 1
        assert found["node"]["said"] == "/dev/net/tun has mode 0600, which keeps this user out"
        assert found["node"]["mend"] == "sudo chmod 0666 /dev/net/tun"
        assert statuses(found, *WORKS) == ["no", "no", "no", "note"]

    def test_no_namespaces(self) -> None:
        """Then only a device that root prepared is left."""
        python, env = ordinary_python()
        command = [*python, *without_unshare(CLONE_NEWUSER)[1:], python[-1]]
        status, found = doctor(command, env)
        assert status == 1
        assert found["namespaces"]["said"].startswith("a seccomp filter forbids user namespaces")
        assert "--security-opt" in found["namespaces"]["mend"]
        make("old0", "tun", "user", str(ORDINARY))
        status, found = doctor(command, env)
        assert status == 0
        assert statuses(found, *WORKS) == ["no", "ok", "no", "note"]


class TestNamespaces:
    """Who forbids them."""

    @pytest.mark.parametrize("kind", ["user", "net"])
    def test_a_setting(self, kind: str) -> None:
        name = f"max_{kind}_namespaces"
        # Root of this user namespace needs no other for a network namespace.
        bare = ["setpriv", "--bounding-set=-sys_admin"] if kind == "user" else []
        _, found = doctor([*limited(name, 0), *bare, sys.executable])
        assert found["namespaces"]["said"].startswith(f"user.{name} = 0 allows no")
        assert found["namespaces"]["mend"] == f"sysctl -w user.{name}=10000"

    def test_one_without_capabilities(self) -> None:
        """What AppArmor makes of it."""
        status, found = doctor([*without_unshare(CLONE_NEWNET), sys.executable])
        assert status == 0  # this root can make devices outside
        assert "forbids capabilities in user namespaces" in found["namespaces"]["said"]
        assert statuses(found, *WORKS) == ["ok", "note", "no", "ok"]


class TestPackages:
    @pytest.mark.parametrize(
        ("name", "status"), [("pyroute2", "no"), ("dpkt", "note"), ("uvloop", "note")]
    )
    def test_missing(self, name: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
        versions = importlib.metadata.version

        def version(asked: str) -> str:
            if asked == name:
                raise importlib.metadata.PackageNotFoundError
            return versions(asked)

        monkeypatch.setattr(importlib.metadata, "version", version)
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks[name].said == "(a version that is not known)"
        monkeypatch.setitem(sys.modules, name, None)
        report = doctor_command.examine()
        checks = {check.name: check for check in report.checks}
        assert checks[name].status == status
        assert name in (checks[name].mend or "")
        assert report.usable == (status != "no")
        opening = {each.status for each in report.works[:3]}
        assert opening == ({"no"} if status == "no" else {"ok", "note"})

    @pytest.mark.parametrize(
        ("version", "status"), [("0.9.2", "no"), ("0.9.3rc2", "ok"), ("1.0", "ok")]
    )
    def test_too_old(self, version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks["pyroute2"].status == status

    def test_an_older_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check = doctor_command._offload(["checksum", "TSO"])
        assert (check.status, "Linux 6.2" in check.said) == ("note", True)


class TestHowItIsShown:
    def test_in_a_terminal(self) -> None:
        with in_terminal("doctor") as command:
            assert command.end() == 0
        assert "\x1b[32mok \x1b[0m  node             /dev/net/tun, mode 0" in command.out
        assert command.lines[-1] == "\x1b[32maiotun can be used here.\x1b[0m"

    @pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    def test_without_colours(self, env: dict[str, str]) -> None:
        with in_terminal("doctor", env=env) as command:
            assert command.end() == 0
        assert "\x1b" not in command.out
        assert "  ok   node             /dev/net/tun, mode 0" in command.out

    def test_in_a_pipe(self) -> None:
        with piped("doctor") as command:
            assert command.end() == 0
        assert "\x1b" not in command.out
        assert command.err == ""
        assert command.lines[-1] == "aiotun can be used here."
        assert max(map(len, command.lines)) <= 100

    def test_not_usable(self, tmp_path: Path) -> None:
        hide = f'mount --bind "{tmp_path}" /dev/net && exec "$@"'
        inside = ["unshare", "-m", "sh", "-c", hide, "sh", sys.executable, "-m", "aiotun"]
        with piped("doctor", command=inside) as command:
            assert command.end() == 1
        assert command.lines[-1] == "aiotun can't be used here."
        assert "modprobe tun" in command.out

    def test_a_reader_that_leaves(self) -> None:
        with piped("doctor") as command:
            assert command.process.stdout is not None
            command.process.stdout.close()
            command.out_fd = -1
            assert command.end() == 1
        assert command.err == ""


@pytest.mark.parametrize("where", ["terminal", "pipe"])
def test_ctrl_c(where: str) -> None:
    """While it has a helper process, which an ordinary user's namespace takes."""
    bare = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-W", "error", "-m", "aiotun"]
    starting = in_terminal if where == "terminal" else piped
    with starting("doctor", command=bare) as command:
        while not has_child(command.process.pid):
            assert command.process.poll() is None
        if where == "terminal":
            os.write(command.out_fd, b"\x03")
        else:
            command.process.send_signal(signal.SIGINT)
        assert command.end() == 130
    assert command.out.replace("^C", "") == ""
    assert command.err == ""


def has_child(pid: int) -> bool:
    with contextlib.suppress(OSError):  # a thread has ended in between
        return any(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return False
