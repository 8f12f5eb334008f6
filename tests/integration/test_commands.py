"""`aiotun list`, `add` and `del`, as users type them, compared with `ip tuntap`."""

import json
import os
import subprocess
import sys

import pytest

from aiotun import cli
from aiotun._cli import terminal
from aiotun._kernel.abi import Iff

from ..helpers import ip, ordinary_python
from .kernel import ORDINARY, another_namespace, held, inside, link, make, names


class Said:
    """The outcome of a command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.lines = out.splitlines()
        self.err = err

    def refused(self, status: int, *words: str) -> None:
        """Assert that it failed with one line that has these words, and printed nothing else."""
        assert (self.status, self.lines) == (status, []), self.err
        assert self.err.startswith("aiotun: ")
        assert self.err.count("\n") == 1
        for word in words:
            assert word in self.err


class Command:
    """Runs the command in this process and thread, in the test's network namespace."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str) -> Said:
        status = cli.main(line.split())
        return Said(status, *self._capsys.readouterr())

    def done(self, line: str) -> list[str]:
        """Run a command that must succeed, and return its lines."""
        said = self(line)
        assert (said.status, said.err) == (0, "")
        return said.lines


CONTROLLING = "e\x1b[2J\x9b1m"  # as others may name a device: it clears the screen, writes bold


def test_interface_names_cannot_control_the_terminal(command: "Command") -> None:
    shown = "e\\x1b[2J\\x9b1m"
    assert command.done(f"add {CONTROLLING} mode tun") == []
    assert command.done("list") == [f"{shown}: tun persist"]
    assert json.loads("".join(command.done("list --json")))[0]["name"] == CONTROLLING
    for line, status in (
        (f"add {CONTROLLING} mode tun", 1),
        (f"add {CONTROLLING} mode {CONTROLLING}", 2),
        (f"del {CONTROLLING} mode tap", 1),
        (f"dump {CONTROLLING}x", 1),
    ):
        said = command(line)
        said.refused(status, shown)
        assert said.err[:-1].isprintable()
    command.done(f"del {CONTROLLING}")


def test_control_characters_are_shown_escaped() -> None:
    assert terminal.printable("a\udcff\x00\n\u202eb é") == "a\\xff\\x00\n\\u202eb é"
    assert terminal.paint("\x1b[1m", terminal.RED, True) == "\x1b[31m\\x1b[1m\x1b[0m"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def ip_tuntap() -> list[str]:
    """What `ip tuntap show` prints; it reads sysfs."""
    script = "mount -t sysfs sysfs /sys && exec ip tuntap show"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], check=True, capture_output=True, text=True
    )
    # `ip` shows IFF_NO_PI as 'filter', because both are the bit 0x1000.
    return sorted(line.replace(" filter", "") for line in done.stdout.splitlines())


