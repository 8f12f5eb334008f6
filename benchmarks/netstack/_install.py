"""Downloads and builds the other stacks in `benchmarks/build/netstack`; none of it is committed.

A stack that can't be built is skipped, and the report says why.
"""

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from .._harness import HERE
from ..peers._install import Installed, MissingPeerError, _is_newer, _run, _tool

SOURCES = HERE / "netstack" / "programs"
BUILD = HERE / "build" / "netstack"
STATE = BUILD / "installed.json"
NICE = ("nice", "-n", "10")

GO, RUST = BUILD / "go" / "stack", BUILD / "rust" / "target" / "release" / "stack"
LWIP = BUILD / "lwip"


def install() -> dict[str, Installed]:
    """Build all stacks that are missing. The first time needs minutes and a network."""
    BUILD.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], str]] = {"gVisor": _gvisor, "smoltcp": _smoltcp, "lwIP": _lwip}
    found = {"aiotun": Installed(metadata.version("aiotun"))}
    for name, step in steps.items():
        try:
            found[name] = Installed(step())
        except MissingPeerError as error:
            found[name] = Installed(missing=str(error))
    STATE.write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1))
    return found


def installed() -> dict[str, Installed]:
    """Return what `install` returned before, without a network."""
    return {name: Installed(**each) for name, each in json.loads(STATE.read_text()).items()}


def _copied(language: str) -> Path:
    """Copy the sources of a language, because its build writes files into their folder."""
    return Path(shutil.copytree(SOURCES / language, BUILD / language, dirs_exist_ok=True))


def _gvisor() -> str:
    """The version that the newest wireguard-go requires; gVisor's newest may not build alone."""
    go = _tool("go", "/usr/local/go/bin", "/usr/lib/go/bin")
    if not _is_newer(GO, SOURCES / "go"):
        folder = _copied("go")
        for words in (["get", "golang.zx2c4.com/wireguard@latest"], ["mod", "tidy"]):
            _run([*NICE, go, *words], folder)
        _run([*NICE, go, "build", "-o", GO.name, "."], folder)
        GO.touch()
    version = _run([go, "list", "-m", "-f", "{{.Version}}", "gvisor.dev/gvisor"], GO.parent)
    # A module without a version number has v0.0.0-DATE-COMMIT.
    return version.removeprefix("v0.0.0-").split("-")[0][:8]


def _smoltcp() -> str:
    cargo = _tool("cargo", "~/.cargo/bin")
    if not _is_newer(RUST, SOURCES / "rust"):
        # cargo looks for rustc on PATH.
        path = os.pathsep.join([str(Path(cargo).parent), os.environ.get("PATH", "")])
        _run([*NICE, cargo, "build", "--release", "--quiet"], _copied("rust"), PATH=path)
        RUST.touch()
    locked = tomllib.loads((BUILD / "rust" / "Cargo.lock").read_text())["package"]
    return next(str(each["version"]) for each in locked if each["name"] == "smoltcp")


def _lwip() -> str:
    """Debian's library, called from Python as `examples/lwip_host` does."""
    headers = Path("/usr/include/lwip/lwip/init.h")
    if not headers.exists():
        raise MissingPeerError("liblwip-dev is not installed")
    builder = HERE.parent / "examples" / "lwip_host" / "build.py"
    if not any(LWIP.glob("_lwip*.so")):
        LWIP.mkdir(exist_ok=True)
        _run([*NICE, sys.executable, str(builder), str(LWIP)], LWIP)
    words = [line.split() for line in headers.read_text().splitlines()]
    numbers = {line[1]: line[2] for line in words if len(line) == 3 and line[0] == "#define"}
    return ".".join(numbers[f"LWIP_VERSION_{part}"] for part in ("MAJOR", "MINOR", "REVISION"))
