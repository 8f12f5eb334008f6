"""Downloads and builds the other libraries in `benchmarks/build/peers`. None of it is committed.

Each peer is installed in its newest version with the package manager of its language. A peer that
can't be installed is skipped, and the report says why.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from .._harness import HERE

SOURCES = HERE / "peers" / "programs"
BUILD = HERE / "build" / "peers"
PYTHON = BUILD / "venv" / "bin" / "python"
STATE = BUILD / "installed.json"
MINUTES = 10  # for one step

PACKAGES = {
    "pytun": "python-pytun",
    "pytun-pmd3": "pytun-pmd3",
    "scapy": "scapy",
    "asyncssh": "asyncssh",
}


class MissingPeerError(Exception):
    """A peer can't be installed. The text is the reason, in one line."""


@dataclass(frozen=True)
class Installed:
    """An installed peer with its version, or the reason why it is not installed."""

    version: str = ""
    missing: str = ""


def install() -> dict[str, Installed]:
    """Install all peers that are missing. The first time needs minutes and a network."""
    BUILD.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], Mapping[str, str]]] = {
        "C": _c,
        **{name: _package(name, package) for name, package in PACKAGES.items()},
        "tun-rs": _rust,
        "Go": _go,
    }
    found: dict[str, Installed] = {"aiotun": Installed(metadata.version("aiotun"))}
    found["add_reader"] = Installed("Python {}.{}.{}".format(*sys.version_info[:3]))
    for name, step in steps.items():
        try:
            found |= {peer: Installed(version) for peer, version in step().items()}
        except MissingPeerError as error:
            for peer in ("water", "wireguard-go") if name == "Go" else (name,):
                found[peer] = Installed(missing=str(error))
    STATE.write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1))
    return found


def installed() -> dict[str, Installed]:
    """Return what `install` returned before, without a network."""
    return {name: Installed(**each) for name, each in json.loads(STATE.read_text()).items()}


def _run(command: Sequence[str], folder: Path = BUILD, **environment: str) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MissingPeerError(f"{command[0]} took more than {MINUTES} minutes") from None
    except OSError as error:
        raise MissingPeerError(f"{command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise MissingPeerError(f"{Path(command[0]).name} {command[1]}: {said.strip()}")
    return done.stdout.strip()


def _tool(name: str, *places: str) -> str:
    """Find a program on PATH, or where its installer puts it."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(os.path.expanduser, places)])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingPeerError(f"{name} is not installed")
    return found


def _is_newer(output: Path, source: Path) -> bool:
    files = [path for path in source.rglob("*") if path.is_file()] or [source]
    return output.exists() and output.stat().st_mtime > max(f.stat().st_mtime for f in files)


def _copied(language: str) -> Path:
    """Copy the sources of a language, because its build writes files into their folder."""
    return Path(shutil.copytree(SOURCES / language, BUILD / language, dirs_exist_ok=True))


def _c() -> Mapping[str, str]:
    compiler = os.environ.get("CC", "cc").split()
    _tool(compiler[0])
    for name in ("peer", "sender"):
        source = SOURCES / f"{name}.c"
        if not _is_newer(BUILD / name, source):
            _run([*compiler, "-O2", "-o", str(BUILD / name), str(source)])
    return {"C": _run([*compiler, "--version"]).splitlines()[0]}


def _package(name: str, package: str) -> Callable[[], Mapping[str, str]]:
    def step() -> Mapping[str, str]:
        if not PYTHON.exists():
            _run([sys.executable, "-m", "venv", "--clear", str(PYTHON.parent.parent)])
        code = f"from importlib import metadata; print(metadata.version({package!r}))"
        try:
            return {name: _run([str(PYTHON), "-c", code])}
        except MissingPeerError:
            _run([str(PYTHON), "-m", "pip", "install", "-q", "--no-input", package])
            return {name: _run([str(PYTHON), "-c", code])}

    return step


def _rust() -> Mapping[str, str]:
    cargo = _tool("cargo", "~/.cargo/bin")
    binary = BUILD / "rust" / "target" / "release" / "peer"
    # cargo looks for rustc on PATH.
    path = os.pathsep.join([str(Path(cargo).parent), os.environ.get("PATH", "")])
    if not _is_newer(binary, SOURCES / "rust"):
        _run([cargo, "build", "--release", "--quiet"], _copied("rust"), PATH=path)
        binary.touch()
    locked = tomllib.loads((BUILD / "rust" / "Cargo.lock").read_text())["package"]
    versions = {each["name"]: each["version"] for each in locked}
    return {"tun-rs": f"{versions['tun-rs']}, tokio {versions['tokio']}"}


def _go() -> Mapping[str, str]:
    go = _tool("go", "/usr/local/go/bin", "/usr/lib/go/bin")
    binary = BUILD / "go" / "peer"
    if not _is_newer(binary, SOURCES / "go"):
        folder = _copied("go")
        _run([go, "mod", "tidy"], folder)
        _run([go, "build", "-o", "peer", "."], folder)
        binary.touch()
    versions = {}
    for name, module in {
        "water": "github.com/songgao/water",
        "wireguard-go": "golang.zx2c4.com/wireguard",
    }.items():
        version = _run([go, "list", "-m", "-f", "{{.Version}}", module], BUILD / "go")
        # A module without a version number has v0.0.0-DATE-COMMIT.
        versions[name] = version.removeprefix("v0.0.0-").split("-")[0][:8]
    return versions
