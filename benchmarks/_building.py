"""Fetches and builds what aiotun is compared with, in `benchmarks/build`. None of it is committed.

Each is installed in its newest version with the package manager of its language. What can't be
installed is skipped, and the report says why.
"""

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ._harness import HERE

BUILD = HERE / "build"
MINUTES = 15  # for one step
NICE = ("nice", "-n", "10")
BUILT = "built"  # an empty file that says so


class MissingPeerError(Exception):
    """A peer can't be installed. The text is the reason, in one line."""


@dataclass(frozen=True)
class Installed:
    """An installed peer with its version, or the reason why it is not installed."""

    version: str = ""
    missing: str = ""


def install(state: Path, steps: Mapping[str, Callable[[], str]]) -> None:
    """Install all peers that are missing. The first time needs minutes and a network.

    Each step installs one peer and returns its version, or raises MissingPeerError. The file
    `state` stores what was found, because the benchmarks then run without a network.
    """
    found = {}
    state.parent.mkdir(parents=True, exist_ok=True)
    for name, step in steps.items():
        try:
            found[name] = Installed(step())
        except MissingPeerError as error:
            found[name] = Installed(missing=str(error))
    state.write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1))


def installed(state: Path) -> dict[str, Installed]:
    """Return what `install` stored."""
    return {name: Installed(**each) for name, each in json.loads(state.read_text()).items()}


def run(command: Sequence[str], folder: Path = BUILD, **environment: str) -> str:
    """Run a command of a step; return its output."""
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


def tool(name: str, *places: str) -> str:
    """Find a program on PATH, or where its installer puts it."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(os.path.expanduser, places)])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingPeerError(f"{name} is not installed")
    return found


def is_newer(output: Path, source: Path) -> bool:
    files = [path for path in source.rglob("*") if path.is_file()] or [source]
    return output.exists() and output.stat().st_mtime > max(f.stat().st_mtime for f in files)


def c(output: Path, source: Path, *options: str) -> str:
    """Compile a C program; return the compiler's version."""
    compiler = os.environ.get("CC", "cc").split()
    tool(compiler[0])
    if not is_newer(output, source):
        run([*compiler, "-O2", "-o", str(output), str(source), *options])
    return run([*compiler, "--version"]).splitlines()[0]


def rust(folder: Path, sources: Path, *packages: str) -> str:
    """Build a crate in a folder; return the versions of these packages."""
    built = folder / BUILT
    if not is_newer(built, sources):
        shutil.copytree(sources, folder, dirs_exist_ok=True)
        cargo("build", "--release", "--quiet", folder=folder)
        built.touch()
    locked = tomllib.loads((folder / "Cargo.lock").read_text())["package"]
    versions = {each["name"]: each["version"] for each in locked}
    return ", ".join([versions[packages[0]], *(f"{p} {versions[p]}" for p in packages[1:])])


def cargo(*words: str, folder: Path = BUILD) -> str:
    program = tool("cargo", "~/.cargo/bin")
    # cargo looks for rustc on PATH.
    path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
    return run([*NICE, program, *words], folder, PATH=path)


def go(folder: Path, sources: Path, builds: Sequence[str], module: str, first: str = "") -> str:
    """Build the packages `builds` of a Go module in a folder; return the version of `module`.

    If a module is named as `first`, its newest version decides on the versions of the others.
    """
    program = tool("go", "/usr/local/go/bin", "/usr/lib/go/bin")
    built = folder / BUILT
    if not is_newer(built, sources):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sources, folder)
        if first:
            run([*NICE, program, "get", f"{first}@latest"], folder)
        run([*NICE, program, "mod", "tidy"], folder)
        run([*NICE, program, "build", "-o", f"{folder / 'bin'}/", *builds], folder)
        built.touch()
    version = run([program, "list", "-m", "-f", "{{.Version}}", module], folder)
    # A module without a version number has v0.0.0-DATE-COMMIT.
    return version.removeprefix("v0.0.0-").split("-")[0][:8]


def debian(package: str, program: str) -> str:
    """Return the version of a Debian package. Nothing is installed: that would need root."""
    if shutil.which(program) is None:
        raise MissingPeerError(f"{program} is not installed; Debian's package is {package}")
    try:
        return run(["dpkg-query", "-W", "-f", "${Version}", package])
    except MissingPeerError:
        return run([program, "--version"]).splitlines()[0]
