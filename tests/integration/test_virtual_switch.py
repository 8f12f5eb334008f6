"""examples/virtual_switch.py: namespaces, sockets and QEMU's guests on one switch."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..helpers import ip
from . import kernel
from .programs import Program, booting, example, example_module, running

A, B, C = (bytes((2, 0, 0, 0, 0, number)) for number in (0xA, 0xB, 0xC))
EVERYBODY = b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")
EXPERIMENTAL = b"\x88\xb5"  # IEEE 802, local experimental ethertype 1


def frame(target: bytes, source: bytes, text: str = "") -> bytes:
    return target + source + EXPERIMENTAL + text.encode().ljust(46)


@contextlib.contextmanager
def switch(*ports: str, ageing: str = "300") -> Iterator[Program]:
    words = [word for port in ports for word in ("--port", port)]
    with running(example("virtual_switch.py", "--ageing", ageing, *words), "ready") as program:
        yield program


def counters(lines: list[str], port: str) -> dict[str, int]:
    """The last counters that the switch printed for a port."""
    (*_, line) = [line for line in lines if line.startswith(f"{port} ")]
    words = line.removeprefix(f"{port} ").split()
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


class Wire:
    """A host at the far end of a port: a stream as QEMU's, or a datagram socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(10)
        self._stream = sock.type == socket.SOCK_STREAM

    def send(self, data: bytes) -> None:
        prefix = len(data).to_bytes(4, "big") if self._stream else b""
        self.sock.sendall(prefix + data)

    def receive(self) -> bytes:
        if not self._stream:
            return self.sock.recv(65_600)
        length = int.from_bytes(self._exactly(4), "big")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            data = self.sock.recv(count - len(found))
            assert data, "the switch closed it"
            found += data
        return found


@contextlib.contextmanager
def plugged(path: Path | str) -> Iterator[Wire]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))
        yield Wire(sock)


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- What it decides -----------------------------------------------------------------------------

switching = example_module("_switching")


class Rack:
    """A switch with ports that only record frames, and a clock that the test sets."""

    def __init__(self, ports: int = 3) -> None:
        self.now = 0.0
        self.switch = switching.Switch(ageing=10.0, clock=lambda: self.now)
        self.out: list[list[bytes]] = [[] for _ in range(ports)]
        self.ports = [self._port(number) for number in range(ports)]

    def _port(self, number: int) -> Any:
        out = self.out[number]

        class Fake(switching.Port):  # type: ignore[misc, name-defined]
            ready = True

            def put(self, frame: bytes) -> bool:
                if self.ready:
                    out.append(frame)
                return self.ready

        port = Fake(switching.Counters())
        self.switch.add(port)
        return port

    def pass_on(self, number: int, data: bytes) -> list[int]:
        """Pass a frame in at a port; return the numbers of the ports that it came out of."""
        self.switch.forward(self.ports[number], data)
        reached = [n for n, out in enumerate(self.out) if out]
        assert all(out == [data] for out in self.out if out)
        for out in self.out:
            out.clear()
        return reached


@pytest.mark.parametrize("target", [EVERYBODY, GROUP, C], ids=["broadcast", "group", "unknown"])
def test_what_is_for_several_or_unknown_goes_everywhere_but_back(target: bytes) -> None:
    rack = Rack()
    for number in range(3):
        reached = rack.pass_on(number, frame(target, A))
        assert reached == [n for n in range(3) if n != number]


def test_a_station_is_learned_and_followed() -> None:
    rack = Rack()
    rack.pass_on(0, frame(EVERYBODY, A))
    assert rack.pass_on(1, frame(A, B)) == [0]
    assert rack.pass_on(0, frame(B, A)) == [1]
    # It moves to another port.
    assert rack.pass_on(2, frame(EVERYBODY, A)) == [0, 1]
    assert rack.pass_on(1, frame(A, B)) == [2]
    # A frame to a station on the same port is not forwarded.
    rack.pass_on(2, frame(EVERYBODY, C))
    assert rack.pass_on(2, frame(C, A)) == []
    assert rack.ports[2].counters.filtered == 1


def test_a_station_is_forgotten_in_time() -> None:
    rack = Rack()
    rack.pass_on(0, frame(EVERYBODY, A))
    rack.now = 9.9
    assert rack.pass_on(1, frame(A, B)) == [0]
    rack.now = 10.0
    assert rack.pass_on(1, frame(A, B)) == [0, 2]
    # A frame from a station keeps it known.
    rack.pass_on(0, frame(EVERYBODY, A))
    rack.now = 19.9
    assert rack.pass_on(1, frame(A, B)) == [0]


