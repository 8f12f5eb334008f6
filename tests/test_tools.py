"""Errors of the Makefile: one line that says what is missing, before anything is installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import ROOT, need


def make(target: str, python: str) -> subprocess.CompletedProcess[str]:
    program = need("make")
    # Remove the variables of an outer make that runs the tests.
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        [program, "-C", str(ROOT), target, f"PYTHON={python}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
    )


def find(
    *args: str, script: str | Path = ROOT / "tools" / "python.sh", **env: str
) -> subprocess.CompletedProcess[str]:
    base = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    return subprocess.run(
        ["/bin/sh", str(script), *args],
        env={**base, **env},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no '"),
        ("echo is Python 3.9, and aiotun needs 3.11 or newer; exit 1", "needs 3.11 or newer"),
        ("echo has no venv module; exit 1", "has no venv module"),
    ],
)
@pytest.mark.parametrize("target", ["demo", "test"])
def test_an_unusable_python_is_one_line(
    target: str, script: str | None, said: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    done = make(target, str(python))
    assert done.returncode == 2  # make's exit status if a target fails
    first, *others = done.stderr.splitlines()
    assert first.startswith("aiotun: ")
    assert said in first
    assert len(others) == 1
    assert others[0].startswith("make")


def test_the_named_python_is_used() -> None:
    done = find(PYTHON=sys.executable)
    assert done.stdout == f"{sys.executable}\n"


def test_what_only_looks_like_a_python_is_passed_over(tmp_path: Path) -> None:
    # As pyenv's shims do for a version that is not enabled.
    for name in ("python3", "python3.12"):
        (tmp_path / name).write_text("#!/bin/sh\necho command not found >&2\nexit 127\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python3.13").symlink_to(sys.executable)
    (tmp_path / "tail").symlink_to(shutil.which("tail") or "")
    # Away from the Pythons that tools/newer_pythons.sh may have put into this checkout.
    script = shutil.copy(ROOT / "tools" / "python.sh", tmp_path)
    done = find("--all", script=script, PATH=str(tmp_path), PYENV_ROOT=str(tmp_path / "none"))
    assert len(done.stdout.splitlines()) == 1
    (tmp_path / "python3.13").unlink()
    done = find(script=script, PATH=str(tmp_path), PYENV_ROOT=str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.startswith("aiotun: no Python 3.11 or newer here")
    assert done.stderr.count("\n") == 1


def test_the_newer_pythons_of_a_checkout_are_found(tmp_path: Path) -> None:
    for folder in ("tools", ".pythons/usr/bin"):
        (tmp_path / folder).mkdir(parents=True)
    script = shutil.copy(ROOT / "tools" / "python.sh", tmp_path / "tools")
    python = tmp_path / ".pythons/usr/bin/python3.99"
    python.write_text(f"#!/bin/sh\necho 3.99 {python}\n")
    python.chmod(0o755)
    (tmp_path / "tail").symlink_to(shutil.which("tail") or "")
    done = find("--all", script=script, PATH=str(tmp_path), PYENV_ROOT=str(tmp_path / "none"))
    assert [Path(line).resolve() for line in done.stdout.splitlines()] == [python]


def test_each_linter_of_make_lint_has_a_hook() -> None:
    """Compares text, because the tests have no YAML parser."""
    (linters,) = re.findall(r"\$\{\*:-(.+)\}", (ROOT / "tools" / "lint.sh").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: make lint ARGS=(\w+)", hooks) == linters.split()


def test_an_unknown_linter_is_one_line() -> None:
    command = ["/bin/sh", str(ROOT / "tools" / "lint.sh"), "pylint"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "aiotun: unknown linter 'pylint'; ruff, mypy and pyright are known\n"


FAKE_PYTHON = """#!/bin/sh
# A Python whose pip fails where there is a file "offline"; tells in "log" what it was asked to do.
case "$*" in
    -V) echo Python 3.99 ;;
    *venv*) echo make >>log; rm -rf env; mkdir -p env/bin; cp "$0" env/bin/python ;;
    *pip*--group*) if [ -e offline ]; then echo ERROR: offline; exit 1; fi; echo install >>log ;;
esac
"""


def test_an_environment_is_made_once_and_again_after_a_change(tmp_path: Path) -> None:
    (tmp_path / "src/aiotun/_packets").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "src/aiotun/_packets/_speedups.c", "log"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def venv(group: str) -> tuple[int, str, list[str]]:
        """Return the exit status, stderr, and the log of what was done."""
        (tmp_path / "log").write_text("")
        command = ["/bin/sh", str(ROOT / "tools" / "venv.sh"), "env", str(python), group]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stderr, (tmp_path / "log").read_text().split()

    (tmp_path / "offline").touch()
    status, said, did = venv("test")
    assert (status, said.count("\n"), did) == (1, 1, ["make"])
    assert "is there a network? (ERROR: offline;" in said
    (tmp_path / "offline").unlink()
    assert venv("test") == (0, "", ["install"])
    assert venv("test") == (0, "", [])
    assert venv("dev") == (0, "", ["install"])
    assert venv("none") == (0, "", [])
    (tmp_path / "setup.py").write_text("changed")
    assert venv("test") == (0, "", ["make", "install"])


RELEASE = ROOT / "tools" / "release.py"


def release(folder: Path) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, str(RELEASE), str(folder)], capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_what_is_left_before_a_release_is_a_line_each(tmp_path: Path) -> None:
    workflow = tmp_path / ".github" / "workflows" / "ci.yml"
    workflow.parent.mkdir(parents=True)
    project, changelog = tmp_path / "pyproject.toml", tmp_path / "CHANGELOG.md"
    project.write_text('[project]\nversion = "1.0.dev0"\nurls = "https://aiotun.example/docs"\n')
    changelog.write_text("## [1.0] - unreleased\n")
    workflow.write_text(
        "container:\n  image: debian:bookworm # a tag\n"
        "steps:\n  - uses: actions/checkout@v4\n  - uses: a/b@" + "0" * 40 + " # v1\n"
    )
    status, lines = release(tmp_path)
    assert status == 1
    assert [line.partition(":")[0] for line in lines] == [
        "pyproject.toml",
        "pyproject.toml",
        "CHANGELOG.md",
        ".github/workflows/ci.yml",
        ".github/workflows/ci.yml",
    ]
    assert "debian:bookworm by its digest" in lines[3]
    assert "actions/checkout@v4 by its commit" in lines[4]

    project.write_text('[project]\nversion = "1.0"\n')
    changelog.write_text("## [1.0] - 2030-01-01\n")
    workflow.write_text("container: debian:bookworm@sha256:" + "0" * 64 + "\n")
    assert release(tmp_path) == (0, ["nothing is left to be done before a release"])


def test_this_checkout_pins_its_actions_and_says_how_to_pin_the_container() -> None:
    if not (ROOT / ".github").exists():
        pytest.skip("not in an sdist")
    _, lines = release(ROOT)
    assert [line for line in lines if "pin the action" in line] == []
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "@sha256:" in ci
