"""`aiotun dump`: on an interface that another program holds, and on its own new device."""

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun import cli
from aiotun._kernel import abi

from ..commandline import Running, in_terminal, piped
from ..helpers import ip, make_icmp_echo, ordinary_python, udp_burst
from ..test_capture import run, tshark
from .kernel import ORDINARY, held, link, make, names
from .rig import OURS, PORT, THEIRS, number, rig, udp

CLOCK = r"\d\d:\d\d:\d\d\.\d{6}"


@pytest.fixture(autouse=True)
def no_ipv6() -> None:
    """With IPv6 the kernel sends packets by itself when a link comes up."""
    for name in ("default", "all"):
        path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        if path.exists():
            path.write_text("1")


def listening(command: Running) -> Running:
    command.read_until("Ctrl-C", err=True)
    return command


def send_local(count: int = 1) -> None:
    """Send datagrams to a closed port through `lo`; the kernel answers each with an ICMP error."""
    udp_burst("127.0.0.1", 9, count)


class TestListening:
    async def test_both_ways_and_takes_nothing_away(self) -> None:
        async with rig() as r:
            with piped("dump", "rig0", "--count", "3") as command:
                listening(command)
                r.inject()
                await r.tun.send(make_icmp_echo(THEIRS, OURS, ident=5, seq=9))
                assert number(await r.tun.recv()) == 0  # the packet is still the program's
                assert (await r.tun.recv())[20] == 0  # and the answer to its own ping
                assert await asyncio.to_thread(command.end) == 0
            port = r.sock.getsockname()[1]
        assert [re.sub(f"^{CLOCK}", "T", line) for line in command.lines] == [
            f"T Out IP {OURS}.{port} > {THEIRS}.{PORT}: UDP, length 4",
            f"T In  IP {THEIRS} > {OURS}: ICMP echo request, id 5, seq 9, length 12",
            f"T Out IP {OURS} > {THEIRS}: ICMP echo reply, id 5, seq 9, length 12",
        ]
        assert command.err.splitlines() == [
            "aiotun: listening on rig0 (IP packets); Ctrl-C ends it",
            "aiotun: 3 packets (1 in, 2 out), 0 dropped by the kernel",
        ]

    def test_lines_come_at_once(self) -> None:
        with piped("dump", "lo") as command:
            listening(command)
            for port in (1001, 1002, 1003):
                udp_burst("127.0.0.1", port, 1)
                command.read_until(f"127.0.0.1.{port}: UDP, length 32")

    def test_count_limits_the_number_of_packets(self, tmp_path: Path) -> None:
        file = tmp_path / "a.pcap"
        with piped("dump", "lo", "--count", "3", "--write", str(file)) as command:
            listening(command)
            command.process.send_signal(signal.SIGSTOP)  # so that many are waiting later
            send_local(20)
            command.process.send_signal(signal.SIGCONT)
            assert command.end() == 0
        assert len(command.lines) == len(tshark(file, "frame.len")) == 3

    def test_json_and_files_agree(self, tmp_path: Path) -> None:
        file = tmp_path / "a.pcapng"
        before = time.time_ns()
        with piped("dump", "lo", "--json", "--count", "2", "--write", str(file)) as command:
            listening(command)
            send_local()
            assert command.end() == 0
        first, second = (json.loads(line) for line in command.lines)
        assert before < first["time_ns"] <= second["time_ns"] < time.time_ns()
        assert (first["protocol"], first["dport"], first["direction"]) == ("UDP", 9, "in")
        assert first["line"].startswith("IP 127.0.0.1.")
        assert second["protocol"] == "ICMP"
        fields = ("frame.time_epoch", "frame.packet_flags_direction", "frame.protocols")
        seen = tshark(file, *fields, "frame.interface_name")
        assert [int(line[0].replace(".", "")) for line in seen] == [
            first["time_ns"],
            second["time_ns"],
        ]
        assert seen[0][1:] == ["0x00000001", "eth:ethertype:ip:udp:data", "lo"]
        assert command.err.endswith(f"; 2 written to {file}\n")

    async def test_vlan_tags_are_put_back(self, tmp_path: Path) -> None:
        """The kernel passes VLAN tags outside of the frame."""
        file = tmp_path / "a.pcap"
        frame = bytes.fromhex("ffffffffffff 020000000002 8100 2005 0800")
        frame += udp("10.0.0.1", 1, "10.0.0.2", 2)
        async with aiotun.open_tap("tap0") as tap:
            with piped("dump", "tap0", "--count", "1", "--write", str(file)) as command:
                listening(command)
                await tap.send(frame)
                assert await asyncio.to_thread(command.end) == 0
        assert "In  vlan 5, IP 10.0.0.1.1 > 10.0.0.2.2: UDP, length 0" in command.out
        assert tshark(file, "vlan.id", "vlan.priority", "frame.len") == [
            ["5", "1", str(len(frame))]
        ]

    def test_a_link_layer_we_do_not_know(self) -> None:
        """The kernel removes such a header."""
        make("old0")
        ip("addr", "add", "10.5.0.1/24", "dev", "old0")
        with held("old0") as (fd,):
            fcntl.ioctl(fd, abi.number("write", 205, 4), 512)  # TUNSETLINK, ARPHRD_PPP
            ip("link", "set", "old0", "up")
            assert link("old0")["link_type"] == "ppp"
            with piped("dump", "old0", "--count", "1") as command:
                listening(command)
                udp_burst("10.5.0.2", 9, 1)
                assert command.end() == 0
        assert "Out IP 10.5.0.1." in command.out

    @pytest.mark.parametrize("kind", [280, 803, 824])  # CAN, radiotap, netlink
    def test_a_link_that_carries_no_ip(self, kind: int) -> None:
        make("old0")
        with held("old0") as (fd,):
            fcntl.ioctl(fd, abi.number("write", 205, 4), kind)
            with piped("dump", "old0", "--count", "1") as command:
                assert command.end() == 1
        assert command.err == (
            "aiotun: old0 carries neither Ethernet frames nor IP packets (its link type is "
            f"{kind}, see if_arp.h); try 'tshark -i old0'\n"
        )

    def test_packets_that_are_no_ip(self, tmp_path: Path) -> None:
        """They are left out and counted, because the file's link type allows IP packets only."""
        make("old0")
        ip("addr", "add", "10.5.0.1/24", "dev", "old0")
        with held("old0") as (fd,), socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(fd, abi.number("write", 205, 4), 512)
            ip("link", "set", "old0", "up")
            with piped("dump", "old0", "--count", "1") as command:
                listening(command)
                sock.sendto(b"\xc0\x21LCP", ("old0", 0x880B))
                udp_burst("10.5.0.2", 9, 1)
                assert command.end() == 0
        assert [line.split()[2] for line in command.lines] == ["IP"]
        assert "1 not shown (not IP)" in command.err

    def test_a_name_that_would_control_the_terminal(self) -> None:
        name = "e\x1b[2J\x7f"
        make(name)
        with in_terminal("dump", name) as command:
            command.read_until("is down")
            assert "listening on e\\x1b[2J\\x7f (IP packets)" in command.out
            command.process.send_signal(signal.SIGINT)
            command.end()
        assert "\x1b[2J" not in command.out

    def test_an_interface_without_a_program_is_noted(self) -> None:
        make("old0")
        ip("link", "set", "old0", "up")
        with piped("dump", "old0") as command:
            command.read_until("no program has it open", err=True)
        assert "old0 has no carrier" in command.err

    async def test_an_interface_that_goes_down_and_up_is_noted(self) -> None:
        async with rig() as r:
            await r.tun.link.down()
            with piped("dump", "rig0", "--count", "1") as command:
                command.read_until("rig0 is down", err=True)
                assert "'ip link set rig0 up'" in command.err
                await r.tun.link.up()
                await r.tun.link.down()
                command.err = ""
                await asyncio.to_thread(command.read_until, "rig0 is down", err=True)
                await r.tun.link.up()
                r.inject()
                assert await asyncio.to_thread(command.end) == 0

    @pytest.mark.parametrize("up", [True, False])
    def test_a_deleted_interface_ends_the_dump(self, up: bool) -> None:
        make("old0")
        ip("link", "set", "old0", "up" if up else "down")
        with piped("dump", "old0") as command:
            command.read_until("no program" if up else "is down", err=True)
            ip("link", "del", "old0")
            assert command.end() == 1
        assert command.err.splitlines()[-2:] == [
            "aiotun: 0 packets (0 in, 0 out), 0 dropped by the kernel",
            "aiotun: old0 was deleted",
        ]

    def test_packets_that_the_kernel_dropped_are_counted(self) -> None:
        with piped("dump", "lo", "--json") as command:
            listening(command)
            command.process.send_signal(signal.SIGSTOP)
            send_local(30_000)
            command.process.send_signal(signal.SIGCONT)
            while b"\n" not in os.read(command.out_fd, 1 << 20):
                pass
            command.process.send_signal(signal.SIGINT)
            assert command.end() == 130
        dropped = re.search(r", (\d+) dropped by the kernel", command.err)
        assert dropped is not None
        assert int(dropped[1]) > 1000

    def test_listening_as_an_ordinary_user_names_the_capability(self) -> None:
        python, env = ordinary_python()
        with piped("dump", "lo", command=[*python, "-m", "aiotun"], env=env) as command:
            assert command.end() == 1
        assert command.err.startswith("aiotun: listening on lo needs CAP_NET_RAW")
        assert command.err.count("\n") == 1