def test_a_port_that_leaves_is_forgotten() -> None:
    rack = Rack()
    rack.pass_on(0, frame(EVERYBODY, A))
    rack.switch.remove(rack.ports[0])
    assert rack.pass_on(1, frame(A, B)) == [2]
    rack.switch.remove(rack.ports[0])  # removing it again is harmless


def test_a_full_table_floods_and_recovers() -> None:
    rack = Rack()
    for number in range(switching.MAX_STATIONS):
        rack.switch.forward(rack.ports[0], frame(B, b"\x02\x01" + number.to_bytes(4, "big")))
    for out in rack.out:
        out.clear()
    rack.pass_on(0, frame(EVERYBODY, A))
    assert rack.switch.unlearned == 1
    assert rack.pass_on(1, frame(A, b"\x02\x01" + bytes(4))) == [0, 2]
    rack.now = 10.0  # the others have aged
    rack.pass_on(0, frame(EVERYBODY, A))
    assert rack.pass_on(1, frame(A, B)) == [0]
    assert rack.switch.unlearned == 1


def test_a_flood_of_stations_costs_no_search_of_the_table() -> None:
    """Measures the time per frame: a search of all 8,192 stations takes about 0.5 ms."""
    rack = Rack()
    rack.switch.remove(rack.ports[1])
    rack.switch.remove(rack.ports[2])  # so that no frame is recorded
    flood = [frame(B, b"\x02\x01" + number.to_bytes(4, "big")) for number in range(20_000)]
    before = time.process_time()
    for each in flood:
        rack.switch.forward(rack.ports[0], each)
    assert time.process_time() - before < 1
    assert rack.switch.unlearned == 20_000 - switching.MAX_STATIONS


@pytest.mark.parametrize(
    "bad",
    [b"", frame(B, A)[:13], frame(B, GROUP), frame(B, EVERYBODY), frame(B, A).ljust(65_555)],
    ids=["empty", "short", "from a group", "from everybody", "long"],
)
def test_what_is_no_frame_goes_nowhere_and_is_counted(bad: bytes) -> None:
    rack = Rack()
    assert rack.pass_on(0, bad) == []
    assert rack.ports[0].counters.malformed == 1
    assert rack.pass_on(1, frame(GROUP, B)) == [0, 2]


def test_what_bridges_tell_each_other_is_not_relayed() -> None:
    rack = Rack()
    for last in range(16):
        assert rack.pass_on(0, frame(bytes.fromhex("0180c20000") + bytes([last]), A)) == []
    assert rack.ports[0].counters.filtered == 16
    assert rack.pass_on(0, frame(bytes.fromhex("0180c2000010"), A)) == [1, 2]


def test_a_port_that_is_not_ready_loses_its_own_frames_only() -> None:
    rack = Rack()
    rack.ports[1].ready = False
    assert rack.pass_on(0, frame(EVERYBODY, A)) == [2]
    assert (rack.ports[1].counters.dropped, rack.ports[2].counters.sent) == (1, 1)


# --- Its ports -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_namespaces_communicate_through_the_switch(number: signal.Signals) -> None:
    """ARP, ping and TCP between the kernels of two namespaces with a TAP port each."""
    with (
        kernel.another_namespace() as one,
        kernel.another_namespace() as two,
        switch(f"tap:sw0@{one}", f"tap:sw1@{two}") as program,
    ):
        for place, name, address in ((one, "sw0", "10.84.0.1/24"), (two, "sw1", "10.84.0.2/24")):
            kernel.inside(place, "ip", "addr", "add", address, "dev", name)
        kernel.inside(one, "ping", "-c", "3", "-i", "0.01", "-W", "5", "10.84.0.2")
        code = (
            "import socket, sys\n"
            "with socket.create_server(('10.84.0.2', 5)) as server:\n"
            "    print('listening', flush=True)\n"
            "    sock, _ = server.accept()\n"
            "    print(sum(len(d) for d in iter(lambda: sock.recv(65536), b'')))\n"
        )
        listener = ["nsenter", f"--net={two}", sys.executable, "-c", code]
        send = "import socket; socket.create_connection(('10.84.0.2', 5)).sendall(bytes(3_000_000))"
        with running(listener, "listening") as far:
            kernel.inside(one, sys.executable, "-c", send)
            assert far.wait()[-1] == "3000000"
        lines = program.end(number)
    assert counters(lines, f"tap:sw0@{one}")["malformed"] == 0
    assert counters(lines, f"tap:sw1@{two}")["sent"] > 2000


