"""examples/qemu_bridge.py: what it makes, that it undoes everything, and a real QEMU."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiotun._kernel.abi import Iff

from ..helpers import REAL_ROOT, ROOT, ip, need, ordinary_python
from . import kernel

EXAMPLE = ROOT / "examples" / "qemu_bridge.py"
NAMES = ["--bridge", "qbr0", "--tap", "qtap0"]
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])

ETH_P_ALL = 3  # if_ether.h
EXPERIMENTAL = b"\x88\xb5"  # IEEE 802, local experimental ethertype 1
FROM_GUEST = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x99" + EXPERIMENTAL + b"from the guest".ljust(46)
TO_GUEST = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x98" + EXPERIMENTAL + b"to the guest".ljust(46)

# Stands in for QEMU: it reads the TAP's fd from its arguments as QEMU does.
STAND_IN = """
import os, re, select, signal, sys
netdev = sys.argv[sys.argv.index("-netdev") + 1]
fd = int(re.fullmatch(r"tap,id=(\\w+),fd=(\\d+)", netdev)[2])
HEADER = bytes(10)

def receive():
    while True:
        select.select([fd], [], [])
        packet = os.read(fd, 65600)
        if b"to the guest" in packet:
            return packet
"""


def wait_for(predicate: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def command(*args: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLE), *args]


def guest(code: str) -> list[str]:
    """The --launch option with a stand-in that runs this code."""
    return ["--launch", "--", sys.executable, "-c", STAND_IN + code]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def started(*args: str, first: str = "ready") -> Iterator[subprocess.Popen[str]]:
    """Start the example and wait for the first line that it, or its guest, prints."""
    with subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            if not line.startswith(first):
                process.terminate()
                raise AssertionError(f"{line!r}, {process.stderr.read()!r}")
            yield process
        finally:
            process.terminate()  # it also ends its guest


def finish(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    """End it by a signal, and return its stderr."""
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    return said


def everything() -> dict[str, Any]:
    """Everything that iproute2 shows of each interface except lo, without counters and timers."""
    found = {}
    for name in kernel.names():
        state = kernel.state(name)
        state["link"].pop("linkinfo", None)  # a bridge's has timers
        found[name] = {**state, "master": state["link"].get("master")}
    return found


def add(*args: str) -> None:
    ip("link", "add", *args)


@contextlib.contextmanager
def listening(name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        sock.bind((name, 0))
        sock.settimeout(10)
        yield sock


# --- With a command ------------------------------------------------------------------------------


def test_frames_pass_between_the_command_and_the_bridge() -> None:
    add("qbr0", "up", "type", "bridge")
    code = f"""
os.write(fd, HEADER + {FROM_GUEST!r})
assert receive() == HEADER + {TO_GUEST!r}
sys.exit(7)
"""
    with listening("qbr0") as sock, subprocess.Popen(command(*NAMES, *guest(code))) as process:
        try:
            while sock.recv(2048) != FROM_GUEST:
                pass
            assert kernel.link("qtap0")["master"] == "qbr0"
            assert kernel.is_up("qtap0")
            assert kernel.is_up("qbr0")
            sock.send(TO_GUEST)
            assert process.wait(10) == 7
        finally:
            process.terminate()
    assert kernel.names() == ["qbr0"]


def test_the_command_needs_no_privilege() -> None:
    """An ordinary user without any capability can use the TAP."""
    if not REAL_ROOT:
        pytest.skip("already run by an ordinary user, who can't become another user")
    python, env = ordinary_python()
    code = (
        STAND_IN
        + f"""
status = open("/proc/self/status").read()
assert "CapEff:\\t0000000000000000" in status
assert os.geteuid() != 0
os.write(fd, HEADER + {FROM_GUEST!r})
"""
    )
    words = ["env", *(f"{key}={value}" for key, value in env.items() if key != "PATH"), *python]
    done = run(*NAMES, "--launch", "--", *words, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert kernel.names() == []


def test_the_command_gets_its_words_and_only_the_taps_fd() -> None:
    """Its own arguments come first. The TAP is non-blocking, and no other fd of ours is open."""
    code = """
