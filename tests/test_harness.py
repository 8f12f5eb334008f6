"""The harness itself: it isolates the tests, or refuses to run, and detects leaks."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from . import _isolation
from ._leaks import LeakCheck
from .helpers import REAL_ROOT, ROOT, ip


def run_pytest(
    *args: str,
    prefix: tuple[str, ...] = (),
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run pytest as from outside: without the marker, and with `env` added to the environment."""
    ours = {key: value for key, value in os.environ.items() if key not in (_isolation.MARKER, "CI")}
    command = [*prefix, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    return subprocess.run(
        command, cwd=cwd, env={**ours, **(env or {})}, capture_output=True, text=True, timeout=50
    )


def run_here(folder: Path, source: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a test module from another folder with our conftest."""
    (folder / "test_it.py").write_text(source)
    ours = ("-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest")
    return run_pytest(*ours, *args, str(folder), env=env)


# --- Isolation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "unshare(1) is missing; install util-linux"),
        (
            "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1",
            "(unshare failed: Operation not permitted)",
        ),
        # An unshare that succeeds but does nothing: the run would continue outside.
        ('while [ "$1" != -- ] && [ -n "$2" ]; do shift; done; shift; exec "$@"', None),
    ],
)
def test_where_unsharing_fails_nothing_runs(
    tmp_path: Path, script: str | None, said: str | None
) -> None:
    if script is not None:
        fake = tmp_path / "unshare"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    done = run_pytest("tests/test_exports.py", env={"PATH": str(tmp_path)})
    assert done.returncode != 0
    assert "passed" not in done.stdout
    assert done.stderr.startswith("aiotun tests: ")
    assert done.stderr.count("\n") == 1
    if said is not None:
        assert said in done.stderr


def test_a_forged_marker_is_refused() -> None:
    # In its own namespace, so that nothing is touched even if the check fails.
    unshare = shutil.which("unshare")
    assert unshare is not None
    for forged in ("1", "1:1", f"{_isolation._inode('net')}:1", os.environ[_isolation.MARKER]):
        done = run_pytest(
            "tests/test_exports.py",
            prefix=(unshare, "-n"),
            env={_isolation.MARKER: forged},
        )
        assert done.returncode == 4
        assert "unset it" in done.stdout + done.stderr
        assert "passed" not in done.stdout


def test_a_namespace_with_other_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "proof"
    proof.write_text(str(_isolation._inode("net")))
    monkeypatch.setattr(_isolation, "PROOF", proof)
    assert _isolation.problem(os.environ) is None
    ip("tuntap", "add", "dev", "tun0", "mode", "tun")
    assert "it has tun0" in str(_isolation.problem(os.environ))


def test_a_conftest_found_too_late_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep").symlink_to(ROOT / "tests")
    done = run_pytest("-c", str(ROOT / "pyproject.toml"), str(tmp_path), cwd=tmp_path)
    assert done.returncode != 0
    assert "name the tests folder" in done.stdout
    assert "passed" not in done.stdout


def test_works_from_another_folder_and_with_arguments() -> None:
    target = f"{ROOT}/tests/test_harness.py"
    args = ("-q", "-k", "loop_is", "--collect-only", "-p", "no:faulthandler", target)
    done = run_pytest(*args, cwd=Path("/"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"loop_is\w*\[(\w+)\]", done.stdout) == ["asyncio", "uvloop"]


def test_every_test_has_an_empty_namespace(netns: int) -> None:
    assert socket.if_nameindex() == [(1, "lo")]
    assert os.fstat(netns).st_ino == os.stat("/proc/thread-self/ns/net").st_ino
    assert str(os.fstat(netns).st_ino) != _isolation.PROOF.read_text()
    assert ip("link", "show", "dev", "lo")[0]["flags"].count("UP") == 1


def test_names_of_namespaces_stay_private() -> None:
    if not REAL_ROOT:
        pytest.skip("'ip netns add' does not work in a user namespace")
    ip("netns", "add", "ours")
    try:
        assert os.path.ismount("/run")
    finally:
        ip("netns", "del", "ours")


def test_workers_do_not_share_run(tmp_path: Path) -> None:
    """Each of two tests that run at the same time makes the same file, and waits for the other."""
    done = run_here(
        tmp_path,
        """
import os, pathlib, time, pytest
@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", ["0", "1"])
def test_it(number):
    here = pathlib.Path(__file__).parent
    with open("/run/both", "x") as file:
        file.write(number)
    (here / number).touch()
    while not all((here / each).exists() for each in "01"):
        time.sleep(0.01)
    assert pathlib.Path("/run/both").read_text() == number
    assert os.path.ismount("/run")
""",
        "-n",
        "2",
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_thread_comes_back_after_a_failure(tmp_path: Path) -> None:
    done = run_here(
        tmp_path,
        """
import os, pathlib, pytest
def inode():
    return str(os.stat("/proc/thread-self/ns/net").st_ino)
@pytest.fixture(autouse=True, scope="session")
def home():
    yield
    assert inode() == pathlib.Path("/run/aiotun-tests").read_text()
def test_fails():
    assert False
async def test_fails_too():
    assert inode() == pathlib.Path("/run/aiotun-tests").read_text()
""",
    )
    assert "3 failed" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


# --- Loops, leaks and skips ----------------------------------------------------------------------


async def test_the_loop_is_what_the_name_says(request: pytest.FixtureRequest) -> None:
    kinds = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.Loop}
    assert isinstance(asyncio.get_running_loop(), kinds[request.node.callspec.id])


def test_leaks_are_seen() -> None:
    check = LeakCheck()
    assert check.problem() is None
    openers: list[Callable[[], int]] = [
        lambda: os.open("/dev/net/tun", os.O_RDWR),
        lambda: os.open("/proc/self/ns/net", os.O_RDONLY),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
    ]
    for opener in openers:
        opened = opener()
        assert "left behind: fds ['" in str(check.problem())
        os.close(opened)
        assert check.problem() is None


def test_threads_are_waited_for_and_seen() -> None:
    check, ending = LeakCheck(), threading.Event()
    thread = threading.Thread(target=ending.wait, name="aiotun")
    thread.start()
    assert "threads [<Thread(aiotun" in str(check.problem(timeout=0.01))
    timer = threading.Timer(0.05, ending.set)
    timer.start()
    assert check.problem() is None
    timer.join()


def test_a_leak_fails_its_test(tmp_path: Path) -> None:
    done = run_here(
        tmp_path, "import os\ndef test_it():\n    os.open('/proc/self/ns/net', os.O_RDONLY)\n"
    )
    assert done.returncode == 1
    assert "left behind" in done.stdout


def test_in_ci_a_missing_tool_is_no_excuse(tmp_path: Path) -> None:
    source = """
import pytest
def test_missing():
    pytest.skip("missing: sheep(1)")
def test_other():
    pytest.skip("not on this kernel")
@pytest.mark.skipif(True, reason="missing: goat(1)")
def test_mark():
    pass
"""
    done = run_here(tmp_path, source)
    assert "3 skipped" in done.stdout
    done = run_here(tmp_path, source, CI="true")
    assert done.returncode == 1
    assert "1 failed, 1 skipped, 1 error" in done.stdout
    done = run_here(
        tmp_path,
        "import pytest\npytest.skip('missing: sheep(1)', allow_module_level=True)\n",
        CI="true",
    )
    assert done.returncode != 0
    assert "1 error" in done.stdout
