"""The programs that are compared, with their commands."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._harness import has_uvloop
from ._install import BUILD, PYTHON, Installed


@dataclass(frozen=True)
class Contender:
    """One program that does the work. `peer` is the library that it needs."""

    name: str
    peer: str
    command: tuple[str, ...]
    napi_threads: bool = False
    """Whether the kernel receives from its devices in threads, which other figures leave out."""


def _python(module: str, *options: str, interpreter: str = str(PYTHON)) -> tuple[str, ...]:
    return (interpreter, "-m", f"benchmarks.peers.programs.{module}_peer", *options)


def _ours(name: str, *options: str) -> Contender:
    command = _python("aiotun", *options, interpreter=sys.executable)
    return Contender(name, "aiotun", command, napi_threads="--napi" in options)


_C, _RUST = str(BUILD / "peer"), str(BUILD / "rust" / "target" / "release" / "peer")
_GO = str(BUILD / "go" / "peer")

# The peers that have no offload, or don't use it.
PEERS = ("pytun", "pytun-pmd3", "scapy", "asyncssh", "add_reader", "tun-rs", "water")

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("C", "C", (_C,)),
        Contender("C, offload", "C", (_C, "raw")),
        _ours("aiotun"),
        _ours("aiotun, one by one", "--one"),
        _ours("aiotun, uvloop", "--uvloop"),
        _ours("aiotun, NAPI threads", "--napi"),
        _ours("aiotun split", "--offload", "split"),
        _ours("aiotun split, uvloop", "--uvloop", "--offload", "split"),
        _ours("aiotun raw", "--offload", "raw"),
        _ours("aiotun raw, uvloop", "--uvloop", "--offload", "raw"),
        Contender("pytun", "pytun", _python("pytun")),
        Contender("pytun-pmd3", "pytun-pmd3", _python("pmd3")),
        Contender("scapy", "scapy", _python("scapy")),
        Contender("asyncssh", "asyncssh", _python("asyncssh")),
        Contender("add_reader", "add_reader", _python("add_reader", interpreter=sys.executable)),
        Contender("tun-rs", "tun-rs", (_RUST,)),
        Contender("tun-rs, offload", "tun-rs", (_RUST, "offload")),
        Contender("water", "water", (_GO, "water")),
        Contender("wireguard-go", "wireguard-go", (_GO, "wireguard")),
    )
}


def present(names: Sequence[str], installed: Mapping[str, Installed]) -> list[Contender]:
    """Return those of these contenders whose library is installed, and uvloop if they need it."""
    found = [CONTENDERS[name] for name in names]
    return [
        each
        for each in found
        if each.peer in installed
        and not installed[each.peer].missing
        and (has_uvloop() or "uvloop" not in each.name)
    ]
