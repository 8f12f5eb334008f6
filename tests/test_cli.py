"""The `aiotun` command's arguments; what the demo does is in tests/integration/test_demo.py."""

import subprocess
import sys

import pytest

from aiotun import cli


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
        (["demo", "--count", "0"], "a whole number above 0"),
        (["demo", "--count", "many"], "a whole number above 0"),
    ],
)
def test_invalid_usage_exits_with_2(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exits:
        cli.main(args)
    assert exits.value.code == 2
    assert said in capsys.readouterr().err


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