print(sys.argv[1:-4], re.sub(r"\\d", "N", netdev), sys.argv[-2:], os.get_blocking(fd))
paths = [f"/proc/self/fd/{number}" for number in range(100)]
files = [os.readlink(path) for path in paths if os.path.lexists(path)]
print(files.count("/dev/net/tun"), len(files))
"""
    done = run(*NAMES, "--model", "e1000,mac=02:00:00:00:00:97", *guest(code), "--tap", "--", "-x")
    assert done.stderr == ""
    assert done.stdout == (
        "['--tap', '--', '-x'] tap,id=aiotun,fd=N "
        "['-device', 'e1000,mac=02:00:00:00:00:97,netdev=aiotun'] False\n1 4\n"
    )


@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_the_exit_status_is_the_commands(code: str, status: int) -> None:
    done = run(*NAMES, *guest(code))
    assert (done.returncode, done.stderr) == (status, "")
    assert kernel.names() == []


@SIGNALS
def test_a_signal_ends_the_command_and_undoes_all(number: signal.Signals) -> None:
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("running", os.getpid(), flush=True)
receive()
"""
    with started(*NAMES, *guest(code), first="running") as process:
        assert kernel.names() == ["qbr0", "qtap0"]
        ours = Path(f"/proc/{process.pid}/fd")
        assert "/dev/net/tun" not in [os.readlink(each) for each in ours.iterdir()]
        assert finish(process, number) == ""
        assert process.returncode == 5
    assert kernel.names() == []


def test_a_second_signal_ends_a_command_that_does_not_listen() -> None:
    code = """
print("running", flush=True)
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"no\\n"))
print("deaf", flush=True)
while True:
    receive()
"""
    with started(*NAMES, *guest(code), first="running") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "deaf\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "no\n"
        assert finish(process) == ""
        assert process.returncode == 137
    assert kernel.names() == []


# --- Without one ---------------------------------------------------------------------------------


@SIGNALS
def test_a_tap_that_waits(number: signal.Signals) -> None:
    with started(*NAMES, "--owner", str(kernel.ORDINARY)) as process:
        info = kernel.link("qtap0")
        assert info["master"] == "qbr0"
        data = info["linkinfo"]["info_data"]
        assert (data["type"], data["persist"], data["multi_queue"]) == ("tap", True, False)
        assert kernel.is_up("qtap0")
        assert kernel.is_up("qbr0")
        # Its owner can attach without any privilege, as QEMU would.
        said = kernel.ordinary_child("attempt(aiotun.open_tap('qtap0'))")
        assert said["class"] is None
        assert finish(process, number) == ""
        assert process.returncode == 0
    assert kernel.names() == []


# --- What was there ------------------------------------------------------------------------------


def prepare() -> None:
    """Make all interfaces, each in another state than the example needs."""
    add("qbr0", "type", "bridge")
    add("other0", "type", "bridge")
    # A bridge has the lowest MAC of its ports, and zeros when it has no port.
    masters = {"qtap0": "other0", "up0": "other0", "in0": "qbr0"}
    for number, (name, master) in enumerate(masters.items()):
        kernel.make(name, "tap")
        ip("link", "set", name, "master", master, "address", f"02:00:00:00:00:8{number}")
    ip("addr", "add", "10.83.0.1/24", "dev", "up0")


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("launch", [True, False], ids=["launch", "ready"])
def test_the_previous_state_is_restored(launch: bool, up: bool) -> None:
    prepare()
    if up:
        for name in kernel.names():
            ip("link", "set", name, "up")
    before = everything()
    code = "print('running', flush=True); receive()"
    words, first = (guest(code), "running") if launch else ([], "ready")
    with started(*NAMES, "--uplink", "up0", *words, first=first) as process:
        for name in ("qtap0", "up0"):
            assert kernel.link(name)["master"] == "qbr0"
        for name in ("qtap0", "up0", "qbr0"):
            assert kernel.is_up(name)
        assert kernel.addresses("up0") == {"10.83.0.1/24"}
        assert finish(process) == ""
    assert everything() == before


