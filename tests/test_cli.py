"""The `aiotun` command's arguments; what the demo does is in tests/integration/test_demo.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiotun import cli
from aiotun._cli import arguments

from .helpers import ROOT, need


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exits:
        cli.main(["--version"])
    assert exits.value.code == 0
    assert capsys.readouterr().out.startswith("aiotun 0.")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "required: COMMAND"),
        (["sing"], "invalid choice"),
        (["--frob"], "unrecognized arguments: --frob; see 'aiotun --help'"),
        (["--frob", "doctor"], "unrecognized arguments: --frob; see 'aiotun --help'"),
        (["doctor", "--frob"], "unrecognized arguments: --frob; see 'aiotun doctor --help'"),
        (["show", "-d"], "unrecognized arguments: -d; see 'aiotun "),
        (["dump", "tun0", "icmp"], "unrecognized arguments: icmp; see 'aiotun dump --help'"),
        (["help", "sing"], "invalid choice"),
        (["help", "sing"], "; see 'aiotun --help'"),
        (["demo", "--count", "0"], "a whole number above 0"),
        (["demo", "--count", "many"], "a whole number above 0"),
        (["run", "--seed", "x", "--", "true"], "argument --seed: must be a whole number"),
        (["run", "--delay", "50ms", "--", "true"], "must be milliseconds without a unit"),
    ],
)
def test_invalid_usage_exits_with_2(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exits:
        cli.main(args)
    assert exits.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "demo", "networkd", "help"])
def test_help_prints_the_help_of_a_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["help", *command.split()]) == 0
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert said == capsys.readouterr().out
    assert said.startswith(f"usage: aiotun {command}".strip())


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("venv/bin/aiotun", "{folder}/venv/bin/aiotun dump eth0"),
        ("my venv/bin/aiotun", "'{folder}/my venv/bin/aiotun' dump eth0"),
        ("aiotun/__main__.py", f"{sys.executable} -m aiotun dump eth0"),
    ],
)
def test_root_gets_the_whole_path_of_a_command_that_sudo_does_not_find(
    started: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / started
    path.parent.mkdir(parents=True)
    path.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(path)])
    for uid, sudo in ((0, ""), (1000, "sudo ")):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert arguments.as_root("dump eth0") == sudo + expected.format(folder=tmp_path)


def test_sudo_finds_a_command_in_usr_bin_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/aiotun"])
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert arguments.as_root("dump eth0") == "sudo aiotun dump eth0"


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the wheel's tests have no docs")
def test_the_man_page_says_what_the_help_says() -> None:
    """After a change of the command's texts, run `make man`."""
    command = [sys.executable, str(ROOT / "tools" / "manual.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "aiotun.8").read_text() == made
    assert "aiotun networkd" in made


def test_the_man_page_has_no_warnings() -> None:
    done = subprocess.run(
        [need("groff"), "-man", "-Tutf8", "-ww", str(ROOT / "docs" / "aiotun.8")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_ctrl_c_while_it_is_loaded() -> None:
    """There is no traceback. Python's own startup, before that, can't be caught."""
    code = (
        "import sys\n"
        "from aiotun.__main__ import main\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'aiotun.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("command", ["doctor", "networkd tun0", "help"])
def test_output_that_cannot_be_written_is_one_line(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aiotun", *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "aiotun: the output can't be written: No space left on device\n"


def test_doctor_without_stdout_has_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m aiotun doctor >&-"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.stderr == ""
