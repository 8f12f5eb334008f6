"""What pip builds with a C compiler and without one; the contents of an sdist; versions."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import aiotun

from .helpers import ROOT, need

FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "docs/aiotun.8")
# Files of the repository that only git and CI use.
NOT_FOR_USERS = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
# Files that setuptools adds to each sdist.
WRITTEN = ("PKG-INFO", "setup.cfg", "src/aiotun.egg-info/")


def wheel(tmp_path: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Build a wheel from a copy of the sources; return the output, and its name and files."""
    source, target = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    (source / "docs").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    ours = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ours)
    base = {key: value for key, value in os.environ.items() if key != "AIOTUN_SPEEDUPS"}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(target), str(source)],
        env={**base, **env},
        capture_output=True,
        text=True,
    )
    found: list[str] = []
    for path in target.glob("*.whl"):
        found = [path.name, *zipfile.ZipFile(path).namelist()]
    return done, found


def has_c_module(found: list[str]) -> bool:
    return "aiotun/_packets/_speedups.abi3.so" in found


@pytest.mark.parametrize("choice", ["", "require"])
def test_with_a_compiler_the_wheel_has_the_c_module(tmp_path: Path, choice: str) -> None:
    need("cc")
    done, found = wheel(tmp_path, AIOTUN_SPEEDUPS=choice)
    assert has_c_module(found), done.stderr
    assert "-cp311-abi3-linux_" in found[0]
    assert {"aiotun/py.typed", "aiotun/_packets/_speedups.pyi"} <= set(found)
    assert "aiotun/_packets/_speedups.c" not in found