class TestAdd:
    # Each as it is typed after `ip tuntap add` and after `aiotun add`.
    WORDS = (
        "dev NAME mode tun",
        "NAME mode tap",
        "mode tap name NAME",
        f"dev NAME mode tap user {ORDINARY}",
        f"dev NAME mode tun group {ORDINARY} user {ORDINARY}",
        "dev NAME mode tun user root group root",
        "multi_queue pi vnet_hdr mode tap dev NAME",
        "dev NAME mode tun vnet_hdr vnet_hdr",
    )

    @pytest.mark.parametrize("words", WORDS)
    def test_the_words_of_ip_tuntap(self, words: str, command: Command) -> None:
        """Both commands make the same device and describe it in the same words."""
        assert command.done(f"add {words.replace('NAME', 'dev7')}") == []
        ours, line = link("dev7")["linkinfo"], command.done("list")
        assert line == ip_tuntap()
        command.done("del dev7")
        ip("tuntap", "add", *words.replace("NAME", "dev7").split())
        assert link("dev7")["linkinfo"] == ours
        assert command.done("list") == line == ip_tuntap()

    def test_one_queue_is_accepted_and_has_no_effect(self, command: Command) -> None:
        """In the kernel this flag has no effect. ip(8) shows the flag; aiotun doesn't set it."""
        command.done("add tun7 mode tun one_queue")
        assert ip_tuntap() == ["tun7: tun persist"]

    def test_the_kernel_picks_the_name(self, command: Command) -> None:
        assert command.done("add mode tun") == ["tun0"]
        assert command.done("add mode tap user 0") == ["tap0"]
        assert command.done("add vpn%d mode tun") == ["vpn0"]
        assert names() == ["tap0", "tun0", "vpn0"]

    def test_into_another_namespace(self, command: Command) -> None:
        with another_namespace() as path:
            assert command.done(f"add mode tun netns {path}") == ["tun0"]
            assert names() == []
            assert command.done(f"list netns {path}") == ["tun0: tun persist"]
            assert command.done(f"list --json netns {path} dev tun0") != []
            command.done(f"del tun0 netns {path}")
            assert "tun0" not in inside(path, "ip", "-j", "link")

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("add", ["'mode tun' or 'mode tap'"]),
            ("add dev x", ["'mode tun' or 'mode tap'"]),
            ("add mode", ["'mode' needs 'tun' or 'tap' after it"]),
            ("add mode veth", ["'mode' must be 'tun' or 'tap', got 'veth'"]),
            ("add mode tun mode tap", ["'mode' is given twice"]),
            ("add x dev y mode tun", ["expected one device name", "'x' and 'y'"]),
            ("add name x dev y mode tun", ["expected one device name", "'x' and 'y'"]),
            ("add x mode tun frob", ["unknown argument 'frob' for 'aiotun add'", "--help"]),
            ("add mode tun user", ["'user' needs a user after it"]),
            ("add mode tun user nobody-of-that-name", ["no such user"]),
            ("add mode tun group nobody-of-that-name", ["no such group"]),
            (f"add {'x' * 16} mode tun", ["1 to 15"]),
            ("add mode tun netns", ["'netns' needs a name or path after it"]),
            ("del", ["'dev NAME'"]),
            ("del mode tun", ["'dev NAME'"]),
            ("del x user 0", ["unknown argument 'user' for 'aiotun del'"]),
            (f"del {'x' * 16}", ["1 to 15"]),
            ("list mode tun", ["unknown argument 'mode' for 'aiotun list'"]),
            ("list pi", ["unknown argument 'pi' for 'aiotun list'"]),
            ("list x y", ["unknown argument 'y' for 'aiotun list'"]),
        ],
    )
    def test_wrong_usage_is_one_line(self, line: str, words: list[str], command: Command) -> None:
        command(line).refused(2, *words)
        assert names() == []

    @pytest.mark.parametrize(
        "line", ["add --frob", "add x mode tun -y", "list --frob", "del -x", "demo frob"]
    )
    def test_unknown_options_exit_with_2_and_change_nothing(
        self, line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exits:
            cli.main(line.split())
        assert exits.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err
        assert names() == []

    def test_adding_an_existing_device_is_refused(self, command: Command) -> None:
        make("old0", "tun")
        command("add dev old0 mode tun").refused(1, "old0 exists already")

    def test_a_missing_namespace_is_refused(self, command: Command) -> None:
        for line in ("add mode tun", "del tun0", "list"):
            command(f"{line} netns nowhere-at-all").refused(1, "no network namespace")


class TestDel:
    @pytest.mark.parametrize(
        "words", ["old0", "dev old0", "name old0 mode tap", "mode tap multi_queue dev old0"]
    )
    def test_the_words_of_ip_tuntap(self, words: str, command: Command) -> None:
        make("old0", "tap", "multi_queue")
        assert command.done(f"del {words}") == []
        assert names() == []

    def test_deleting_a_device_of_the_other_mode_is_refused(self, command: Command) -> None:
        make("old0", "tap")
        command("del dev old0 mode tun").refused(1, "old0 is a TAP device", "not deleted")
        assert names() == ["old0"]

    def test_deleting_a_missing_device_is_refused(self, command: Command) -> None:
        command("del dev old0").refused(1, "there is no interface old0")
        command("del dev old0 mode tun").refused(1, "there is no interface old0")

    def test_deleting_an_interface_that_is_neither_tun_nor_tap_is_refused(
        self, command: Command
    ) -> None:
        command("del lo").refused(1, "lo is not a TUN or TAP device")

    def test_deleting_a_device_that_a_program_holds_is_refused(self, command: Command) -> None:
        with held("old0", Iff.TAP | Iff.NO_PI):
            command("del old0").refused(1, "a program holds old0")
            assert names() == ["old0"]


class TestList:
    def test_without_devices_list_prints_nothing(self, command: Command) -> None:
        assert command.done("list") == []
        assert command.done("list --json") == ["[]"]

    def test_list_shows_the_devices_that_programs_hold(self, command: Command) -> None:
        make("old0", "tap", "multi_queue")
        with held("old0", Iff.TAP | Iff.NO_PI | Iff.MULTI_QUEUE), held("tun0"):
            assert command.done("list") == [
                "old0: tap multi_queue persist attached",
                "tun0: tun attached",
            ]
        assert command.done("show") == ["old0: tap multi_queue persist"]

    @pytest.mark.parametrize(
        "line",
        ["list --json", "list -j", "list --json old0", "list old0 --json", "list -j dev old0"],
    )
    def test_list_json_gives_every_field(self, line: str, command: Command) -> None:
        make("old0", "tap", "pi", "user", str(ORDINARY))
        assert json.loads("\n".join(command.done(line))) == [
            {
                "name": "old0",
                "index": link("old0")["ifindex"],
                "mode": "tap",
                "multi_queue": False,
                "queues": 0,
                "persist": True,
                "owner": ORDINARY,
                "group": None,
                "packet_info": True,
                "vnet_header": False,
                "attached": False,
            }
        ]

    def test_list_dev_shows_one_device(self, command: Command) -> None:
        make("old0", "tap")
        make("old1", "tun")
        assert command.done("list dev old1") == ["old1: tun persist"]
        command("list dev old2").refused(1, "no TUN or TAP device old2")


class TestProcess:
    """As a process of its own."""

    def run(self, command: list[str], line: str, env: dict[str, str] | None = None) -> Said:
        done = subprocess.run(
            [*command, "-W", "error", "-m", "aiotun", *line.split()],
            env=env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def test_a_device_is_added_listed_and_deleted(self) -> None:
        python = [sys.executable]
        name = self.run(python, "add mode tap").lines[0]
        assert self.run(python, "list").lines == [f"{name}: tap persist"]
        gone = self.run(python, f"del {name}")
        assert (gone.status, gone.lines, gone.err, names()) == (0, [], "", [])

    def test_an_ordinary_user_may_list_and_delete_but_not_add(self) -> None:
        """An ordinary user may delete their own devices only."""
        python, env = ordinary_python()
        make("old0", "tap", "user", str(ORDINARY))
        make("old1", "tap", "user", "1")
        self.run(python, "add dev tap7 mode tap", env).refused(
            1, "CAP_NET_ADMIN", "ip tuntap add dev tap7 mode tap"
        )
        assert self.run(python, "list", env).lines == [
            f"old0: tap persist user {ORDINARY}",
            "old1: tap persist user 1",
        ]
        self.run(python, "del old1", env).refused(1, "belongs to another user or group")
        assert self.run(python, "del old0", env).status == 0
        assert names() == ["old1"]

    def test_a_reader_that_leaves_is_no_traceback(self) -> None:
        make("old0", "tap")
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "aiotun", "list"],
                stdout=writing,
                stderr=subprocess.PIPE,
                text=True,
                timeout=30,
            )
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", ["list", "add", "del", "demo", "dump", "doctor"])
def test_help_fits_a_terminal(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exits:
        cli.main([command, "--help"])
    assert exits.value.code == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) < 80
    if command == "add":
        for word in ("dev", "mode", "user", "group", "multi_queue", "pi", "vnet_hdr", "netns"):
            assert f"\n  {word} " in said
