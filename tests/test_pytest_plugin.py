"""The pytest plugin as users get it: separate runs, as root and as an ordinary user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import aiotun

from . import _isolation
from .helpers import ordinary_python

USERS_TESTS = """
import asyncio, os, socket
import aiotun

def test_netns(netns):
    assert socket.if_nameindex() == [(1, "lo")]
    assert os.fstat(netns).st_ino == os.stat("/proc/thread-self/ns/net").st_ino
    assert str(os.fstat(netns).st_ino) != os.environ["OUTSIDE"]

def test_tun(tun):
    async def main():
        assert (await tun.link.info()).up
        assert {str(each) for each in await tun.link.addresses()} == {"10.0.0.1/24", "fd00::1/64"}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"hello", ("10.0.0.2", 9))
        assert (await tun.recv()).endswith(b"hello")
    asyncio.run(main())

def test_both(tun, tap):
    assert (tun.mode, tap.mode) == ("tun", "tap")
    assert len(socket.if_nameindex()) == 3

def test_device_pair(device_pair):
    async def main():
        one, other = device_pair
        await one.send(b"E...")
        assert await other.recv() == b"E..."
    asyncio.run(main())

def test_outside():
    moved = str(os.stat("/proc/thread-self/ns/net").st_ino) != os.environ["OUTSIDE"]
    assert moved == ("AIOTUN_ISOLATED" in os.environ) == bool(os.environ.get("MOVED"))
"""


def run(
    folder: Path, *args: str, ordinary: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin, as a user whose project is in that folder."""
    python, base = [sys.executable], dict(os.environ)
    base["PYTHONPATH"] = str(Path(aiotun.__file__).parent.parent)
    if ordinary:
        python, base = ordinary_python()
        folder.chmod(0o755)
        for parent in folder.parents[:3]:
            parent.chmod(0o755)
    for name in (_isolation.MARKER, "CI", "AIOTUN_ISOLATED"):
        base.pop(name, None)
    outside = str(os.stat("/proc/thread-self/ns/net").st_ino)
    if not (folder / "test_it.py").exists():
        (folder / "test_it.py").write_text(USERS_TESTS)
    plugins = ["-p", "no:cacheprovider", "-p", "aiotun.pytest_plugin"]
    return subprocess.run(
        [*python, "-W", "error", "-m", "pytest", *plugins, *args, "test_it.py"],
        cwd=folder,
        # Don't use the entry point, which exists only if aiotun is installed.
        env={**base, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OUTSIDE": outside, **env},
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_each_isolated_test_has_a_namespace_of_its_own(project: Path) -> None:
    """Each test that asks gets its own namespace, and the run itself stays in its namespace."""
    done = run(project)
    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_aiotun_isolate_moves_the_run_as_root(project: Path) -> None:
    done = run(project, "--aiotun-isolate", MOVED="1")
    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_isolated_by_configuration(project: Path) -> None:
    (project / "pytest.ini").write_text("[pytest]\naiotun_isolate = true\n")
    done = run(project, "-v", "-k", "outside", MOVED="1")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("test session starts") == 1


def test_an_ordinary_user_is_told_to_use_aiotun_isolate(project: Path) -> None:
    """A test that needs a namespace is an error that says what to do."""
    done = run(project, ordinary=True)
    assert "2 passed, 3 errors" in done.stdout, done.stdout + done.stderr
    assert "pytest with --aiotun-isolate" in done.stdout
    done = run(project, "--aiotun-isolate", ordinary=True, MOVED="1")
    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_isolating_fails_closed(project: Path) -> None:
    """When namespaces are forbidden, and when the environment has a false marker."""
    (project / "test_it.py").write_text("def test(): open('ran', 'w').close()")
    refused = [
        *("unshare", "-r", "sh", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'),
        *("sh", "setpriv", "--bounding-set=-all", "--inh-caps=-all"),
    ]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env["PYTHONPATH"] = str(Path(aiotun.__file__).parent.parent)
    command = [sys.executable, "-m", "pytest", "-p", "aiotun.pytest_plugin", "--aiotun-isolate"]
    done = subprocess.run(
        [*refused, *command], cwd=project, env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 4
    assert done.stderr.startswith("aiotun: private namespaces are not allowed here"), done.stderr
    assert done.stderr.count("\n") == 1
    for forged in ("1", f"{os.stat('/proc/self/ns/net').st_ino}:1", "::"):
        done = run(project, "--aiotun-isolate", AIOTUN_ISOLATED=forged)
        assert done.returncode == 4, done.stdout + done.stderr
        assert "AIOTUN_ISOLATED is set, but this is not" in done.stderr
    assert not (project / "ran").exists()


def test_the_plugin_has_an_entry_point() -> None:
    """An installation has the entry point."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\naiotun = "aiotun.pytest_plugin"\n' in text