def test_streams_datagrams_and_a_tap_on_one_switch(tmp_path: Path) -> None:
    """Frames of all sizes from each kind of port to every other, over real sockets."""
    path, ours, theirs = (tmp_path / name for name in ("stream", "ours", "theirs"))
    tcp = free_port(socket.SOCK_STREAM)
    udp = free_port(socket.SOCK_DGRAM)
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        far.bind(("127.0.0.1", 0))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        unix.bind(str(theirs))
        program = stack.enter_context(
            switch(
                f"unix:{path}",
                f"tcp:127.0.0.1:{tcp}",
                f"udp:127.0.0.1:{udp}=127.0.0.1:{far.getsockname()[1]}",
                f"dgram:{ours}={theirs}",
            )
        )
        far.connect(("127.0.0.1", udp))
        unix.connect(str(ours))
        wires = [stack.enter_context(plugged(path)), stack.enter_context(plugged(path))]
        inet = stack.enter_context(socket.create_connection(("127.0.0.1", tcp)))
        wires += [Wire(inet), Wire(far), Wire(unix)]
        macs = [bytes((2, 0, 0, 0, 1, number)) for number in range(len(wires))]
        # Every port must hear all others, which are then learned. The switch may accept a
        # connection after the first frames, so repeat them until all have arrived.
        for wire in wires:
            wire.sock.settimeout(0.1)
        for wire, mac in zip(wires, macs, strict=True):
            for other in wires:
                if other is not wire:
                    hear(wire, frame(EVERYBODY, mac, "hello"), other)
        for wire in wires:
            drain(wire)
            wire.sock.settimeout(10)
        for size in (14, 60, 1514, 9000):
            for number, wire in enumerate(wires):
                for target, other in enumerate(wires):
                    if target != number:
                        data = (macs[target] + macs[number] + EXPERIMENTAL).ljust(size, b"x")
                        wire.send(data)
                        assert other.receive() == data
        # No frame went to a wrong port.
        for wire in wires:
            wire.sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                wire.sock.recv(1)
        lines = program.end()
        assert not path.exists()
        assert not ours.exists()
    for port in (f"unix:{path}", f"tcp:127.0.0.1:{tcp}", f"dgram:{ours}={theirs}"):
        found = counters(lines, port)
        assert found["received"] >= 17
        assert (found["dropped"], found["malformed"]) == (0, 0)


def hear(wire: Wire, data: bytes, other: Wire) -> None:
    for _ in range(100):
        wire.send(data)
        try:
            while other.receive() != data:
                pass
        except TimeoutError:
            continue
        return
    raise AssertionError("never heard")


def drain(wire: Wire) -> None:
    with contextlib.suppress(TimeoutError):
        while wire.receive():
            pass


def test_a_port_that_never_reads_hinders_nobody(tmp_path: Path) -> None:
    """Its frames are dropped and counted, and their memory is bounded."""
    path = tmp_path / "stream"
    with switch(f"unix:{path}") as program, plugged(path) as a, plugged(path) as b, plugged(path):
        a.sock.settimeout(0.1)
        b.sock.settimeout(0.1)
        hear(a, frame(EVERYBODY, A, "hello"), b)
        hear(b, frame(EVERYBODY, B, "hello"), a)
        drain(a)
        a.sock.settimeout(10)
        for number in range(3000):  # 3 MB for the third, which reads nothing; it has room for 1.2
            data = frame(EVERYBODY, B, str(number)).ljust(1000)
            b.send(data)
            assert a.receive() == data
        lines = program.end()
    assert 500 < counters(lines, f"unix:{path}")["dropped"] < 2500


@pytest.mark.parametrize("length", [0xFFFFFFFF, 65_555])
def test_a_stream_that_lost_its_way_is_closed(tmp_path: Path, length: int) -> None:
    path = tmp_path / "stream"
    with switch(f"unix:{path}") as program:
        with plugged(path) as wire:
            wire.sock.sendall(length.to_bytes(4, "big") + bytes(100))
            with contextlib.suppress(ConnectionResetError):
                assert wire.sock.recv(1) == b""
        with plugged(path) as a, plugged(path) as b:  # these have not
            b.sock.settimeout(0.1)
            hear(a, frame(EVERYBODY, A), b)
        assert counters(program.end(), f"unix:{path}")["malformed"] == 1


def test_a_stream_may_come_in_pieces_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    frames = [frame(EVERYBODY, A, str(number)) for number in range(20)]
    data = b"".join(len(each).to_bytes(4, "big") + each for each in frames)
    with switch(f"unix:{path}") as program, plugged(path) as a, plugged(path) as b:
        b.sock.settimeout(0.1)
        hear(a, frame(EVERYBODY, A, "hello"), b)
        drain(b)
        b.sock.settimeout(10)
        for start in range(0, len(data), 7):
            a.sock.sendall(data[start : start + 7])
        assert [b.receive() for _ in frames] == frames
        program.end()


