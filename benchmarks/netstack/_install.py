"""The steps that install the other stacks and programs; see `benchmarks._building`."""

import functools
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from .. import _building
from .._building import BUILD, MissingPeerError
from .._harness import HERE

SOURCES = HERE / "netstack" / "programs"
FOLDER = BUILD / "netstack"
GO, RUST = FOLDER / "go" / "bin", FOLDER / "rust" / "target" / "release"
LWIP = FOLDER / "lwip"
TUN2PROXY = FOLDER / "bin" / "tun2proxy-bin"
WIREGUARD = "golang.zx2c4.com/wireguard"


def _go(module: str) -> str:
    """The newest wireguard-go decides on the version of gVisor, whose newest may not build."""
    builds = ["./stack", "./proxy", WIREGUARD]
    return _building.go(FOLDER / "go", SOURCES / "go", builds, module, WIREGUARD)


def smoltcp() -> str:
    return _building.rust(FOLDER / "rust", SOURCES / "rust", "smoltcp")


def lwip() -> str:
    """The version of Debian's library."""
    header = Path("/usr/include/lwip/lwip/init.h")
    if not header.exists():
        raise MissingPeerError("liblwip-dev is not installed")
    words = [line.split() for line in header.read_text().splitlines()]
    numbers = {line[1]: line[2] for line in words if len(line) == 3 and line[0] == "#define"}
    return ".".join(numbers[f"LWIP_VERSION_{part}"] for part in ("MAJOR", "MINOR", "REVISION"))


def _lwip() -> str:
    """lwIP, called from Python as `examples/lwip_host` does."""
    version = lwip()
    builder = HERE.parent / "examples" / "lwip_host" / "build.py"
    if not any(LWIP.glob("_lwip*.so")):
        LWIP.mkdir(exist_ok=True)
        _building.run([sys.executable, str(builder), str(LWIP)], LWIP)
    return version


def _tun2proxy() -> str:
    if not TUN2PROXY.exists():
        _building.cargo("install", "--quiet", "--locked", "--root", str(FOLDER), "tun2proxy")
    return _building.run([str(TUN2PROXY), "--version"]).split()[1]


STEPS: dict[str, Callable[[], str]] = {
    "aiotun": lambda: metadata.version("aiotun"),
    "gVisor": functools.partial(_go, "gvisor.dev/gvisor"),
    "wireguard-go": functools.partial(_go, WIREGUARD),
    "smoltcp": smoltcp,
    "lwIP": _lwip,
    "pasta": functools.partial(_building.debian, "passt", "pasta"),
    "slirp4netns": functools.partial(_building.debian, "slirp4netns", "slirp4netns"),
    "tun2proxy": _tun2proxy,
}
