"""What pip makes of the sources, with a C compiler and without."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .helpers import ROOT

FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def wheel(tmp_path: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Build a wheel of a copy of the sources: what was said, the name of the wheel, its files."""
    source, target = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source)
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
    return "aiotun/_speedups.abi3.so" in found


@pytest.mark.parametrize("choice", ["", "require"])
def test_with_a_compiler(tmp_path: Path, choice: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("missing: cc(1); install gcc")
    done, found = wheel(tmp_path, AIOTUN_SPEEDUPS=choice)
    assert has_c_module(found), done.stderr
    assert "-cp311-abi3-linux_" in found[0]
    assert {"aiotun/py.typed", "aiotun/_speedups.pyi"} <= set(found)


def test_without_a_compiler(tmp_path: Path) -> None:
    """It is left out, and the rest is there."""
    done, found = wheel(tmp_path, CC="/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    assert not has_c_module(found)
    assert "aiotun/queue.py" in found


def test_without_a_compiler_where_it_is_required(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, CC="/nonexistent/cc", AIOTUN_SPEEDUPS="require")
    assert done.returncode != 0
    assert found == []


def test_where_it_is_forbidden(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, AIOTUN_SPEEDUPS="forbid")
    assert found, done.stderr
    assert not has_c_module(found)
    assert found[0].endswith("-py3-none-any.whl")


def test_another_word(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, AIOTUN_SPEEDUPS="perhaps")
    assert found == []
    assert (
        "AIOTUN_SPEEDUPS is 'perhaps'; it may be 'require' or 'forbid'" in done.stderr + done.stdout
    )
