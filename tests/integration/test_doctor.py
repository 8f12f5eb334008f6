"""`aiotun doctor`: what it finds on machines that lack something. It leaves no trace."""

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

from aiotun import cli
from aiotun._cli import doctor as doctor_command
from aiotun._cli import probe
from aiotun._packets import native

from ..commandline import in_terminal, piped
from ..helpers import REAL_ROOT, ip, ordinary_python
from .kernel import ORDINARY, held, ipv6_switched_off, make, names, with_node

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


WORKS = ("create a device", "attach to one", "one of its own", "listen to any")


class TestAsRoot:
    def test_as_root_every_check_passes(self) -> None:
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
        assert found["listen to any"]["status"] == "note"

    def test_devices_that_can_be_attached_to_are_listed(self) -> None:
        make("old0")
        make("old1", "tap", "multi_queue")
        with held("old0"):
            _, found = doctor()
            assert found["attach to one"]["said"] == "old1"
        _, found = doctor()
        assert found["attach to one"]["said"] == "old0, old1"

    def test_a_missing_node_names_modprobe(self, tmp_path: Path) -> None:
        hide = f'mount --bind "{tmp_path}" /dev/net && exec "$@"'
        status, found = doctor(["unshare", "-m", "sh", "-c", hide, "sh", sys.executable])
        assert status == 1
        assert statuses(found, "node", "driver", *WORKS) == ["no", "note", "no", "no", "no", "ok"]
        assert found["node"]["mend"].startswith("modprobe tun")

    def test_another_device_at_dev_net_tun_is_recognized(self, tmp_path: Path) -> None:
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
    def test_a_node_unusable_at_any_mode_gets_a_command_that_fixes_it(
        self, how: str, said: str, mend: str
    ) -> None:
        status, found = doctor([*with_node(how), sys.executable])
        assert status == 1
        assert said in found["node"]["said"]
        assert mend in found["node"]["mend"]
        if how == "nodev":
            return
        # The command that it prints fixes the problem.
        script = f'{found["node"]["mend"].partition(" (")[0]} && exec "$@"'
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
        assert "sysctl -w net.ipv6.conf.all.disable_ipv6=0" in found["IPv6"]["mend"]
        assert "--sysctl net.ipv6.conf.all.disable_ipv6=0" in found["IPv6"]["mend"]


class TestAsAnOrdinaryUser:
    def test_an_ordinary_user_has_only_private_namespaces(self) -> None:
        python, env = ordinary_python()
        status, found = doctor(python, env)
        assert status == 0
        assert statuses(found, *WORKS) == ["no", "note", "ok", "note"]
        assert "CAP_NET_ADMIN" in found["create a device"]["mend"]
        assert found["attach to one"]["mend"] == f"sudo aiotun add dev tun0 mode tun user {USER}"
        assert found["namespaces"]["said"] == "private ones can be had ('unshare -rn')"

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
        assert found["attach to one"]["status"] == ("ok" if ours else "note")
        # Its finding is true.
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
        assert found["node"]["said"] == "/dev/net/tun has mode 0600, which keeps this user out"
        assert found["node"]["mend"] == "sudo chmod 0666 /dev/net/tun"
        assert statuses(found, *WORKS) == ["no", "no", "no", "note"]

    def test_without_unshare_only_a_prepared_device_is_usable(self) -> None:
        """Without namespaces an ordinary user needs a device that root has prepared."""
        python, env = ordinary_python()
        env = {**env, "PATH": "/nowhere"}
        python = [shutil.which(python[0]) or python[0], *python[1:]]
        status, found = doctor(python, env)
        assert status == 1
        assert found["namespaces"]["said"] == "unshare(1) is missing"
        assert "install util-linux" in found["namespaces"]["mend"]
        make("old0", "tun", "user", str(ORDINARY))
        status, found = doctor(python, env)
        assert status == 0
        assert statuses(found, *WORKS) == ["no", "ok", "no", "note"]


