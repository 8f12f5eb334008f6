"""The programs that are compared, with their commands."""

import sys

from .._contenders import Contender, named
from ._install import GO, LWIP, PLAIN_C, PYTHON, RUST, SMOLTCP


def _python(module: str, *options: str, interpreter: str = str(PYTHON)) -> tuple[str, ...]:
    return (interpreter, "-m", f"benchmarks.peers.programs.{module}_peer", *options)


def _ours(name: str, *options: str) -> Contender:
    command = _python("aiotun", *options, interpreter=sys.executable)
    return Contender(name, "aiotun", command, napi_threads="--napi" in options)


# The peers that have no offload, or don't use it.
PEERS = ("pytun", "pytun-pmd3", "scapy", "asyncssh", "add_reader", "tun-rs", "water")

CONTENDERS = named(
    Contender("C", "C", (str(PLAIN_C),)),
    Contender("C, offload", "C", (str(PLAIN_C), "raw")),
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
    Contender("tun-rs", "tun-rs", (str(RUST),)),
    Contender("tun-rs, offload", "tun-rs", (str(RUST), "offload")),
    Contender("water", "water", (str(GO), "water")),
    Contender("wireguard-go", "wireguard-go", (str(GO), "wireguard")),
    Contender("smoltcp", "smoltcp", (str(SMOLTCP),)),
    Contender("lwIP", "lwIP", (str(LWIP),)),
)
