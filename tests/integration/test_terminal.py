"""Every command in a terminal and in a pipe.

The tests of `dump` and `doctor` have what is special about them.
"""

import json
import signal

import pytest

from ..commandline import Running, in_terminal, piped
from ..helpers import udp_burst
from .kernel import make

AT_ONCE = ["list", "list --json", "add mode tun", "del old0", "doctor", "doctor --json"]
ALL = [*AT_ONCE, "demo --count 1", "dump --new new0 --address 10.9.0.1/24 --count 1"]


def end(command: Running) -> int:
    """Send `dump` a packet, and let each command end."""
    if "dump" in str(command.process.args):
        command.read_until("Ctrl-C", err=True)
        udp_burst("10.9.0.2", 9, 1)
    return command.end()


@pytest.fixture(autouse=True)
def device() -> None:
    make("old0")


@pytest.mark.parametrize("line", ALL)
def test_no_colors_in_a_pipe(line: str) -> None:
    with piped(*line.split()) as command:
        assert end(command) == 0
    assert "\x1b" not in command.out + command.err
    assert "\r" not in command.out


@pytest.mark.parametrize("line", ALL)
def test_no_color_switches_colors_off(line: str) -> None:
    with in_terminal(*line.split(), env={"NO_COLOR": "1"}) as command:
        assert end(command) == 0
    assert "\x1b" not in command.out


@pytest.mark.parametrize("line", ALL)
def test_only_doctor_and_dump_print_colors_in_a_terminal(line: str) -> None:
    with in_terminal(*line.split()) as command:
        assert end(command) == 0
    coloured = line in ("doctor", ALL[-1])
    assert ("\x1b[" in command.out) == coloured


@pytest.mark.parametrize("line", ["list --json", "doctor --json"])
def test_json_is_json_in_both(line: str) -> None:
    with piped(*line.split()) as command:
        assert command.end() == 0
    with in_terminal(*line.split()) as other:
        assert other.end() == 0
    assert json.loads(command.out) == json.loads(other.out)


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_come_while_it_goes_on(terminal: bool) -> None:
    with (in_terminal if terminal else piped)("demo", "--count", "1000") as command:
        command.read_until("seq 1:")
        command.read_until("seq 2:")
        assert "received" not in command.out
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130


@pytest.mark.parametrize("line", AT_ONCE)
def test_a_reader_that_leaves(line: str) -> None:
    """The command ends quietly, whether it has printed anything or not."""
    with piped(*line.split()) as command:
        assert command.process.stdout is not None
        command.process.stdout.close()
        command.out_fd = -1
        assert command.end() == (0 if line == "del old0" else 1)
    assert command.err == ""


@pytest.mark.parametrize(
    "line",
    [
        "",
        "sing",
        "demo --count 0",
        "demo 5",
        "list one two",
        "add tun7",
        "del",
        "dump",
        "dump lo --count x",
        "doctor now",
        "doctor --what",
        "--what",
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_wrong_arguments_are_2_and_one_line(line: str, terminal: bool) -> None:
    with (in_terminal if terminal else piped)(*line.split()) as command:
        assert command.end() == 2
    said = command.out if terminal else command.err
    assert said.startswith("aiotun: ")
    assert len(said.splitlines()) == 1
    assert terminal or command.out == ""