def test_without_a_compiler_the_wheel_is_pure_python(tmp_path: Path) -> None:
    """The wheel has everything except the C module."""
    done, found = wheel(tmp_path, CC="/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    assert not has_c_module(found)
    assert "aiotun/queue.py" in found


def test_without_a_compiler_where_it_is_required(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, CC="/nonexistent/cc", AIOTUN_SPEEDUPS="require")
    assert done.returncode != 0
    assert found == []


def test_forbid_builds_a_pure_python_wheel(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, AIOTUN_SPEEDUPS="forbid")
    assert found, done.stderr
    assert not has_c_module(found)
    assert found[0].endswith("-py3-none-any.whl")


def test_an_unknown_aiotun_speedups_fails_the_build(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, AIOTUN_SPEEDUPS="perhaps")
    assert found == []
    assert (
        "AIOTUN_SPEEDUPS must be 'require', 'forbid' or unset, got 'perhaps'"
        in done.stderr + done.stdout
    )


def copied(source: Path) -> set[str]:
    """Copy the repository's files, or skip where this is none; return their names."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout, with git(1), of the repository")
    # git refuses a checkout of another user unless it is declared safe.
    command = [git, "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(
        [*command, "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    )
    tracked = {
        name
        for name in listed.stdout.split("\0")
        if name and not name.startswith(NOT_FOR_USERS) and (ROOT / name).exists()
    }
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return tracked


def sdist(source: Path, folder: Path, umask: int = -1) -> Path:
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, umask=umask)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("aiotun-*.tar.gz")
    return archive


def test_the_sdist_is_the_repository(tmp_path: Path) -> None:
    """A packager can build and test aiotun from the sdist: no file is missing or added."""
    source = tmp_path / "source"
    tracked = copied(source)
    # Files in a checkout that git does not track.
    (source / "src/aiotun/__pycache__").mkdir()
    for name in ("_speedups.abi3.so", "__pycache__/queue.cpython-311.pyc"):
        (source / "src/aiotun" / name).touch()
    archive = sdist(source, tmp_path)
    with tarfile.open(archive) as opened:
        names = {each.name.partition("/")[2] for each in opened if each.isfile()}
    assert {name for name in names if not name.startswith(WRITTEN)} == tracked


def test_the_index_page_has_only_absolute_links(tmp_path: Path) -> None:
    wheel(tmp_path, AIOTUN_SPEEDUPS="forbid")
    (path,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        (name,) = (each for each in opened.namelist() if each.endswith("/METADATA"))
        text = opened.read(name).decode()
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == len(re.findall(r"\]\(", readme)) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert re.search(r"!\[[^]]*\]\(https://[^)]*/raw/main/docs/images/where.svg\)", text)


def run_tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_an_sdist_does_not_depend_on_umask_times_and_order(tmp_path: Path) -> None:
    files = {"a/x.py": b"x", "a/run": b"#!", "a/b/y.py": b"y"}
    packed = []
    for number, names in enumerate((list(files), list(files)[::-1])):
        path = tmp_path / f"{number}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(files[name]), 1000 * number
                member.mode = (0o664, 0o600)[number] | (0o100 if name == "a/run" else 0)
                member.uid, member.uname = number, f"user{number}"
                archive.addfile(member, io.BytesIO(files[name]))
        assert run_tool("repack.py", path, 1_700_000_000).returncode == 0
        packed.append(path.read_bytes())
        with tarfile.open(path) as archive:
            assert {each.name: each.mode for each in archive} == {
                "a/x.py": 0o644,
                "a/run": 0o755,
                "a/b/y.py": 0o644,
            }
            assert {each.mtime for each in archive} == {1_700_000_000}
    assert packed[0] == packed[1]


def test_two_sdists_have_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the umask, the times of the files and the checkout's place are."""
    packed = []
    for number, umask in enumerate((0o022, 0o077)):
        source, folder = tmp_path / f"source{number}", tmp_path / f"dist{number}"
        folder.mkdir()
        for name in copied(source):
            os.utime(source / name, (1_600_000_000 + number,) * 2)
            (source / name).chmod((source / name).stat().st_mode & ~umask)
        archive = sdist(source, folder, umask)
        assert run_tool("repack.py", archive, 1_700_000_000).returncode == 0
        packed.append(archive.read_bytes())
    assert packed[0] == packed[1]


def test_a_search_path_and_a_path_of_this_machine_are_found(tmp_path: Path) -> None:
    (tmp_path / "c.c").touch()
    for name, options in (("good", []), ("bad", ["-Wl,-rpath,/opt/python/lib"])):
        command = [need("cc"), "-shared", *options, "-o", f"{name}.so", "c.c"]
        subprocess.run(command, cwd=tmp_path, check=True)
    for wheel_name, module, text in (
        ("good", "good.so", "hello"),
        ("bad", "bad.so", "hello"),
        ("named", "good.so", f"built in {ROOT}/src"),
    ):
        with zipfile.ZipFile(tmp_path / f"{wheel_name}.whl", "w") as opened:
            opened.write(tmp_path / module, "aiotun/module.so")
            opened.writestr("aiotun/text", text)
    good = run_tool("check_dist.py", tmp_path / "good.whl")
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    bad = run_tool("check_dist.py", *(tmp_path / f"{each}.whl" for each in ("bad", "named")))
    first, second = bad.stdout.splitlines()
    assert bad.returncode == 1
    assert first.startswith("bad.whl: aiotun/module.so has a search path: ")
    assert "/opt/python/lib" in first
    assert second == f"named.whl: aiotun/text names {ROOT}, a folder of this machine"


def test_package_pyproject_and_changelog_name_the_same_version() -> None:
    """The installed package has pyproject.toml's version, and the changelog a heading."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert aiotun.__version__ == version
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    release, dev, _ = version.partition(".dev")
    (ours,) = (each for each in headings if each.startswith(f"[{release}]"))
    date = "unreleased" if dev else r"20\d\d-\d\d-\d\d"
    assert re.fullmatch(rf"\[{re.escape(release)}\] - {date}", ours)


def test_a_misspelled_public_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'open_tub'"):
        aiotun.open_tub  # noqa: B018