class TestNew:
    @pytest.mark.parametrize("tap", [False, True])
    def test_shows_what_comes_in(self, tap: bool, tmp_path: Path) -> None:
        file = tmp_path / "a.pcapng"
        options = ["--address", "10.9.0.1/24", "--write", str(file), "--count", "1"]
        options += ["--tap"] if tap else []
        with piped("dump", "--new", "new0", *options) as command:
            listening(command)
            assert names() == ["new0"]
            udp_burst("10.9.0.2", 9, 1)
            assert command.end() == 0
        said = (
            "ARP, Request who-has 10.9.0.2 tell 10.9.0.1" if tap else "> 10.9.0.2.9: UDP, length 32"
        )
        assert said in command.out
        kind, what = ("tap", "eth:ethertype:arp") if tap else ("tun", "raw:ip:udp:data")
        assert command.err.splitlines() == [
            f"aiotun: new0 is open ({kind}), with 10.9.0.1/24; Ctrl-C ends it",
            f"aiotun: 1 packet (1 in, 0 out); 1 written to {file}",
        ]
        shown = tshark(file, "frame.protocols", "frame.packet_flags_direction")
        assert shown == [[what, "0x00000001"]]
        assert names() == []

    def test_a_deleted_new_device_ends_the_dump(self) -> None:
        with piped("dump", "--new", "new0") as command:
            listening(command)
            ip("link", "del", "new0")
            assert command.end() == 1
        assert "new0 is gone" in command.err

    def test_a_tap_device_is_refused(self) -> None:
        make("old0", "tap")
        with piped("dump", "--new", "old0") as command:
            assert command.end() == 1
        assert "old0 is a TAP device" in command.err

    def test_an_ordinary_user_may_dump_a_prepared_device(self) -> None:
        """The device was prepared by root for this user."""
        python, env = ordinary_python()
        make("old0", "tun", "user", str(ORDINARY))
        ip("addr", "add", "10.9.0.1/24", "dev", "old0")
        ip("link", "set", "old0", "up")
        user = [*python, "-m", "aiotun"]
        with piped("dump", "--new", "old0", "--count", "1", command=user, env=env) as command:
            listening(command)
            udp_burst("10.9.0.2", 9, 1)
            assert command.end() == 0
        with piped("dump", "--new", "new0", command=user, env=env) as command:
            assert command.end() == 1
        assert "CAP_NET_ADMIN" in command.err


