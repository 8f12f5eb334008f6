"""`PcapWriter` without a network: files read by tshark and tcpdump, slow disks, full disks."""

import asyncio
import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from aiotun.capture import Direction, Format, PcapWriter

from .helpers import make_icmp_echo, need, wait_until

PACKET = make_icmp_echo("10.0.0.1", "10.0.0.2")
PACKET6 = make_icmp_echo("fd00::1", "fd00::2")
ETHERNET = bytes.fromhex("020000000001 020000000002 0800")
# Nanoseconds that a double can't represent, that rounding would carry into the next second, and
# with leading zeros; a time whose upper half is not 0, and the last time that pcap can store.
TIMES = [1_700_000_000_123_456_789, 1_699_999_999_999_999_999, 1_700_000_000_000_000_001, 0,
         4_294_967_295_999_999_999]  # fmt: skip


def run(program: str, *args: str) -> str:
    done = subprocess.run([need(program), *args], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tshark(file: Path, *fields: str) -> list[list[str]]:
    """Read a file with tshark, and return these fields of each packet."""
    wanted = [each for field in fields for each in ("-e", field)]
    said = run("tshark", "-n", "-r", str(file), "-T", "fields", *wanted)
    return [line.split("\t") for line in said.splitlines()]


def tcpdump(file: Path) -> list[str]:
    return run("tcpdump", "-n", "-tt", "--nano", "-r", str(file)).splitlines()


def packets(file: Path) -> list[bytes]:
    """The packets of a pcap file, parsed here; the file must end with a whole packet."""
    data = file.read_bytes()
    assert data[:4] == struct.pack("<I", 0xA1B23C4D)
    found, at = [], 24
    while at < len(data):
        _, _, kept, _ = struct.unpack_from("<IIII", data, at)
        found.append(data[at + 16 : at + 16 + kept])
        assert len(found[-1]) == kept
        at += 16 + kept
    return found


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file that accepts 64 KiB and then blocks until the pipe is read, like a very slow disk."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield path, reading
    finally:
        os.close(reading)


class TestFormats:
    @pytest.mark.parametrize("suffix", ["pcap", "pcapng"])
    @pytest.mark.parametrize("mode", ["tun", "tap"])
    def test_others_read_the_same(self, suffix: str, mode: Any, tmp_path: Path) -> None:
        file = tmp_path / f"file.{suffix}"
        ways: list[Direction | None] = ["in", "out", None, "in", "out"]
        before = ETHERNET if mode == "tap" else b""
        with PcapWriter(file, mode, interface="dev0") as writer:
            assert writer.format == suffix
            for at, way in zip(TIMES, ways, strict=True):
                assert writer.write(before + PACKET, direction=way, time_ns=at)
        seen = [f"{at // 10**9}.{at % 10**9:09}" for at in TIMES]
        length = len(before + PACKET)
        protocols = ("eth:ethertype:ip" if mode == "tap" else "raw:ip") + ":icmp:data"
        flags = [{None: "0x00000000", "in": "0x00000001", "out": "0x00000002"}[w] for w in ways]
        assert tshark(
            file,
            "frame.time_epoch",
            "frame.len",
            "frame.protocols",
            "frame.packet_flags",
            "frame.interface_name",
        ) == [
            [at, str(length), protocols, *([flag, "dev0"] if suffix == "pcapng" else ["", ""])]
            for at, flag in zip(seen, flags, strict=True)
        ]
        said = "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 12"
        # (tcpdump 4.99 shows no time after 2038.)
        assert tcpdump(file)[:-1] == [f"{at} {said}" for at in seen[:-1]]

    @pytest.mark.parametrize("suffix", ["pcap", "pcapng"])
    def test_every_length_and_a_snaplen(self, suffix: str, tmp_path: Path) -> None:
        """pcapng pads to four bytes; a truncated packet has its original length."""
        file = tmp_path / f"file.{suffix}"
        with PcapWriter(file, snaplen=40) as writer:
            for extra in range(20):
                writer.write(make_icmp_echo("10.0.0.1", "10.0.0.2", payload=b"x" * extra))
        assert tshark(file, "frame.len", "frame.cap_len", "icmp.seq") == [
            [str(28 + extra), str(min(40, 28 + extra)), "1"] for extra in range(20)
        ]

    def test_ipv6_and_super_packets(self, tmp_path: Path) -> None:
        file = tmp_path / "file.pcap"
        large = make_icmp_echo("fd00::1", "fd00::2", payload=bytes(65_000))
        with PcapWriter(file) as writer:
            writer.write(PACKET6)
            writer.write(large)
        assert packets(file) == [PACKET6, large]
        assert [line[0] for line in tshark(file, "ipv6.dst")] == ["fd00::2"] * 2

    def test_a_packet_gets_the_present_time_by_default(self, tmp_path: Path) -> None:
        with PcapWriter(tmp_path / "file.pcapng") as writer:
            before = time.time_ns()
            writer.write(PACKET)
            after = time.time_ns()
        ((shown,),) = tshark(tmp_path / "file.pcapng", "frame.time_epoch")
        assert before <= int(shown.replace(".", "")) <= after

    def test_any_bytes_like_object_is_copied(self, tmp_path: Path) -> None:
        own = bytearray(PACKET)
        with PcapWriter(tmp_path / "a") as writer:
            writer.write(own)
            writer.write(memoryview(own))
            own[:] = bytes(len(own))
        assert packets(tmp_path / "a") == [PACKET, PACKET]


class TestFiles:
    def test_an_open_file_is_the_callers(self) -> None:
        file = io.BytesIO()
        with PcapWriter(file, format="pcapng") as writer:
            writer.write(PACKET)
        assert not file.closed
        assert file.getvalue().startswith(bytes.fromhex("0a0d0d0a"))
        assert PACKET in file.getvalue()

    def test_a_path_is_overwritten_and_there_at_once(self, tmp_path: Path) -> None:
        file = tmp_path / "file.pcap"
        file.write_bytes(b"old" * 1000)
        with PcapWriter(file) as writer:
            writer.write(PACKET)
            deadline = time.monotonic() + 5
            while not writer.written:  # before the file is closed
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert packets(file) == [PACKET]

    def test_rotation_keeps_the_newest_files(self, tmp_path: Path) -> None:
        file = tmp_path / "file.pcap"
        numbered = [make_icmp_echo("10.0.0.1", "10.0.0.2", seq=n) for n in range(25)]
        record = 16 + len(PACKET)
        with PcapWriter(file, max_bytes=24 + 4 * record, max_files=3) as writer:
            for packet in numbered:
                writer.write(packet)
        assert sorted(each.name for each in tmp_path.iterdir()) == [
            "file.1.pcap",
            "file.2.pcap",
            "file.pcap",
        ]
        assert packets(tmp_path / "file.2.pcap") == numbered[16:20]
        assert packets(tmp_path / "file.1.pcap") == numbered[20:24]
        assert packets(file) == numbered[24:]
        assert (writer.written, writer.dropped) == (25, 0)

    def test_rotation_with_one_file_and_packets_larger_than_it(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        with PcapWriter(file, max_bytes=1, max_files=1) as writer:
            for n in range(3):
                writer.write(make_icmp_echo("10.0.0.1", "10.0.0.2", seq=n))
        assert list(tmp_path.iterdir()) == [file]
        assert packets(file) == [make_icmp_echo("10.0.0.1", "10.0.0.2", seq=2)]

    def test_any_number_of_files_may_be_kept(self, tmp_path: Path) -> None:
        """The time of a rotation depends on the number of existing files, not on the limit."""
        before = time.monotonic()
        with PcapWriter(tmp_path / "file", max_bytes=1, max_files=10**6) as writer:
            for n in range(30):
                writer.write(make_icmp_echo("10.0.0.1", "10.0.0.2", seq=n))
        assert time.monotonic() - before < 5
        numbered = [packets(tmp_path / f"file.{n}")[0] for n in range(1, 30)]
        assert numbered == [
            make_icmp_echo("10.0.0.1", "10.0.0.2", seq=n) for n in reversed(range(29))
        ]

    def test_a_gap_among_the_kept_files_is_filled(self, tmp_path: Path) -> None:
        for n in (1, 3):
            (tmp_path / f"file.{n}").write_text(str(n))
        with PcapWriter(tmp_path / "file", max_bytes=1, max_files=9) as writer:
            writer.write(PACKET)
            writer.write(PACKET)
        kept = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
        assert sorted(kept) == ["file", "file.1", "file.2", "file.3"]
        assert (kept["file.2"], kept["file.3"]) == (b"1", b"3")

    @pytest.mark.parametrize("suffix", ["pcapng", "pcap"])
    def test_each_rotated_file_stands_alone(self, suffix: str, tmp_path: Path) -> None:
        with PcapWriter(tmp_path / f"f.{suffix}", max_bytes=300, max_files=9) as writer:
            for _ in range(10):
                writer.write(PACKET)
        files = list(tmp_path.iterdir())
        assert len(files) > 1
        assert sum(len(tcpdump(file)) for file in files) == 10
        assert max(file.stat().st_size for file in files) <= 300


class TestSlowDisk:
    def test_packets_are_dropped_and_counted(self, pipe: tuple[Path, int]) -> None:
        path, reading = pipe
        writer = PcapWriter(path, pending_bytes=1_000_000)
        kept = 0
        start = time.monotonic()
        for n in range(3000):
            kept += writer.write(make_icmp_echo("10.0.0.1", "10.0.0.2", seq=n, payload=bytes(1000)))
        assert time.monotonic() - start < 5
        assert 0 < writer.dropped == 3000 - kept
        closing = threading.Thread(target=writer.close)
        closing.start()
        read = bytearray()
        os.set_blocking(reading, True)
        while data := os.read(reading, 1 << 20):
            read += data
        closing.join()
        assert len(read) == 24 + kept * (16 + 1028)
        assert writer.written == kept

    async def test_the_loop_goes_on(self, pipe: tuple[Path, int]) -> None:
        path, reading = pipe
        writer = PcapWriter(path)
        for _ in range(500):
            writer.write(bytes(1000))
        closing = asyncio.create_task(writer.aclose())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()
        read = 0
        while not closing.done():
            with contextlib.suppress(BlockingIOError):
                read += len(os.read(reading, 1 << 20))
            await asyncio.sleep(0)
        await closing
        read += len(os.read(reading, 1 << 20))
        assert read == 24 + 500 * 1016

    async def test_cancelling_the_close_ends_only_the_waiting(self, pipe: tuple[Path, int]) -> None:
        path, reading = pipe
        writer = PcapWriter(path)
        for _ in range(500):
            writer.write(bytes(1000))
        closing = asyncio.create_task(writer.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert writer.closed
        read = 0
        while writer.written < 500:
            with contextlib.suppress(BlockingIOError):
                read += len(os.read(reading, 1 << 20))
            await asyncio.sleep(0)
        await writer.aclose()

    def test_larger_than_all_that_may_wait(self, tmp_path: Path) -> None:
        """A packet is always accepted if no other packet waits."""
        with PcapWriter(tmp_path / "a", pending_bytes=1) as writer:
            assert writer.write(PACKET)


class Full(io.RawIOBase):
    """A disk of limited size that accepts a few bytes at a time."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.data = b""

    def write(self, data: Any) -> int:
        if len(self.data) == self.room:
            raise OSError(28, "No space left on device")
        taken = bytes(data[: min(100, self.room - len(self.data))])
        self.data += taken
        return len(taken)


class TestFullDisk:
    def test_a_full_disk_is_raised_once_and_drops_are_counted(self) -> None:
        disk = Full(1000)
        writer = PcapWriter(cast(Any, disk))
        for _ in range(100):
            writer.write(PACKET)
        with pytest.raises(OSError, match=r"No space left on device.*Free some space") as caught:
            writer.close()
        assert caught.value.errno == 28
        assert caught.value is writer.error
        assert writer.written + writer.dropped == 100
        assert writer.dropped > 0
        writer.close()

    @pytest.mark.parametrize("file", ["/dev/full"])
    async def test_aclose_raises_the_write_error(self, file: str) -> None:
        writer = PcapWriter(file)
        await wait_until(lambda: writer.error is not None)
        assert not writer.write(PACKET)
        assert writer.dropped == 1
        with pytest.raises(OSError, match="/dev/full"):
            await writer.aclose()

    def test_the_file_ends_with_a_whole_packet(self, tmp_path: Path) -> None:
        """On a real file system that is full."""
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
        subprocess.run(command, check=True)  # in the run's own mount namespace
        try:
            writer = PcapWriter(tmp_path / "file.pcap")
            for n in range(3000):
                writer.write(make_icmp_echo("10.0.0.1", "10.0.0.2", seq=n))
                if n % 100 == 0:
                    time.sleep(0.0005)  # so that it is written in several pieces
            with pytest.raises(OSError, match="No space left"):
                writer.close()
            found = packets(tmp_path / "file.pcap")
            assert len(found) == writer.written == 3000 - writer.dropped
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_a_file_that_raises_something_else(self) -> None:
        file = io.BytesIO()
        writer = PcapWriter(file)
        while not writer.write(PACKET) or writer.written == 0:
            pass
        file.close()
        writer.write(PACKET)
        with pytest.raises(OSError, match="closed file"):
            writer.close()

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Exception])
    @pytest.mark.parametrize("when", ["at once", "later"])
    async def test_whatever_a_file_raises_closing_ends(
        self, kind: type[BaseException], when: str
    ) -> None:
        class File(io.BytesIO):
            def write(self, data: Any) -> int:
                if when == "at once" or self.tell():
                    raise kind("says the file")
                return super().write(data)

        writer = PcapWriter(File())
        writer.write(PACKET)
        with pytest.raises(OSError, match="says the file") as caught:
            await asyncio.wait_for(writer.aclose(), 5)
        assert type(caught.value.__cause__) is kind
        assert (writer.written, writer.dropped) == (0, 1)
        await writer.aclose()
        writer.close()

    def test_a_file_that_does_not_block(self, pipe: tuple[Path, int]) -> None:
        """With such a file the writer would lose packets or spin."""
        with open(os.open(pipe[0], os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0) as file:
            writer = PcapWriter(cast(Any, file))
            for _ in range(100):
                writer.write(bytes(1000))
            with pytest.raises(OSError, match="Resource temporarily unavailable"):
                writer.close()

    @pytest.mark.parametrize("kind", ["with", "async with"])
    async def test_an_error_of_the_block_goes_on(self, kind: str) -> None:
        async def block() -> None:
            if kind == "with":
                with PcapWriter("/dev/full"):
                    raise KeyError
            async with PcapWriter("/dev/full"):
                raise KeyError

        with pytest.raises(KeyError) as caught:
            await block()
        assert "No space left" in caught.value.__notes__[0]
        with pytest.raises(OSError, match="No space left"):
            async with PcapWriter("/dev/full"):
                pass


class TestEnds:
    def test_writing_after_closing(self, tmp_path: Path) -> None:
        writer = PcapWriter(tmp_path / "a")
        writer.close()
        assert writer.closed
        with pytest.raises(ValueError, match="closed"):
            writer.write(PACKET)
        writer.record(PACKET, "in")  # a capture must not raise
        assert writer.dropped == 1

    def test_unclosed_warns_and_writes(self, tmp_path: Path) -> None:
        writer = PcapWriter(tmp_path / "a")
        thread = writer._sink.thread
        writer.write(PACKET)
        with pytest.warns(ResourceWarning, match=r"unclosed <PcapWriter .*a"):
            del writer
        thread.join()
        assert packets(tmp_path / "a") == [PACKET]

    @pytest.mark.parametrize("how", ["", "raise SystemExit(3)", "raise KeyError"])
    def test_nothing_is_lost_at_the_interpreters_end(self, how: str, tmp_path: Path) -> None:
        code = f"""
import sys
from aiotun.capture import PcapWriter
writer = PcapWriter(sys.argv[1])
for _ in range(50_000): writer.write(bytes(100))
{how}
"""
        file = tmp_path / "file.pcap"
        command = [sys.executable, "-c", code, str(file)]
        done = subprocess.run(command, timeout=30, stderr=subprocess.PIPE, text=True)
        assert done.returncode == {"": 0, "raise SystemExit(3)": 3, "raise KeyError": 1}[how]
        assert len(packets(file)) == 50_000

    def test_an_error_at_the_interpreters_end_is_told(self) -> None:
        code = "from aiotun.capture import PcapWriter; writer = PcapWriter('/dev/full')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "No space left on device" in done.stderr

    def test_a_forked_child_writes_nothing(self, tmp_path: Path) -> None:
        code = """
import os, sys, threading
from aiotun.capture import PcapWriter
writer = PcapWriter(sys.argv[1])
writer.write(bytes(100))
writer._sink.changed.acquire()  # as the thread may, just then
if pid := os.fork():
    writer._sink.changed.release()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
threading.Thread(target=lambda: (writer.record(bytes(9), "in"), writer.close())).start()
"""
        file = tmp_path / "file.pcap"
        done = subprocess.run([sys.executable, "-c", code, str(file)], timeout=30)
        assert done.returncode == 0
        assert len(packets(file)) == 1

    def test_closing_ends_the_writers_thread(self, tmp_path: Path) -> None:
        before = threading.active_count()
        with PcapWriter(tmp_path / "a"):
            assert threading.active_count() == before + 1
        assert threading.active_count() == before

    async def test_threads_may_share_one(self, tmp_path: Path) -> None:
        async with PcapWriter(tmp_path / "a") as writer:
            writing = [
                asyncio.to_thread(lambda: [writer.write(PACKET) for _ in range(500)])
                for _ in range(4)
            ]
            await asyncio.gather(*writing)
        assert packets(tmp_path / "a") == [PACKET] * 2000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "ppp"}, "'tun' or 'tap'"),
        ({"format": "erf"}, "'pcap' or 'pcapng'"),
        ({"snaplen": 0}, "1 to 262144"),
        ({"snaplen": 262_145}, "1 to 262144"),
        ({"max_bytes": 0}, "at least 1"),
        ({"max_files": 0}, "at least 1"),
        ({"pending_bytes": 0}, "at least 1"),
        ({"file": io.BytesIO(), "max_bytes": 1000}, "needs a path"),
    ],
)
def test_a_writer_refuses_invalid_values(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    options = {"file": tmp_path / "a", **options}
    with pytest.raises(ValueError, match=said):
        PcapWriter(**options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"snaplen": 1.5},
        {"snaplen": "64"},
        {"snaplen": True},
        {"max_bytes": 1e6},
        {"max_files": 2.0},
        {"max_files": None},
        {"pending_bytes": 1e6},
        {"interface": b"tun0"},
        {"interface": 7},
    ],
)
def test_a_writer_refuses_arguments_of_the_wrong_type(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """It raises immediately, before it creates the file."""
    with pytest.raises(TypeError, match=rf"{next(iter(options))} must be .*, got "):
        PcapWriter(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("suffix", ["pcap", "pcapng"])
def test_an_interface_name_that_pcapng_has_no_room_for(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    for name in ("x" * 70_000, "\N{SNOWMAN}" * 30_000):
        with pytest.raises(ValueError, match="at most 65535 bytes"):
            PcapWriter(file, interface=name)
        assert not file.exists()
    with PcapWriter(file, interface="x" * 65_535) as writer:
        writer.write(PACKET)
    # (tshark truncates the name.)
    assert tshark(file, "frame.len") == [[str(len(PACKET))]]


def test_a_file_that_can_not_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    with path.open("rb") as file, pytest.raises(ValueError, match="can't be written to"):
        PcapWriter(cast(Any, file))
    with pytest.raises(ValueError, match="is closed"):
        PcapWriter(cast(Any, file))


@pytest.mark.parametrize("file", [io.StringIO(), object()])
def test_a_text_file_is_refused(file: Any) -> None:
    with pytest.raises(TypeError, match="binary"):
        PcapWriter(file)


def test_a_missing_folder_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PcapWriter(tmp_path / "none" / "a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"direction": "up"}, "'in', 'out' or None"),
        ({"time_ns": -1}, "1970"),
        ({"time_ns": 2**32 * 10**9}, "2106"),
    ],
)
def test_write_refuses_an_invalid_direction_or_time(options: dict[str, Any], said: str) -> None:
    formats: list[Format] = ["pcap", "pcapng"]
    for each in formats:
        with PcapWriter(io.BytesIO(), format=each) as writer, pytest.raises(ValueError, match=said):
            writer.write(PACKET, **options)


@pytest.mark.parametrize("time_ns", [1.5, "1", True])
def test_a_time_that_is_no_number(time_ns: Any) -> None:
    with PcapWriter(io.BytesIO()) as writer:
        with pytest.raises(TypeError, match="time_ns must be an int"):
            writer.write(PACKET, time_ns=time_ns)
        assert writer.write(PACKET)
