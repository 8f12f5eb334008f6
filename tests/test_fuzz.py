"""The fuzz targets: a short run of each with a fixed seed, and a proof that each can fail.

`make fuzz` runs longer. Each of its findings stays here as a test.
"""

import ast
import dataclasses
import importlib.util
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _dhcp_message
import _mss
import _switching
import pytest
import udp_vpn
import vxlan
from wireguard import config
from wireguard.interface import Interface

from aiotun import IPHeader, PacketDecodeError, decode_frame, decode_packet, reply
from aiotun._cli import arguments, networkd
from aiotun._packets import gso, native, runs
from aiotun._packets.fragments import Reassembler
from aiotun.offload import VnetHeader
from fuzz import _kernel, _mutating, _runs, packets, superpackets, words
from fuzz._target import Choices, Target
from fuzz.targets import TARGETS

from .helpers import ROOT, SLOWER

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@pytest.fixture(autouse=True)
def _kernel_closed() -> Iterator[None]:
    yield
    _kernel.close()


def _skip_missing(target: Target) -> None:
    if why := target.missing():
        pytest.skip(why)


@each_target
def test_the_property_holds(target: Target) -> None:
    _skip_missing(target)
    outcome = _mutating.run(target, seed=4, most=len(target.seeds()) + 200)
    if outcome.error is not None:
        raise AssertionError(f"{target.name}: {outcome.failed!r}") from outcome.error
    assert outcome.executions == len(target.seeds()) + 200


@each_target
def test_the_same_seed_makes_the_same_inputs(target: Target) -> None:
    for _, one, other in zip(
        range(100), _mutating.inputs(target, 7), _mutating.inputs(target, 7), strict=False
    ):
        assert one == other


# --- Planted -------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def _raising(place: Any, name: str) -> Break:
    """Make a function raise an unexpected error now and then."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest, calls = getattr(place, name), 0

        def broken(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 50 == 0:
                raise IndexError("planted")
            return honest(*args, **options)

        patch.setattr(place, name, broken)

    return plant


def _replacing(place: Any, name: str, broken: Any) -> Break:
    return lambda patch: patch.setattr(place, name, broken)


def _changing(place: Any, name: str, change: Callable[[Any], Any]) -> Break:
    """Make a function return something else."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest = getattr(place, name)
        patch.setattr(place, name, lambda *args, **options: change(honest(*args, **options)))

    return plant


def _longer(answer: bytes | None) -> bytes | None:
    return None if answer is None else answer + bytes(2000)


# For each target, a fault that breaks its promise.
PLANTED: dict[str, Break] = {
    "decode": _raising(packets, "decode_frame"),
    "header": _replacing(IPHeader, "fragment", None),
    "reply": _changing(reply, "icmp_echo", _longer),
    "datagrams": _changing(Reassembler, "add", lambda whole: whole and whole[:-1]),
    "describe": _changing(packets, "describe", lambda found: (found[0] + "\x1b[2J", found[1])),
    "vnet-header": _changing(VnetHeader, "pack", lambda data: data[::-1]),
    "find": _changing(native, "_find_other", lambda at: at + 1),
    "split": _changing(gso, "split", lambda parts: parts[:-1]),
    "merge": _changing(gso, "merge", lambda merged: merged[:-1]),
    "run": _changing(runs, "place", lambda measures: measures and (*measures[:3], 7)),
    "send-run": _changing(superpackets.MODULE, "send_run", lambda count: count and count - 1),
    "segmenting": _changing(gso, "split", lambda parts: [*parts[:-1], parts[-1][::-1]]),
    "dhcp": _raising(_dhcp_message, "_read_options"),
    "vxlan": _changing(vxlan.Vxlan, "receive", lambda found: [each[1:] for each in found]),
    "switch": _replacing(_switching, "HEADER", 0),
    "wireguard": _replacing(
        Interface, "receive", lambda self, datagrams, source, now: list(datagrams)
    ),
    "udp-vpn": _replacing(udp_vpn.Session, "_accept", lambda self, counter: True),
    "mss": _changing(_mss, "clamp_mss", lambda packet: packet + b"\0"),
    "wireguard-config": _raising(config, "_number"),
    "vpn-keys": _raising(udp_vpn, "ip_address"),
    "options": _raising(words, "parse_route"),
    "networkd": _changing(
        networkd,
        "units",
        lambda texts: {name: text + "Key=a b\n" for name, text in texts.items()},
    ),
    "commands": _raising(arguments, "read"),
}