def test_datagrams_of_others_are_left_alone(tmp_path: Path) -> None:
    path, udp = tmp_path / "stream", free_port(socket.SOCK_DGRAM)
    port = f"udp:127.0.0.1:{udp}=127.0.0.2:{udp}"
    with (
        switch(f"unix:{path}", port) as program,
        plugged(path) as wire,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        stranger.sendto(frame(EVERYBODY, B, "stranger"), ("127.0.0.1", udp))
        peer.bind(("127.0.0.2", udp))
        peer.connect(("127.0.0.1", udp))
        wire.sock.settimeout(0.1)
        hear(Wire(peer), frame(EVERYBODY, A, "peer"), wire)
        drain(wire)
        found = counters(program.end(), port)
    assert found["filtered"] == 1


def test_a_tap_that_goes_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with (
        switch("tap:sw0", f"unix:{path}") as program,
        plugged(path) as a,
        plugged(path) as b,
    ):
        ip("link", "del", "dev", "sw0")
        program.expect("sw0")
        b.sock.settimeout(0.1)
        hear(a, frame(EVERYBODY, A, "hello"), b)
        program.process.send_signal(signal.SIGUSR1)
        program.expect(f"unix:{path} received")
        program.end()


def test_a_socket_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with switch(f"unix:{path}") as program:
        program.process.kill()
    assert path.is_socket()
    with switch(f"unix:{path}") as program:
        program.end()
    assert not path.exists()


# --- QEMU ----------------------------------------------------------------------------------------


@pytest.mark.peers
def test_machines_that_boot_from_it(tmp_path: Path) -> None:
    """iPXE asks for an address through a stream and through datagrams; a TAP receives both."""
    path, ours, theirs = (tmp_path / name for name in ("stream", "ours", "theirs"))
    udp, far = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)
    inet = f"local.type=inet,local.host=127.0.0.1,local.port={far}"
    inet += f",remote.type=inet,remote.host=127.0.0.1,remote.port={udp}"
    netdevs = [
        f"stream,addr.type=unix,addr.path={path},server=off",
        f"dgram,local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}",
        f"dgram,{inet}",
    ]
    wanted = {bytes.fromhex(f"02000000009{number}") for number in range(len(netdevs))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            switch(
                "tap:sw0",
                f"unix:{path}",
                f"dgram:{ours}={theirs}",
                f"udp:127.0.0.1:{udp}=127.0.0.1:{far}",
            )
        )
        sock = stack.enter_context(
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        )
        sock.bind(("sw0", 0))
        sock.settimeout(40)
        for netdev, mac in zip(netdevs, sorted(wanted), strict=True):
            stack.enter_context(booting(netdev, mac.hex(":")))
        while wanted:
            data = sock.recv(2048)
            # From port 68 to 67: a BOOTREQUEST of the machine (RFC 2131).
            if data[34:38] == b"\0\x44\0\x43" and data[42] == 1 and data[70:76] == data[6:12]:
                assert data[:6] == EVERYBODY
                wanted.discard(data[6:12])


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "--port"),
        (["--port", "nothing"], 2, "not a valid port"),
        (["--port", "tap:"], 2, "1 to 15"),
        (["--port", "tap:a/b"], 2, "a/b"),
        (["--port", "unix:"], 2, "not a valid port"),
        (["--port", "dgram:/x"], 2, "not a valid port"),
        (["--port", "udp:127.0.0.1:1"], 2, "not a valid port"),
        (["--port", "udp:localhost:1=127.0.0.1:2"], 2, "localhost"),
        (["--port", "udp:127.0.0.1:0=127.0.0.1:2"], 2, "1 to 65535"),
        (["--port", "udp:[::1]:1=[::g]:2"], 2, "::g"),
        (["--ageing", "0", "--port", "tap:sw0"], 2, "--ageing"),
        (["--port", "tap:lo"], 1, "not a TAP"),
        (["--port", "tap:sw0@/nothing"], 1, "/nothing"),
        (["--port", "unix:/nothing/here"], 1, "/nothing/here"),
        (["--port", "udp:192.0.2.1:5=192.0.2.2:5"], 1, "192.0.2.1"),
        (["--port", "tap:sw0", "--port", "unix:/dev/null"], 1, "/dev/null"),
    ],
)
def test_invalid_options_are_refused_with_a_reason(
    words: list[str], status: int, said: str
) -> None:
    done = subprocess.run(
        example("virtual_switch.py", *words), capture_output=True, text=True, timeout=20
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert kernel.names() == []
