"""The steps that install the other libraries; see `benchmarks._building`."""

import functools
import sys
from collections.abc import Callable
from importlib import metadata

from .. import _building
from .._building import BUILD, MissingPeerError
from .._harness import HERE
from ..netstack import _install as stacks

SOURCES = HERE / "peers" / "programs"
FOLDER = BUILD / "peers"
PYTHON = FOLDER / "venv" / "bin" / "python"
PLAIN_C, LWIP = FOLDER / "peer", FOLDER / "lwip"
RUST = FOLDER / "rust" / "target" / "release" / "peer"
SMOLTCP = stacks.RUST / "phy"
GO = FOLDER / "go" / "bin" / "peer"


def _c() -> str:
    _building.c(FOLDER / "sender", SOURCES / "sender.c")
    return _building.c(PLAIN_C, SOURCES / "peer.c")


def _package(package: str) -> str:
    if not PYTHON.exists():
        _building.run([sys.executable, "-m", "venv", "--clear", str(PYTHON.parent.parent)])
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    try:
        return _building.run([str(PYTHON), "-c", code])
    except MissingPeerError:
        pip = [str(PYTHON), "-m", "pip", "install", "-q", "--no-input"]
        _building.run([*pip, package])
        return _building.run([str(PYTHON), "-c", code])


def _go(module: str) -> str:
    return _building.go(FOLDER / "go", SOURCES / "go", ["."], module)


def _lwip() -> str:
    """Debian's library, with the network interface for TAP devices that is a part of it."""
    version = stacks.lwip()
    _building.c(LWIP, SOURCES / "lwip.c", "-I/usr/include/lwip", "-llwip")
    return version


STEPS: dict[str, Callable[[], str]] = {
    "aiotun": lambda: metadata.version("aiotun"),
    "add_reader": lambda: "Python {}.{}.{}".format(*sys.version_info[:3]),
    "C": _c,
    "pytun": functools.partial(_package, "python-pytun"),
    **{name: functools.partial(_package, name) for name in ("pytun-pmd3", "scapy", "asyncssh")},
    "tun-rs": lambda: _building.rust(FOLDER / "rust", SOURCES / "rust", "tun-rs", "tokio"),
    "water": functools.partial(_go, "github.com/songgao/water"),
    "wireguard-go": functools.partial(_go, "golang.zx2c4.com/wireguard"),
    "smoltcp": stacks.smoltcp,
    "lwIP": _lwip,
}