@each_target
def test_each_target_finds_a_planted_fault(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_missing(target)
    PLANTED[target.name](monkeypatch)
    outcome = _mutating.run(target, seed=1, most=3000)
    assert outcome.error is not None, f"{outcome.executions} inputs, and nothing was found"


def test_a_finding_is_saved_and_can_be_replayed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_runs, "FINDINGS", tmp_path)

    def check(data: bytes) -> None:
        assert b"\x45" not in data

    broken = dataclasses.replace(TARGETS["header"], check=check)
    run = _runs.mutated(broken, 10, seed=1)
    assert "AssertionError" in run.text
    assert run.finding is not None
    assert run.finding.parent == tmp_path / "header"
    assert b"\x45" in run.finding.read_bytes()
    again = subprocess.run(
        [sys.executable, "-m", "fuzz", "--replay", str(run.finding)],
        cwd=ROOT, capture_output=True, text=True, timeout=50 * SLOWER,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr  # the library itself is not broken
    assert again.stdout.startswith("header: ")


def test_the_guided_engine_knows_the_modules_of_every_target() -> None:
    """Its module can't be imported without atheris, so the table is read."""
    tree = ast.parse((ROOT / "fuzz" / "_guided.py").read_text())
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    (table,) = (node for node in tables if isinstance(node, ast.Dict))
    assert {ast.literal_eval(key) for key in table.keys if key is not None} == {*TARGETS}


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris comes with make fuzz"
)
def test_the_guided_engine_finds_and_replays(tmp_path: Path) -> None:
    """In a copy of the checkout that lacks a check of DHCP's options."""
    for folder in ("fuzz", "examples", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    broken = tmp_path / "examples" / "_dhcp_message.py"
    text = broken.read_text().replace("if at + 1 >= len(data) or at", "if at")
    assert text != broken.read_text()
    broken.write_text(text)

    def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fuzz", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50)

    done = fuzz("30", "dhcp", "--engine", "atheris", "--seed", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "IndexError" in done.stdout
    assert "seed: 1\n" in done.stdout
    again = re.search(r'make fuzz ARGS="(--replay .*)"', done.stdout)
    assert again is not None, done.stdout
    done = fuzz(*again[1].split())
    assert done.returncode == 1
    assert "IndexError" in done.stderr


def test_choices_end_in_zeroes() -> None:
    choices = Choices(b"\xff\x01")
    assert choices.getrandbits(8) == 255
    assert not choices.over
    assert choices.randrange(2) == 0  # the highest bit of 1
    assert [choices.randrange(10) for _ in range(5)] == [0] * 5
    assert Choices(b"abc").rest(2) == b"ab"
    assert isinstance(Choices(random.Random(1).randbytes(100)).choice("abc"), str)


# --- Found, or known -----------------------------------------------------------------------------


def _ip4(proto: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, min(20 + len(payload), 0xFFFF), 7, 0, 64, proto, 0)
    return head + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + payload


def _ip6(proto: int, payload: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(payload), proto, 255) + bytes(range(32)) + payload


def _frame(ethertype: int, payload: bytes) -> bytes:
    return _MACS + struct.pack("!H", ethertype) + payload


def _nested(levels: int) -> bytes:
    """IPv4 in IPv4 in IPv4: dpkt recurses once for each level."""
    packet = b""
    for _ in range(levels):
        packet = _ip4(4, packet)
    return packet


_MACS = b"\2\0\0\0\0\1\2\0\0\0\0\2"
_FRAGMENT, _OPTIONS = struct.pack("!BBHI", 60, 0, 0, 1), b"\x3b\0" + bytes(6)

# Packets for which dpkt raises other errors: a fragment header followed by another extension
# header; MPLS labels with nothing after them; more levels than Python's stack allows.
OFFENDERS = [
    (AttributeError, _ip6(44, _FRAGMENT + _OPTIONS)),
    (AttributeError, _ip4(41, _ip6(44, _FRAGMENT + _OPTIONS))),
    (AttributeError, _frame(0x86DD, _ip6(44, _FRAGMENT + _OPTIONS))),
    (IndexError, _frame(0x8847, b"\0\0\x11\xff")),
    (IndexError, _frame(0x8848, b"\0\0\x10\xff\0\0\x11\xff")),
    (RecursionError, _nested(600)),
    (RecursionError, _frame(0x0800, _nested(600))),
]


@pytest.mark.parametrize(
    ("cause", "data"), OFFENDERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_the_known_offenders_are_chained(cause: type[Exception], data: bytes) -> None:
    decode = decode_frame if data.startswith(_MACS) else decode_packet
    with pytest.raises(PacketDecodeError, match=cause.__name__) as raised:
        decode(data)
    assert type(raised.value.__cause__) is cause
    packets.decoding(data)


def test_the_sanitizers_run() -> None:
    problem = _runs.build_sanitized()
    if problem is not None:
        assert problem.startswith("missing:"), problem
        pytest.skip(problem)
    for name in _runs.SANITIZED:
        run = _runs.sanitized(TARGETS[name], 1, seed=1)
        assert not run.text, run.text
        assert run.executions > len(TARGETS[name].seeds())


def test_the_sanitizers_find_a_read_past_the_end(tmp_path: Path) -> None:
    if (problem := _runs.build_sanitized()) is not None:
        pytest.skip(problem)
    code = (
        "import ctypes, os\n"
        "from fuzz.superpackets import MODULE, exact\n"
        "assert MODULE.__file__ == os.environ['AIOTUN_FUZZ_MODULE']\n"
        "data = exact(bytes(64))\n"
        "ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(data)), 65)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=_runs.sanitized_environment(),
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, (done.stderr, os.environ.get("CC"))
