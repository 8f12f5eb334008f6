"""Debian's kernels: which there are, and what a guest needs of one."""

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..helpers import ROOT

__all__ = ["NEWEST", "SUITES", "FetchError", "Kernel", "fetch", "fetch_user_mode"]

NEWEST = "newest"
# The releases of Debian that have these kernels. "newest" is what unstable has.
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", NEWEST: "unstable"}

_FOLDER = ROOT / ".foreign" / "kernels"


class FetchError(Exception):
    """A kernel could not be fetched; the text says why."""


@dataclass(frozen=True)
class Kernel:
    """A kernel for a guest.

    Attributes:
        release: as `uname -r` says it.
        image: what QEMU boots, or a program.
        modules: the folder whose `usr/lib/modules` has the kernel's modules, and what modprobe
            reads.
        user_mode: whether it is a program.
    """

    release: str
    image: Path
    modules: Path
    user_mode: bool = False


def fetch(version: str, architecture: str = "amd64") -> Kernel:
    """Download a kernel for virtual machines, or find the one of an earlier download.

    Args:
        version: a key of SUITES.
        architecture: as Debian calls it.

    Raises:
        FetchError: it is unknown, or can't be fetched.
    """
    folder = _FOLDER / architecture / version
    if not (folder / "complete").exists():
        _download(folder, _suite(version), architecture)
    (modules,) = (folder / "tree/usr/lib/modules").iterdir()
    images = [*folder.glob("tree/boot/vmlinuz-*"), *modules.glob("vmlinuz")]
    return Kernel(modules.name, images[0], folder / "tree")


def fetch_user_mode(version: str) -> Kernel:
    """Download a kernel that runs as a program, or find the one of an earlier download.

    Args:
        version: a key of SUITES.

    Raises:
        FetchError: it is unknown, or can't be fetched.
    """
    folder = _FOLDER / "user-mode" / version
    tree = folder / "tree"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _debian(folder, _suite(version), "amd64", "apt-get", "download", "user-mode-linux")
        _unpack(folder, tree)
        (tree / "usr/lib/uml/modules").rename(tree / "usr/lib/modules")
        (modules,) = (tree / "usr/lib/modules").iterdir()
        _depmod(tree, modules.name)
        (folder / "complete").touch()
    (modules,) = (tree / "usr/lib/modules").iterdir()
    return Kernel(modules.name, tree / "usr/bin/linux.uml", tree, user_mode=True)


def _suite(version: str) -> str:
    if version not in SUITES:
        raise FetchError(f"no kernel {version!r} is known; there are {', '.join(SUITES)}")
    return SUITES[version]


def _download(folder: Path, suite: str, architecture: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    debian = functools.partial(_debian, folder, suite, architecture)
    found = debian(
        "apt-cache", "search", "--names-only", rf"^linux-image-[0-9].*-cloud-{architecture}$"
    )
    names = sorted((line.split()[0] for line in found.splitlines()), key=_numbers)
    if not names:
        raise FetchError(f"Debian's {suite} has no kernel for virtual machines")
    # From Linux 7 on, Debian's package is empty and depends on three others.
    release = names[-1].removeprefix("linux-image-")
    parts = [f"linux-{part}-{release}" for part in ("base", "image", "binary", "modules")]
    depends = debian("apt-cache", "depends", names[-1])
    debian(
        "apt-get", "download", *(part for part in parts if part in (names[-1], *depends.split()))
    )
    tree = folder / "tree"
    _unpack(folder, tree)
    _depmod(tree, release)
    (folder / "complete").touch()


def _unpack(folder: Path, tree: Path) -> None:
    """Unpack the packages in a folder, and remove them."""
    (tree / "usr/lib").mkdir(parents=True, exist_ok=True)
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    for package in folder.glob("*.deb"):
        unpacked = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=subprocess.PIPE
        )
        tar = ["tar", "-x", "-C", str(tree), "--keep-directory-symlink", "--no-same-owner"]
        subprocess.run([*tar, "--exclude=./usr/share"], input=unpacked.stdout, check=True)
        package.unlink()


def _depmod(tree: Path, release: str) -> None:
    """Write what modprobe reads."""
    depmod = ["depmod", "-b", str(tree), release]
    try:
        subprocess.run(depmod, check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    except FileNotFoundError as error:
        raise FetchError("depmod is missing; install kmod") from error


def _numbers(name: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", name)]


def _debian(folder: Path, suite: str, architecture: str, *command: str) -> str:
    script = [str(ROOT / "tools/debian.sh"), str(folder / "apt"), suite, architecture]
    done = subprocess.run([*script, *command], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise FetchError(f"{' '.join(command[:2])} failed for {suite}: {said[-1]}")
    return done.stdout
