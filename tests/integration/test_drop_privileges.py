"""The example that drops its privileges: what the kernel says is left of them."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..helpers import REAL_ROOT, ordinary_python
from .kernel import names
from .test_examples import EXAMPLES, LOOPS, Pinger, check_failure, run, start

DROP = "drop_privileges.py"
NOBODY = 65534
ARGS = ["--name", "ex0", "--address", "10.81.0.1/24", "--user", str(NOBODY)]

only_root = pytest.mark.skipif(not REAL_ROOT, reason="needs another user than the namespace's root")


@pytest.fixture
def started() -> Iterator[Any]:
    """Start the example with an interpreter and from a folder that the ordinary user can read."""
    python, env = ordinary_python()
    folder = Path("/run/aiotun-user/examples")
    shutil.copytree(EXAMPLES, folder)

    def begin(*args: str) -> Any:
        # With an additional group, which the example must drop.
        setpriv = [python[0], "--groups=0,4242", "--"]
        command = [*setpriv, python[-1], "-W", "error", str(folder / DROP), *ARGS, *args]
        return start(DROP, command=command, env=env)

    yield begin
    shutil.rmtree(folder)


def status(pid: int) -> dict[str, list[str]]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {key: value.split() for key, _, value in (x.partition(":") for x in text.splitlines())}


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def check_powerless(pid: int, *, bounded: bool) -> None:
    for task in os.listdir(f"/proc/{pid}/task"):
        told = status(int(task))
        assert told["Uid"] == told["Gid"] == [str(NOBODY)] * 4
        assert told["Groups"] == []
        assert told["NoNewPrivs"] == ["1"]
        sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"] + ["CapBnd"] * bounded
        assert {name: int(told[name][0], 16) for name in sets} == dict.fromkeys(sets, 0)


@only_root
@LOOPS
def test_one_process_serves_after_dropping_its_privileges(loop: list[str], started: Any) -> None:
    with started("--queues", "3", *loop) as service, Pinger(4) as pinger:
        pid = service.process.pid
        check_powerless(pid, bounded=True)
        for place in range(2, 34):
            pinger.check(f"10.81.0.{place}")
        check_powerless(pid, bounded=True)
        assert service.end() == ""


@only_root
@LOOPS
def test_a_child_that_never_had_a_privilege(loop: list[str], started: Any) -> None:
    with started("--separate", "--queues", "3", *loop) as service, Pinger(4) as pinger:
        parent = service.process.pid
        (child,) = children(parent)
        check_powerless(child, bounded=False)
        for place in range(2, 34):
            pinger.check(f"10.81.0.{place}")
        # The parent has closed the queues.
        fds = [os.readlink(each) for each in Path(f"/proc/{parent}/fd").iterdir()]
        assert "/dev/net/tun" not in fds
        assert service.end() == ""


@only_root
def test_the_child_is_killed(started: Any) -> None:
    with started("--separate") as service:
        (child,) = children(service.process.pid)
        os.kill(child, 9)
        _, said = service.process.communicate(timeout=10)
        assert service.process.returncode == 1
        assert said.endswith("the child ended with status -9\n")
        assert said.count("\n") == 1
    assert names() == []


@only_root
def test_no_thread_may_keep_what_is_given_up() -> None:
    path = str(EXAMPLES / DROP)
    code = (
        "import runpy, sys, threading\n"
        "threading.Thread(target=threading.Event().wait, args=(60,), daemon=True).start()\n"
        f"sys.argv = {[path, *ARGS]!r}\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"runpy.run_path({path!r}, run_name='__main__')"
    )
    check_failure(run(DROP, args=[sys.executable, "-c", code]), 1, "another thread runs")
    assert names() == []


@only_root
def test_a_failed_opening_is_one_line_and_leaves_no_child(started: Any) -> None:
    """An opening fails because of an invalid name."""
    for more in ([], ["--separate"]):
        with pytest.raises(AssertionError, match="must have 1 to 15 bytes") as caught:
            started(*more, "--name", "much-too-long-a-name").__enter__()
        assert str(caught.value).count("\\n") == 1


def test_root_and_unknown_users_are_refused() -> None:
    for wrong in ("0", "root", "no-such-user", "4294967000"):
        check_failure(run(DROP, "--user", wrong), 2, "user")
    check_failure(run(DROP, "--queues", "0"), 2, "1 to 253")


def test_an_ordinary_user_is_told_to_start_as_root() -> None:
    python, env = ordinary_python()
    folder = Path("/run/aiotun-user/examples")
    shutil.copytree(EXAMPLES, folder)
    try:
        done = run(DROP, args=[*python, str(folder / DROP), *ARGS], env=env)
        check_failure(done, 1, "start this as root")
    finally:
        shutil.rmtree(folder)


def test_a_child_that_gets_no_queues_ends_with_one_line() -> None:
    """The privileged process ends before it sends the queues."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / DROP), "--take", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "no queues came" in said
    assert said.count("\n") == 1


@only_root
def test_it_does_not_serve_with_privileges_left() -> None:
    """The example checks its privileges, also if dropping them silently failed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import drop_privileges as drop\n"
        "try: drop.check()\n"
        "except PermissionError as error: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused\n"