class TestNamespaces:
    """Why namespaces can't be made."""

    @pytest.fixture
    def refusing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An unshare(1) that fails; yields the folder with the kernel's settings."""
        fake = tmp_path / "unshare"
        fake.write_text("#!/bin/sh\necho 'unshare: unshare failed: No space left' >&2\nexit 1")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(doctor_command, "_SETTINGS", tmp_path / "sys")
        return tmp_path / "sys"

    @pytest.mark.parametrize(
        ("setting", "bad", "good"),
        [
            ("user.max_user_namespaces", "0", "10000"),
            ("user.max_net_namespaces", "0", "10000"),
            ("kernel.unprivileged_userns_clone", "0", "1"),
            ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ],
    )
    def test_a_sysctl_that_forbids_namespaces_is_named(
        self, setting: str, bad: str, good: str, refusing: Path
    ) -> None:
        file = refusing / setting.replace(".", "/")
        file.parent.mkdir(parents=True)
        file.write_text(f"{bad}\n")
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks["namespaces"].said.startswith(f"{setting} = {bad} ")
        assert checks["namespaces"].mend == f"sysctl -w {setting}={good}"
        file.write_text(f"{good}\n")
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert setting not in checks["namespaces"].said

    def test_a_python_that_this_user_may_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Namespaces can be made, but the interpreter can't be executed in them."""
        locked = tmp_path / "python"
        locked.touch(0o644)
        monkeypatch.setattr(sys, "executable", str(locked))
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks["namespaces"].said.startswith(f"{locked} can't be started anew by this user")
        assert "install" in (checks["namespaces"].mend or "")

    def test_an_unknown_reason_is_passed_on_with_a_hint(self, refusing: Path) -> None:
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert "(unshare failed: No space left)" in checks["namespaces"].said
        assert "seccomp" in (checks["namespaces"].mend or "")

    def test_a_namespace_that_gives_no_capabilities_is_recognized(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with AppArmor's restriction of user namespaces."""
        unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
        fake = tmp_path / "unshare"
        fake.write_text(
            f"#!/bin/sh\nway=$1; shift\n[ $1 = -- ] && shift\n"
            f'exec {unshare} $way {setpriv} --bounding-set=-all --inh-caps=-all "$@"\n'
        )
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(doctor_command, "_SETTINGS", tmp_path)
        (tmp_path / "kernel").mkdir()
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert "no device can be made in a private one" in checks["namespaces"].said
        assert "CAP_NET_ADMIN" in checks["namespaces"].said
        (tmp_path / "kernel/apparmor_restrict_unprivileged_userns").write_text("1\n")
        report = doctor_command.examine()
        checks = {check.name: check for check in report.checks}
        assert "takes capabilities away" in checks["namespaces"].said
        assert [each.status for each in report.works] == ["ok", "note", "no", "ok"]


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
    def test_a_pyroute2_that_is_too_old_is_refused(
        self, version: str, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        checks = {check.name: check for check in doctor_command.examine().checks}
        assert checks["pyroute2"].status == status

    def test_an_older_kernel_without_uso_is_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check = doctor_command._offload(["checksum", "TSO"])
        assert (check.status, "Linux 6.2" in check.said) == ("note", True)


class TestHowItIsShown:
    def test_a_terminal_gets_colors(self) -> None:
        with in_terminal("doctor") as command:
            assert command.end() == 0
        assert "\x1b[32mok \x1b[0m  node             /dev/net/tun, mode 0" in command.out
        assert command.lines[-1] == "\x1b[32maiotun can be used here.\x1b[0m"

    @pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    def test_no_color_and_a_dumb_terminal_get_no_colors(self, env: dict[str, str]) -> None:
        with in_terminal("doctor", env=env) as command:
            assert command.end() == 0
        assert "\x1b" not in command.out
        assert "  ok   node             /dev/net/tun, mode 0" in command.out

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


class TestTrial:
    def test_a_trial_outside_of_a_private_namespace_is_refused(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["doctor", "--trial"]) == 1
        assert names() == []
        assert "no private namespace" in capsys.readouterr().err

    def test_a_trial_with_a_forged_marker_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("AIOTUN_DEMO_OUTSIDE", str(os.stat("/proc/thread-self/ns/net").st_ino))
        assert cli.main(["doctor", "--trial"]) == 1
        monkeypatch.setenv("AIOTUN_DEMO_OUTSIDE", "1")
        make("old0")
        assert cli.main(["doctor", "--trial"]) == 1
        assert "no private namespace" in capsys.readouterr().err
        ip("link", "del", "old0")

    def test_a_trial_accepts_interfaces_that_the_kernel_adds(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With tunnel modules loaded, the kernel makes sit0 and the like in each namespace."""
        monkeypatch.setenv("AIOTUN_DEMO_OUTSIDE", "1")
        make("sit0")
        assert cli.main(["doctor", "--trial"]) == 0
        assert json.loads(capsys.readouterr().out) == ["checksum", "TSO", "USO"]
        assert names() == ["sit0"]


@pytest.mark.parametrize("where", ["terminal", "pipe"])
def test_ctrl_c_ends_the_doctor_with_130_and_no_traceback(where: str, tmp_path: Path) -> None:
    """Ctrl-C comes while the doctor waits for its child."""
    fake = tmp_path / "unshare"
    fake.write_text(f"#!/bin/sh\n: > {tmp_path}/started\nexec sleep 60")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    starting = in_terminal if where == "terminal" else piped
    with starting("doctor", env=env) as command:
        while not (tmp_path / "started").exists():
            assert command.process.poll() is None
        if where == "terminal":
            os.write(command.out_fd, b"\x03")
        else:
            command.process.send_signal(signal.SIGINT)
        assert command.end() == 130
    assert command.out.replace("^C", "") == ""
    assert command.err == ""
