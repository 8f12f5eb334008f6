"""`aiotun doctor`: what it finds on machines that lack something. It leaves no trace."""

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
    """Run it; return its exit status and its findings by name."""
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


WORKS = ("create a device", "attach to a device", "private device", "capture packets")


class TestAsRoot:
    def test_as_root_every_check_passes(self) -> None:
        status, found = doctor()
        assert status == 0
        assert statuses(found, *WORKS) == ["ok", "note", "ok", "ok"]
        assert statuses(found, "node", "driver", "capabilities", "namespaces") == ["ok"] * 4
        with_uso = found["offload"]["said"] == "checksum, TSO, USO"
        assert (found["offload"]["status"] == "ok") == with_uso
        assert found["driver"]["said"].startswith("tun tap multi_queue vnet_hdr")
        assert found["offload"]["said"].startswith("checksum, TSO")
        assert found["pyroute2"]["said"] == importlib.metadata.version("pyroute2")
        assert statuses(found, "dpkt", "uvloop") == ["ok", "ok"]
        assert (found["C module"]["status"] == "ok") == native.SPEEDUPS

    def test_without_the_c_module_the_doctor_says_how_to_build_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """pip prefers a wheel without it to the source distribution, even where it is required."""
        monkeypatch.setattr(probe, "SPEEDUPS", False)
        monkeypatch.delenv("AIOTUN_SPEEDUPS", raising=False)
        (check,) = (each for each in doctor_command.examine().checks if each.name == "C module")
        assert (check.status, check.fix) == (
            "note",
            "AIOTUN_SPEEDUPS=require python -m pip install --force-reinstall "
            "--no-binary aiotun aiotun",
        )

    def test_the_doctor_makes_no_interface_in_this_namespace(self) -> None:
        """The kernel numbers interfaces in order: an interface made meanwhile would leave a gap."""
        make("old0")
        assert probe.may_create()
        make("old1")
        indices = {name: index for index, name in socket.if_nameindex()}
        assert indices["old1"] == indices["old0"] + 1

    def test_root_without_cap_net_admin_cannot_create_a_device(self) -> None:
        """Root without capabilities."""
        setpriv = shutil.which("setpriv")
        assert setpriv is not None
        bare = [setpriv, "--bounding-set=-all", "--inh-caps=-all", sys.executable]
        _, found = doctor(bare)
        assert found["create a device"]["status"] == "no"
        assert found["capabilities"]["status"] == "note"
        assert found["capture packets"]["status"] == "note"

    def test_devices_that_can_be_attached_to_are_listed(self) -> None:
        make("old0")
        make("old1", "tap", "multi_queue")
        with held("old0"):
            _, found = doctor()
            assert found["attach to a device"]["said"] == "old1"
        _, found = doctor()
        assert found["attach to a device"]["said"] == "old0, old1"

    def test_a_missing_node_names_modprobe(self, tmp_path: Path) -> None:
        hide = f'mount --bind "{tmp_path}" /dev/net && exec "$@"'
        status, found = doctor(["unshare", "-m", "sh", "-c", hide, "sh", sys.executable])
        assert status == 1
        assert statuses(found, "node", "driver", *WORKS) == ["no", "note", "no", "no", "no", "ok"]
        assert found["node"]["fix"].startswith("modprobe tun")

    def test_another_device_at_dev_net_tun_is_recognized(self, tmp_path: Path) -> None:
        cover = 'mount --bind /dev/null /dev/net/tun && exec "$@"'
        status, found = doctor(["unshare", "-m", "sh", "-c", cover, "sh", sys.executable])
        assert status == 1
        assert "character device 10:200" in found["node"]["said"]
        assert found["driver"]["status"] == "note"

    @pytest.mark.parametrize(
        ("how", "said", "fix"),
        [
            ("directory", "is a directory", "rmdir /dev/net/tun && "),
            ("loop", "symbolic links", "rm /dev/net/tun && "),
            ("nodev", "'nodev'", "mount -o remount,bind,dev /dev/net"),
        ],
    )
    def test_a_node_unusable_at_any_mode_gets_a_command_that_fixes_it(
        self, how: str, said: str, fix: str
    ) -> None:
        status, found = doctor([*with_node(how), sys.executable])
        assert status == 1
        assert said in found["node"]["said"]
        assert fix in found["node"]["fix"]
        if how == "nodev":
            return
        # What it says to do does help.
        script = f'{found["node"]["fix"].partition(" (")[0]} && exec "$@"'
        prefix = [*with_node(how), "sh", "-c", script, "sh", sys.executable]
        prefix[4] = prefix[4].replace(",nodev", "")
        if REAL_ROOT:
            assert doctor(prefix)[1]["node"]["status"] == "ok"

    def test_disabled_ipv6_names_the_sysctl(self) -> None:
        assert doctor()[1]["IPv6"]["status"] == "ok"
        with ipv6_switched_off():
            status, found = doctor()
        assert status == 0
        assert found["IPv6"]["status"] == "note"
        assert "sysctl -w net.ipv6.conf.all.disable_ipv6=0" in found["IPv6"]["fix"]
        assert "--sysctl net.ipv6.conf.all.disable_ipv6=0" in found["IPv6"]["fix"]