class TestTerminal:
    def test_colors_and_ctrl_c(self) -> None:
        with in_terminal("dump", "lo") as command:
            listening(command)
            send_local()
            command.read_until("ICMP port unreachable, length 68")
            os.write(command.out_fd, b"\x03")
            assert command.end() == 130
        shown = [line for line in command.lines if "UDP, length 32" in line]
        assert re.fullmatch(
            rf"\x1b\[2m{CLOCK}\x1b\[0m In  \x1b\[36mIP 127\.0\.0\.1\.\d+ > 127\.0\.0\.1\.9: "
            r"UDP, length 32\x1b\[0m",
            shown[0],
        )
        assert "2 packets (2 in, 0 out), 0 dropped by the kernel" in command.lines[-1]

    @pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    def test_no_color_and_a_dumb_terminal_get_no_colors(self, env: dict[str, str]) -> None:
        with in_terminal("dump", "lo", "--count", "1", env=env) as command:
            listening(command)
            send_local()
            assert command.end() == 0
        assert "\x1b" not in command.out
        assert "UDP, length 32" in command.out

    def test_an_empty_no_color_means_nothing(self) -> None:
        """https://no-color.org says so."""
        with in_terminal("dump", "lo", "--count", "1", env={"NO_COLOR": ""}) as command:
            listening(command)
            send_local()
            assert command.end() == 0
        assert "\x1b[36m" in command.out

    def test_json_has_no_colors(self) -> None:
        with in_terminal("dump", "lo", "--json", "--count", "1") as command:
            listening(command)
            send_local()
            assert command.end() == 0
        assert "\x1b" not in command.out

    def test_binary_packets_are_not_written_to_a_terminal(self) -> None:
        with in_terminal("dump", "lo", "--write", "-") as command:
            assert command.end() == 2
        assert command.out.startswith("aiotun: refusing to write binary packets to a terminal")
        assert len(command.lines) == 1


