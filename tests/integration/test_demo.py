"""`aiotun demo` as users run it: in its own process, as root and as an ordinary user."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aiotun import cli, reply
from aiotun._cli import demo as demo_command

from ..helpers import REAL_ROOT, ordinary_python
from .kernel import CLONE_NEWNET, CLONE_NEWUSER, without_unshare

PING = shutil.which("ping")
NO_PING = pytest.mark.skipif(PING is None, reason="missing: ping(8); install iputils-ping")


def only(folder: Path, *commands: str) -> str:
    """Return a PATH that has these commands only."""
    for command in commands:
        found = shutil.which(command)
        assert found is not None
        (folder / command).symlink_to(found)
    return str(folder)


def run_demo(
    *args: str,
    python: tuple[str, ...] = (sys.executable,),
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the demo and check that it leaves no interface behind."""
    before = socket.if_nameindex()
    done = subprocess.run(
        [*python, "-m", "aiotun", "demo", *args],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert socket.if_nameindex() == before
    return done


def check_success(done: subprocess.CompletedProcess[str], count: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    *_, summary = done.stdout.splitlines()
    replies = re.findall(r"^  (\S+) seq (\d+): [0-9.]+ ms$", done.stdout, re.MULTILINE)
    addresses = ["10.203.0.2", "fd03:a107:203::2"]
    if not Path("/proc/net/if_inet6").exists():
        del addresses[1]
    assert replies == [(a, str(n)) for a in addresses for n in range(1, count + 1)]
    sent = len(replies)
    numbers = re.fullmatch(
        rf"{sent} sent, {sent} received, min/avg/max ([0-9.]+)/([0-9.]+)/([0-9.]+) ms", summary
    )
    assert numbers is not None
    least, average, most = map(float, numbers.groups())
    assert 0 < least <= average <= most < 1000


def check_failure(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("aiotun: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@NO_PING
@pytest.mark.parametrize("args", [(), ("--uvloop",)])
def test_the_demo_uses_the_systems_ping(args: tuple[str, ...]) -> None:
    done = run_demo("--count", "2", *args)
    check_success(done, 2)
    assert str(PING) in done.stdout


@pytest.mark.parametrize("args", [(), ("--uvloop",)])
def test_the_demo_works_without_ping(args: tuple[str, ...], tmp_path: Path) -> None:
    done = run_demo("--count", "2", *args, env={"PATH": only(tmp_path)})
    check_success(done, 2)
    assert "no ping(8) here" in done.stdout


@NO_PING
def test_five_pings_unless_told_otherwise() -> None:
    check_success(run_demo(), 5)


@pytest.mark.parametrize("ping", [pytest.param(True, marks=NO_PING), False])
def test_the_demo_works_as_an_ordinary_user(ping: bool, tmp_path: Path) -> None:
    python, env = ordinary_python()
    if not ping:
        # Only root may enter the folders above tmp_path.
        folder = Path("/run/aiotun-commands")
        folder.mkdir()
        try:
            env = {**env, "PATH": only(folder)}
            check_success(run_demo("--count", "1", python=tuple(python), env=env), 1)
        finally:
            shutil.rmtree(folder)
    else:
        check_success(run_demo("--count", "1", python=tuple(python), env=env), 1)


def test_a_missing_node_is_one_line(tmp_path: Path) -> None:
    hide = f'mount --bind "{tmp_path}" /dev/net && exec "$@"'
    done = run_demo(python=("unshare", "-m", "sh", "-c", hide, "sh", sys.executable))
    check_failure(done, "/dev/net/tun")


def test_a_node_for_root_only_is_one_line() -> None:
    python, env = ordinary_python()
    ours = Path("/run/aiotun-node-0600")
    os.mknod(ours, 0o020600, os.makedev(10, 200))
    try:
        cover = f'mount --bind {ours} /dev/net/tun && exec "$@"'
        done = run_demo(python=("unshare", "-m", "sh", "-c", cover, "sh", *python), env=env)
        check_failure(done, "/dev/net/tun")
        assert "0666" in done.stderr
    finally:
        ours.unlink()


def test_no_namespaces_is_one_line() -> None:
    prefix = without_unshare(CLONE_NEWUSER | CLONE_NEWNET)
    done = run_demo(python=(*prefix, sys.executable))
    check_failure(done, "a seccomp filter forbids user namespaces")


def test_a_ping_that_fails_is_one_line(tmp_path: Path) -> None:
    path = only(tmp_path)
    fake = tmp_path / "ping"
    fake.write_text("#!/bin/sh\necho 'ping: socket: Operation not permitted' >&2\nexit 2")
    fake.chmod(0o755)
    check_failure(run_demo(env={"PATH": path}), "failed: ping: socket: Operation not permitted")


def test_a_missing_uvloop_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    check_failure(run_demo("--uvloop", env={"PYTHONPATH": path}), "aiotun[uvloop]")


def test_unanswered_pings_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, with a reply that never comes.
    monkeypatch.setattr(reply, "icmp_echo", lambda packet: None)
    monkeypatch.setattr(demo_command, "_TIMEOUT", 0.01)
    monkeypatch.setenv("PATH", "")
    assert cli.main(["demo", "--count", "1"]) == 1
    said = capsys.readouterr()
    assert "2 sent, 1 received" in said.out
    assert said.err == "aiotun: 1 of 2 pings were not answered within 0.01 s\n"


@pytest.mark.parametrize("args", [(), ("--uvloop",)])
@pytest.mark.parametrize("ping", [pytest.param(True, marks=NO_PING), False])
def test_interrupting_is_clean(args: tuple[str, ...], ping: bool, tmp_path: Path) -> None:
    env = os.environ if ping else {**os.environ, "PATH": only(tmp_path)}
    demo = subprocess.Popen(
        [sys.executable, "-m", "aiotun", "demo", "--count", "1000", *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "seq 1:" in line:
                break
        demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=10)
    assert demo.returncode == 130
    assert said == ""


def test_a_reader_that_leaves_is_no_traceback() -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "aiotun", "demo", "--count", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        demo.stdout.close()
        assert demo.stderr.read() == ""
    assert demo.returncode == 1


def test_the_ordinary_user_of_these_tests_has_no_privilege() -> None:
    """Otherwise the tests above would prove nothing."""
    if not REAL_ROOT:
        pytest.skip("already run by an ordinary user")
    python, env = ordinary_python()
    code = "import os; print(os.geteuid()); os.open('/proc/1/mem', os.O_RDONLY)"
    done = subprocess.run([*python, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "65534\n"
    assert "PermissionError" in done.stderr