def test_an_uplink_without_a_bridge_has_none_afterwards() -> None:
    kernel.make("up0", "tap")
    before = everything()
    with started(*NAMES, "--uplink", "up0") as process:
        assert kernel.link("up0")["master"] == "qbr0"
        assert finish(process) == ""
        assert process.returncode == 0
    assert everything() == before


def test_what_is_gone_at_the_end_hinders_nothing() -> None:
    kernel.make("up0", "tap")
    with started(*NAMES, "--uplink", "up0") as process:
        ip("link", "del", "dev", "up0")
        said = finish(process)
        assert said.count("\n") == 1
        assert "up0" in said
        assert process.returncode == 1
    assert kernel.names() == []


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--uplink", "nothing0"], "nothing0"),
        (["--uplink", "lo"], "lo"),
        (["--tap", "other0"], "other0"),
        (["--tap", "tun0"], "tun0"),
        (["--tap", "held0"], "held0"),
        (["--bridge", "up0", "--uplink", "other0"], "up0"),
        (["--bridge", "tun0", "--uplink", "up0"], "tun0"),
        (["--launch", "--", "/nothing/here"], "/nothing/here could not be started: No such file"),
        (["--launch", "--", "/dev/null"], "/dev/null could not be started: Permission denied"),
        (["--tap", "held0", "--launch", "--", "true"], "held0"),
        (["--tap", "tun0", "--launch", "--", "true"], "tun0"),
        (["--uplink", "nothing0", "--launch", "--", "true"], "nothing0"),
        (["--owner", "nobody-at-all"], "nobody-at-all"),
        (["--bridge", "br%d"], "br%d"),
    ],
)
def test_a_step_that_fails_is_one_line_and_undone(words: list[str], said: str) -> None:
    add("other0", "type", "bridge")
    kernel.make("up0", "tap")
    ip("link", "set", "up0", "master", "other0")
    kernel.make("tun0", "tun")
    kernel.make("held0", "tap")
    with kernel.held("held0", Iff.TAP | Iff.NO_PI):
        before = everything()
        done = run(*NAMES, *words)
        assert everything() == before
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["--bridge", "qbr0"], "--tap"),
        ([*NAMES, "--uplink", "a/b"], "not a valid interface name"),
        ([*NAMES, "--launch"], "go together"),
        ([*NAMES, "--launch", "--"], "go together"),
        ([*NAMES, "--", "true"], "go together"),
        ([*NAMES, "true"], "unrecognized"),
    ],
)
def test_invalid_usage_exits_with_2(words: list[str], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert kernel.names() == []


# --- QEMU itself ---------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("model", ["virtio-net-pci", "e1000"])
def test_the_dhcp_request_of_a_booting_machine_reaches_the_bridge(model: str) -> None:
    """QEMU's built-in iPXE asks for an address; QEMU has no privilege."""
    qemu = need("qemu-system-x86_64")
    if not Path("/usr/lib/ipxe/qemu").exists():
        pytest.skip("missing: iPXE for QEMU; install ipxe-qemu")
    drop: list[str] = []
    if REAL_ROOT:
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    mac = bytes.fromhex("020000000097")
    device = f"{model},mac={mac.hex(':')}"
    machine = ["-accel", "tcg", "-nodefaults", "-display", "none", "-boot", "n"]
    add("qbr0", "up", "type", "bridge")
    words = [*NAMES, "--model", device, "--launch", "--", "timeout", "50", *drop, qemu, *machine]
    with listening("qbr0") as sock, subprocess.Popen(command(*words)) as process:
        try:
            sock.settimeout(40)
            while True:
                frame = sock.recv(2048)
                # From port 68 to 67: a BOOTREQUEST of the machine (RFC 2131).
                if frame[12:14] == b"\x08\x00" and frame[34:38] == b"\x00\x44\x00\x43":
                    break
            assert frame[:12] == b"\xff" * 6 + mac
            assert frame[42] == 1
            assert frame[70:76] == mac
        finally:
            process.terminate()
        assert process.wait(10) == 0
    assert kernel.names() == ["qbr0"]