class TestAsAnOrdinaryUser:
    def test_an_ordinary_user_has_only_private_namespaces(self) -> None:
        python, env = ordinary_python()
        status, found = doctor(python, env)
        assert status == 0
        assert statuses(found, *WORKS) == ["no", "note", "ok", "note"]
        assert "CAP_NET_ADMIN" in found["create a device"]["fix"]
        assert (
            found["attach to a device"]["fix"]
            == f"sudo ip tuntap add dev tun0 mode tun user {USER}"
        )
        said = "private ones can be created without root, with a helper process"
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
    def test_an_ordinary_user_may_attach_to_a_prepared_device(
        self, words: tuple[str, ...], ours: bool
    ) -> None:
        python, env = ordinary_python()
        make("old0", "tun", *words)
        _, found = doctor(python, env)
        assert found["attach to a device"]["status"] == ("ok" if ours else "note")
        # It says what is so.
        code = "import asyncio, aiotun; asyncio.run(aiotun.open_tun('old0', up=False).__aenter__())"
        done = subprocess.run([*python, "-c", code], env={**os.environ, **env}, capture_output=True)
        assert (done.returncode == 0) == ours, done.stderr

    def test_a_node_for_root_only_is_recognized(self) -> None:
        python, env = ordinary_python()
        ours = Path("/run/aiotun-node-0600")
        os.mknod(ours, 0o020600, os.makedev(10, 200))
        try:
            cover = f'mount --bind {ours} /dev/net/tun && exec "$@"'
            status, found = doctor(["unshare", "-m", "sh", "-c", cover, "sh", *python], env)
        finally:
            ours.unlink()
        assert status == 1
        assert found["node"]["said"] == "/dev/net/tun has mode 0600, so this user can't open it"
        assert found["node"]["fix"] == "sudo chmod 0666 /dev/net/tun"
        assert statuses(found, *WORKS) == ["no", "no", "no", "note"]

    def test_without_unshare_only_a_prepared_device_is_usable(self) -> None:
        """Without namespaces an ordinary user needs a device that root has prepared."""
        python, env = ordinary_python()
        command = [*python, *without_unshare(CLONE_NEWUSER)[1:], python[-1]]
        status, found = doctor(command, env)
        assert status == 1
        assert found["namespaces"]["said"].startswith("a seccomp filter forbids user namespaces")
        assert "--security-opt" in found["namespaces"]["fix"]
        make("old0", "tun", "user", str(ORDINARY))
        status, found = doctor(command, env)
        assert status == 0
        assert statuses(found, *WORKS) == ["no", "ok", "no", "note"]