class TestEnds:
    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
    )
    def test_signals_say_what_was_seen(
        self, number: signal.Signals, status: int, tmp_path: Path
    ) -> None:
        file = tmp_path / "a.pcap"
        with piped("dump", "lo", "--write", str(file)) as command:
            listening(command)
            send_local()
            command.read_until("port unreachable")
            command.process.send_signal(number)
            assert command.end() == status
        last = command.err.splitlines()[-1]
        assert last == (
            f"aiotun: 2 packets (2 in, 0 out), 0 dropped by the kernel; 2 written to {file}"
        )
        assert len(tshark(file, "frame.len")) == 2

    @pytest.mark.parametrize("options", [[], ["--json"], ["--write", "-"]])
    def test_a_reader_that_leaves(self, options: list[str]) -> None:
        with piped("dump", "lo", *options) as command:
            listening(command)
            assert command.process.stdout is not None
            command.process.stdout.close()
            command.out_fd = -1
            deadline = time.monotonic() + 10
            while command.process.poll() is None and time.monotonic() < deadline:
                send_local()
                time.sleep(0.02)
            assert command.end() == 1
        assert command.err == "aiotun: listening on lo (Ethernet frames); Ctrl-C ends it\n"

    def test_a_capture_file_can_be_written_to_a_pipe(self, tmp_path: Path) -> None:
        file = tmp_path / "a.pcap"
        with piped("dump", "lo", "--write", "-", "--count", "4") as command:
            listening(command)
            send_local(2)
            written = b""
            while data := os.read(command.out_fd, 65536):
                written += data
            command.out_fd = -1
            assert command.end() == 0
        file.write_bytes(written)
        assert len(tshark(file, "frame.len")) == 4
        assert "UDP" in run("tcpdump", "-n", "-r", str(file))

    def test_a_full_disk_ends_the_dump_with_its_error(self) -> None:
        with piped("dump", "lo", "--write", "/dev/full") as command:
            listening(command)
            while command.process.poll() is None:
                send_local()
                time.sleep(0.02)
            assert command.end() == 1
        assert "No space left on device" in command.err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("dump nope", "there is no interface nope"),
            ("dump --new old0 --tap", "old0 is a TUN device"),
            ("dump lo --write /nope/a", "/nope/a can't be written: No such file"),
        ],
    )
    def test_a_failure_is_one_line(
        self, line: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make("old0")
        assert cli.main(line.split()) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert said in shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dump", "give either an interface"),
        ("dump lo --new tun0", "give either an interface"),
        ("dump lo lo", "unrecognized arguments: lo"),
        ("dump lo --tap", "need '--new NAME'"),
        ("dump lo --address 10.0.0.1/24", "need '--new NAME'"),
        ("dump --new tun0 --address nowhere", "nowhere"),
        ("dump --new a/b", "a/b"),
        ("dump lo --count 0", "above 0"),
        ("dump lo --what", "unrecognized arguments: --what"),
    ],
)
def test_wrong_arguments_are_one_line(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = cli.main(line.split())
    except SystemExit as exits:
        status = exits.code
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert said in shown.err
    assert shown.err.count("\n") == 1