class TestNamespaces:
    """Why namespaces can't be made."""

    @pytest.mark.parametrize("kind", ["user", "net"])
    def test_a_limit_on_namespaces_is_named_with_its_sysctl(self, kind: str) -> None:
        name = f"max_{kind}_namespaces"
        # Root of this user namespace needs no other for a network namespace.
        bare = ["setpriv", "--bounding-set=-sys_admin"] if kind == "user" else []
        _, found = doctor([*limited(name, 0), *bare, sys.executable])
        assert found["namespaces"]["said"].startswith(f"user.{name} = 0 allows no")
        assert found["namespaces"]["fix"] == f"sysctl -w user.{name}=10000"

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
    def test_a_missing_package_is_named(
        self, name: str, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = importlib.metadata.version

        def version(asked: str) -> str:
            if asked == name:
                raise importlib.metadata.PackageNotFoundError
            return versions(asked)

        monkeypatch.setattr(importlib.metadata, "version", version)
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks[name].said == "(unknown version)"
        monkeypatch.setitem(sys.modules, name, None)
        report = doctor_command.examine()
        checks = {check.name: check for check in report.checks}
        assert checks[name].status == status
        assert name in (checks[name].fix or "")
        assert report.usable == (status != "no")
        opening = {each.status for each in report.works[:3]}
        assert opening == ({"no"} if status == "no" else {"ok", "note"})

    @pytest.mark.parametrize(
        ("version", "status"), [("0.9.2", "no"), ("0.9.3rc2", "ok"), ("1.0", "ok")]
    )
    def test_a_pyroute2_that_is_too_old_is_refused(
        self, version: str, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks["pyroute2"].status == status

    def test_an_older_kernel_without_uso_is_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check = doctor_command._offload(["checksum", "TSO"])
        assert (check.status, "Linux 6.2" in check.said) == ("note", True)

    @pytest.mark.parametrize(
        ("limit", "status"), [(212_992, "note"), (1 << 20, "ok"), (4 << 20, "ok"), (None, "note")]
    )
    def test_a_small_limit_on_receive_buffers_names_the_sysctl(
        self, limit: int | None, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        if limit is not None:
            (tmp_path / "net" / "core").mkdir(parents=True)
            (tmp_path / "net" / "core" / "rmem_max").write_text(f"{limit}\n")
        monkeypatch.setattr(doctor_command, "_SETTINGS", tmp_path)
        check = doctor_command._udp_buffer()
        assert check.status == status
        if limit == 212_992:
            assert check.fix is not None
            assert check.fix.endswith("sysctl -w net.core.rmem_max=4194304")

    @pytest.mark.parametrize(("release", "status"), [("7.1.4-1", "note"), ("6.18.44", "ok")])
    def test_kernels_that_corrupt_runs_of_datagrams_are_a_note(
        self, release: str, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("platform.release", lambda: release)
        assert doctor_command._udp_runs().status == status


class TestHowItIsShown:
    def test_a_terminal_gets_colors(self) -> None:
        with in_terminal("doctor") as command:
            assert command.end() == 0
        assert "\x1b[32mok \x1b[0m  node                /dev/net/tun, mode 0" in command.out
        assert command.lines[-1] == "\x1b[32maiotun can be used here.\x1b[0m"

    @pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    def test_no_color_and_a_dumb_terminal_get_no_colors(self, env: dict[str, str]) -> None:
        with in_terminal("doctor", env=env) as command:
            assert command.end() == 0
        assert "\x1b" not in command.out
        assert "  ok   node                /dev/net/tun, mode 0" in command.out

    def test_a_pipe_gets_no_colors_and_short_lines(self) -> None:
        with piped("doctor") as command:
            assert command.end() == 0
        assert "\x1b" not in command.out
        assert command.err == ""
        assert command.lines[-1] == "aiotun can be used here."
        assert max(map(len, command.lines)) <= 100

    def test_the_last_line_says_that_aiotun_cannot_be_used(self, tmp_path: Path) -> None:
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
def test_ctrl_c_ends_the_doctor_without_a_traceback(where: str) -> None:
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
