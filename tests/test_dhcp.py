"""The parts of examples/dhcp_server.py: messages, leases and rules, with a simulated clock."""

import argparse
import asyncio
import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotun
from aiotun.testing import memory_pair

from .integration.programs import example_module

wire = example_module("_dhcp_message")
table = example_module("_dhcp_leases")
rules = example_module("_dhcp_rules")
frames = example_module("_dhcp_frames")
Message, Opt, Type, Leases = wire.Message, wire.Opt, wire.Type, table.Leases

SERVER = IPv4Interface("10.85.0.1/24")
FIRST, SECOND, LAST = (IPv4Address(f"10.85.0.{number}") for number in (10, 11, 12))
NOBODY = IPv4Address(0)
HOUR = 3600.0


def mac(number: int) -> bytes:
    return b"\x02\x00\x00\x00" + number.to_bytes(2, "big")


class Bench:
    """A server with three addresses, and its clients."""

    def __init__(self, file: Path | str = ":memory:", lease: float = HOUR) -> None:
        self.now = 1_000_000.0
        self.leases = Leases(FIRST, LAST, file)
        self.rules = rules.Rules(rules.Config(SERVER, lease), self.leases)

    def say(self, kind: Any, number: int, direct: bool = False, **fields: Any) -> Any:
        """Send a client's message to the rules; return their answer: a message, a Probe or None."""
        options = {Opt[name.upper()]: value for name, value in fields.pop("opt", {}).items()}
        message = Message(kind, 7, mac(number), options=options, **fields)
        return self.rules.handle(message, self.now, direct)

    def offer(self, number: int, **fields: Any) -> IPv4Address:
        """Discover, with a probe that gets no answer."""
        answer = self.say(Type.DISCOVER, number, **fields)
        if isinstance(answer, rules.Probe):
            answer = self.rules.probed(answer, None, self.now)
        assert answer.type is Type.OFFER
        return IPv4Address(answer.yiaddr)

    def select(self, number: int, address: IPv4Address) -> Any:
        opt = {"server": SERVER.ip.packed, "requested_address": address.packed}
        return self.say(Type.REQUEST, number, opt=opt)

    def lease(self, number: int) -> IPv4Address:
        address = self.offer(number)
        answer = self.select(number, address)
        assert (answer.type, answer.yiaddr) == (Type.ACK, address)
        return address

    def reboot(self, number: int, address: IPv4Address) -> Any:
        return self.say(Type.REQUEST, number, opt={"requested_address": address.packed})

    def renew(self, number: int, address: IPv4Address, direct: bool = True) -> Any:
        return self.say(Type.REQUEST, number, direct=direct, ciaddr=address)


@pytest.fixture
def bench() -> Any:
    made = Bench()
    yield made
    made.leases.close()


def kind(answer: Any) -> str | None:
    return None if answer is None else str(answer.type.name)


# --- What clients do -----------------------------------------------------------------------------


def test_a_lease_and_what_comes_with_it() -> None:
    leases = Leases(FIRST, LAST)
    router, dns = IPv4Address("10.85.0.2"), (IPv4Address("9.9.9.9"), IPv4Address("1.1.1.1"))
    config = rules.Config(SERVER, 1000.0, router, dns, b"boot")
    server = rules.Rules(config, leases)
    options = {Opt.CLIENT: b"\0client", Opt.RELAY: b"\1\2ab"}
    probe = server.handle(Message(Type.DISCOVER, 99, mac(1), True, options=options), 0.0)
    assert probe.address == FIRST
    answer = Message.parse(server.probed(probe, None, 0.0).pack(), 2)
    assert (answer.type, answer.xid, answer.chaddr) == (Type.OFFER, 99, mac(1))
    assert (answer.yiaddr, answer.siaddr, answer.file) == (FIRST, SERVER.ip, b"boot")
    assert answer.broadcast
    assert answer.options == {
        Opt.SERVER: SERVER.ip.packed,
        Opt.MASK: bytes((255, 255, 255, 0)),
        Opt.BROADCAST: IPv4Address("10.85.0.255").packed,
        Opt.ROUTER: router.packed,
        Opt.DNS: dns[0].packed + dns[1].packed,
        Opt.LEASE_TIME: (1000).to_bytes(4, "big"),
        Opt.T1: (500).to_bytes(4, "big"),
        Opt.T2: (875).to_bytes(4, "big"),
        Opt.CLIENT: b"\0client",
        Opt.RELAY: b"\1\2ab",
    }
    assert leases.of(b"\0client") is None  # an offer is no lease
    leases.close()


def test_three_clients_have_three_addresses_and_the_fourth_none(bench: Bench) -> None:
    assert [bench.lease(number) for number in (1, 2, 3)] == [FIRST, SECOND, LAST]
    assert bench.say(Type.DISCOVER, 4) is None
    assert bench.rules.counters["exhausted"] == 1
    # Until a lease expires: the one that ended first is taken.
    bench.now += HOUR - 1
    for number, address in ((1, FIRST), (3, LAST)):
        assert kind(bench.renew(number, address)) == "ACK"
    bench.now += 1
    assert bench.lease(4) == SECOND
    assert kind(bench.renew(2, SECOND)) == "NAK"


def test_addresses_are_offered_once(bench: Bench) -> None:
    assert [bench.offer(number) for number in (1, 2, 3)] == [FIRST, SECOND, LAST]
    assert bench.say(Type.DISCOVER, 4) is None
    assert bench.offer(2) == SECOND  # again
    bench.now += rules.OFFER_TIME
    assert bench.offer(4) == FIRST
    # An address that was offered to another client meanwhile is not granted.
    assert kind(bench.select(1, FIRST)) == "NAK"
    assert kind(bench.select(4, FIRST)) == "ACK"


def test_a_client_gets_what_it_had(bench: Bench) -> None:
    bench.lease(1)
    assert bench.lease(2) == SECOND
    bench.now += 10 * HOUR
    assert bench.offer(2) == SECOND
    bench.select(2, SECOND)
    # Without a probe, as the client has the address.
    assert bench.say(Type.DISCOVER, 2).yiaddr == SECOND


def test_a_wish_is_granted_where_it_can_be(bench: Bench) -> None:
    def wish(address: IPv4Address) -> dict[str, bytes]:
        return {"requested_address": address.packed}

    assert bench.offer(1, opt=wish(LAST)) == LAST
    assert bench.offer(2, opt=wish(LAST)) == FIRST
    assert bench.offer(3, opt=wish(SERVER.ip)) == SECOND


def test_the_servers_own_address_is_nobodys() -> None:
    leases = Leases(SERVER.ip, FIRST)
    server = rules.Rules(rules.Config(SERVER), leases)
    probe = server.handle(Message(Type.DISCOVER, 7, mac(1)), 0.0)
    assert probe.address == SERVER.ip + 1
    leases.close()


def test_an_address_in_use_is_not_offered(bench: Bench) -> None:
    probe = bench.say(Type.DISCOVER, 1)
    again = bench.rules.probed(probe, mac(99), bench.now)
    assert (probe.address, again.address) == (FIRST, SECOND)
    assert bench.rules.probed(again, None, bench.now).yiaddr == SECOND
    assert bench.rules.counters["in_use"] == 1
    # For an hour.
    assert bench.lease(2) == LAST
    assert bench.say(Type.DISCOVER, 3) is None
    bench.now += rules.BLOCK_TIME
    bench.renew(2, LAST)
    assert bench.offer(3) == SECOND  # which client 1 never took
    assert bench.offer(4) == FIRST


def test_the_client_itself_may_answer_a_probe(bench: Bench) -> None:
    bench.lease(1)
    bench.now += 2 * HOUR
    probe = bench.say(Type.DISCOVER, 1)
    assert bench.rules.probed(probe, mac(1), bench.now).yiaddr == FIRST


def test_who_asks_again_during_a_probe_is_answered_once(bench: Bench) -> None:
    probe = bench.say(Type.DISCOVER, 1)
    message = Message(Type.DISCOVER, 8, mac(1))
    assert bench.rules.handle(message, bench.now) is None
    assert bench.rules.probed(probe, None, bench.now).xid == 8


def test_an_offer_taken_back_during_its_probe(bench: Bench) -> None:
    """The client chose another server: the address is not offered before the probe is over."""
    probe = bench.say(Type.DISCOVER, 1)
    opt = {"server": SECOND.packed, "requested_address": FIRST.packed}
    assert bench.say(Type.REQUEST, 1, opt=opt) is None
    assert bench.rules.counters["chose_another_server"] == 1
    assert bench.offer(2) == SECOND
    assert bench.rules.probed(probe, None, bench.now) is None
    assert bench.offer(3) == LAST
    assert bench.offer(4) == FIRST


@pytest.mark.parametrize(
    ("wanted", "direct", "expected"),
    [
        (FIRST, True, "ACK"),
        (FIRST, False, "ACK"),
        (SECOND, True, "NAK"),
        (SECOND, False, "NAK"),
        (IPv4Address("192.0.2.1"), False, "NAK"),
    ],
)
def test_renewing_and_rebinding(
    bench: Bench, wanted: IPv4Address, direct: bool, expected: str
) -> None:
    bench.lease(1)
    bench.now += HOUR - 1
    answer = bench.renew(1, wanted, direct)
    assert kind(answer) == expected
    if expected == "ACK":
        assert bench.leases.of(b"\1" + mac(1)).expires == bench.now + HOUR


@pytest.mark.parametrize(
    ("client", "wanted", "expected"),
    [
        (1, FIRST, "ACK"),
        (1, SECOND, "NAK"),
        (2, FIRST, "NAK"),
        (2, SECOND, None),  # another server may know it
        (2, IPv4Address("192.0.2.1"), "NAK"),  # the wrong network
    ],
)
def test_a_rebooting_client_is_confirmed_refused_or_ignored(
    bench: Bench, client: int, wanted: IPv4Address, expected: str | None
) -> None:
    bench.lease(1)
    assert kind(bench.reboot(client, wanted)) == expected


def test_a_renewal_of_what_nobody_knows(bench: Bench) -> None:
    assert kind(bench.renew(1, FIRST, direct=True)) == "NAK"
    assert kind(bench.renew(1, FIRST, direct=False)) is None
    assert bench.rules.counters["unknown_clients"] == 1


def test_released_is_free_but_remembered(bench: Bench) -> None:
    for number in (1, 2, 3):
        bench.lease(number)
    assert bench.say(Type.RELEASE, 2, ciaddr=FIRST) is None  # not its own
    assert bench.say(Type.DISCOVER, 4) is None
    bench.say(Type.RELEASE, 2, ciaddr=SECOND)
    bench.say(Type.RELEASE, 1, ciaddr=FIRST, opt={"server": LAST.packed})
    assert bench.rules.counters["not_theirs"] == 1
    assert bench.rules.counters["for_another_server"] == 1
    assert bench.offer(2) == SECOND
    bench.now += rules.OFFER_TIME
    assert bench.offer(4) == SECOND


def test_declined_is_nobodys_for_an_hour(bench: Bench) -> None:
    bench.lease(1)
    assert bench.say(Type.DECLINE, 2, opt={"requested_address": FIRST.packed}) is None
    assert bench.leases.at(FIRST).client is not None
    bench.say(Type.DECLINE, 1, opt={"requested_address": FIRST.packed})
    assert bench.leases.at(FIRST).client is None
    assert bench.rules.counters["blocked"] == 1
    assert [bench.offer(number) for number in (1, 2)] == [SECOND, LAST]
    assert bench.say(Type.DISCOVER, 3) is None
    bench.now += rules.BLOCK_TIME
    assert [bench.offer(number) for number in (3, 4, 5)] == [SECOND, LAST, FIRST]


def test_inform_is_answered_without_a_lease(bench: Bench) -> None:
    address = IPv4Address("10.85.0.200")
    answer = bench.say(Type.INFORM, 1, ciaddr=address)
    assert (answer.type, answer.yiaddr, answer.ciaddr) == (Type.ACK, NOBODY, address)
    assert Opt.LEASE_TIME not in answer.options
    assert Opt.MASK in answer.options
    assert bench.say(Type.INFORM, 1) is None
    assert list(bench.leases) == []


@pytest.mark.parametrize("strange", [Type.OFFER, Type.ACK, Type.NAK, None])
def test_messages_that_no_client_sends_are_counted(bench: Bench, strange: Any) -> None:
    assert bench.say(strange, 1) is None
    counted = "bootp" if strange is None else "not_from_a_client"
    assert bench.rules.counters[counted] == 1


def test_relayed_messages_of_the_own_network_are_answered(bench: Bench) -> None:
    relay = IPv4Address("10.85.0.254")
    probe = bench.say(Type.DISCOVER, 1, giaddr=relay, hops=1)
    answer = bench.rules.probed(probe, None, bench.now)
    assert answer.giaddr == relay
    assert bench.say(Type.DISCOVER, 2, giaddr=IPv4Address("192.0.2.1")) is None
    assert bench.rules.counters["relayed"] == 2
    assert bench.rules.counters["relayed_from_elsewhere"] == 1
    # A relay broadcasts a refusal.
    opt = {"server": SERVER.ip.packed, "requested_address": LAST.packed}
    assert bench.say(Type.REQUEST, 1, giaddr=relay, opt=opt).broadcast


# --- Where answers go ----------------------------------------------------------------------------

RELAY = IPv4Address("10.85.0.254")


@pytest.mark.parametrize(
    ("fields", "target", "port", "to"),
    [
        ({"yiaddr": FIRST}, FIRST, 68, mac(1)),
        ({"yiaddr": FIRST, "broadcast": True}, IPv4Address("255.255.255.255"), 68, b"\xff" * 6),
        ({"yiaddr": FIRST, "ciaddr": FIRST}, FIRST, 68, mac(9)),
        ({"yiaddr": FIRST, "giaddr": RELAY}, RELAY, 67, mac(9)),
        ({"type": Type.NAK}, IPv4Address("255.255.255.255"), 68, b"\xff" * 6),
        ({"type": Type.NAK, "giaddr": RELAY}, RELAY, 67, mac(9)),
    ],
)
def test_answers_go_to_the_address_that_rfc_2131_names(
    fields: dict[str, Any], target: IPv4Address, port: int, to: bytes
) -> None:
    answer = Message(**{"type": Type.ACK, "xid": 7, "chaddr": mac(1), **fields})
    asker = frames.Datagram(mac(9), SERVER.ip, b"")
    frame = frames.deliver(answer, asker, mac(50), SERVER.ip)
    assert frame[:12] == to + mac(50)
    assert frame[26:34] == SERVER.ip.packed + target.packed
    assert frame[34:38] == (67).to_bytes(2, "big") + port.to_bytes(2, "big")


# --- Leases --------------------------------------------------------------------------------------


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    before = Bench(tmp_path / "leases.db")
    for number in (1, 2):
        before.lease(number)
    before.say(Type.DECLINE, 1, opt={"requested_address": FIRST.packed})
    offered = before.offer(3)
    found = set(before.leases)
    before.leases.close()
    after = Bench(tmp_path / "leases.db")
    assert set(after.leases) == found
    assert kind(after.renew(2, SECOND)) == "ACK"
    # The offer is not stored, but the server still keeps its promise.
    assert kind(after.select(3, offered)) == "ACK"
    assert after.say(Type.DISCOVER, 4) is None
    after.leases.close()


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    first = Leases(FIRST, LAST, tmp_path / "leases.db")
    first.grant(FIRST, b"one", 0.0, HOUR)
    first.commit()
    first.grant(SECOND, b"two", 0.0, HOUR)
    first._db.close()  # as a kill would
    second = Leases(FIRST, LAST, tmp_path / "leases.db")
    assert [lease.client for lease in second] == [b"one"]
    second.close()


class Witness:
    """A server's TAP. For each sent frame it reads a copy of the file, as if after a kill."""

    def __init__(self, tap: aiotun.TapDevice, file: Path) -> None:
        self._tap, self._file = tap, file
        self.promised: set[IPv4Address] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tap, name)

    def send_nowait(self, frame: bytes) -> None:
        message = Message.parse(frame[42:], 2) if frame[34:36] == b"\0\x43" else None
        if message is not None and message.type is Type.ACK:
            self.promised.add(message.yiaddr)
            copy = self._file.parent / f"copy{len(self.promised)}"
            copy.mkdir(exist_ok=True)
            for each in self._file.parent.glob("leases.db*"):
                shutil.copy(each, copy)
            with Leases(FIRST, LAST, copy / "leases.db") as found:
                assert {lease.address for lease in found} >= self.promised
        self._tap.send_nowait(frame)


async def test_what_a_client_is_told_is_in_the_file_by_then(tmp_path: Path) -> None:
    """Three clients, whose requests the server reads together."""
    server = example_module("dhcp_server")
    args = argparse.Namespace(
        mac=mac(99), address=SERVER, probe=0.01, lease=HOUR, router=NOBODY, dns=[], boot_file=b""
    )
    ours, theirs = memory_pair("tap")
    async with ours, theirs:
        with Leases(FIRST, LAST, tmp_path / "leases.db") as leases:
            witness = Witness(ours, tmp_path / "leases.db")
            serving = asyncio.create_task(server.Server(witness, args, leases).serve())
            for step in (Type.DISCOVER, Type.REQUEST):
                for number, address in enumerate((FIRST, SECOND, LAST)):
                    options = {Opt.REQUESTED_ADDRESS: address.packed}
                    message = Message(step, number, mac(number), options=options)
                    if step is Type.REQUEST:
                        message.options[Opt.SERVER] = SERVER.ip.packed
                    ends = (NOBODY, IPv4Address("255.255.255.255"))
                    macs = (mac(number), frames.EVERYBODY)
                    theirs.send_nowait(frames.udp(macs, ends, (68, 67), message.pack(1)))
                answers = 0
                while answers < 3:
                    frame = await asyncio.wait_for(theirs.recv(), 10)
                    answers += frame[12:14] == b"\x08\x00"  # and not the server's probe
            ours.close()
            await serving
    assert witness.promised == {FIRST, SECOND, LAST}


def test_a_kill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """The file may have any part of the last write; earlier commits must be complete.

    SQLite appends to a log. A kill leaves the bytes that the kernel has received, which may be any
    beginning of the write.
    """
    file, log = tmp_path / "leases.db", tmp_path / "leases.db-wal"
    last = FIRST + 9
    leases = Leases(FIRST, last, file)
    committed = [(0, set[Any]()), (log.stat().st_size, set(leases))]
    for number in range(10):
        leases.grant(FIRST + number, b"%d" % number, 0.0, HOUR)
        if number % 3 == 2:  # give one back, and take one away, in the same commit
            leases.release(leases.of(b"%d" % (number - 1)), 1.0)
            leases.grant(FIRST + number - 1, b"%d" % number, 2.0, HOUR)
        leases.commit()
        committed.append((log.stat().st_size, set(leases)))
    sizes = [size for size, _ in committed]
    assert len(set(sizes)) == len(sizes)  # each commit was written when it returned
    whole, written = file.read_bytes(), log.read_bytes()
    leases.close()
    for cut in sorted({*range(0, len(written), 977), *sizes, *(size - 1 for size in sizes[1:])}):
        place = tmp_path / str(cut)
        place.mkdir()
        (place / "leases.db").write_bytes(whole)
        (place / "leases.db-wal").write_bytes(written[:cut])
        (*_, (_, wanted)) = [state for state in committed if state[0] <= cut]
        with Leases(FIRST, last, place / "leases.db") as found:
            assert set(found) == wanted, cut


def test_two_servers_on_one_file_are_refused(tmp_path: Path) -> None:
    first = Leases(FIRST, LAST, tmp_path / "leases.db")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Leases(FIRST, LAST, tmp_path / "leases.db")
    first.close()
    Leases(FIRST, LAST, tmp_path / "leases.db").close()


def test_leases_outside_a_new_range_are_kept_but_not_given(tmp_path: Path) -> None:
    """A client may have a lease outside of the new range and get another inside."""
    first = Bench(tmp_path / "leases.db")
    assert first.lease(1) == FIRST
    first.leases.close()
    narrow = Leases(SECOND, LAST, tmp_path / "leases.db")
    assert list(narrow) == []
    assert not narrow.free(FIRST, b"\1" + mac(1), 0.0)
    narrow.grant(SECOND, b"\1" + mac(1), 0.0, HOUR)
    narrow.close()
    wide = Leases(FIRST, LAST, tmp_path / "leases.db")
    assert [lease.address for lease in wide] == [SECOND]
    wide.close()


STEPS = st.tuples(
    st.sampled_from(["grant", "release", "block"]),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 30),
)


@given(st.lists(STEPS, max_size=30))
def test_no_address_and_no_client_twice(steps: list[tuple[str, int, int, int]]) -> None:
    """After any steps memory and file agree, and no lease was given to another client."""
    leases = Leases(FIRST, FIRST + 3)
    now = 0.0
    for what, client, offset, later in steps:
        now += later
        address, name = FIRST + offset, b"%d" % client
        before = leases.at(address)
        if what == "grant":
            others = before and before.client != name and before.expires > now
            assert leases.free(address, name, now) == (not others)
            if not others:
                leases.grant(address, name, now, 20.0)
        elif what == "release" and leases.of(name):
            leases.release(leases.of(name), now)
        elif what == "block":
            leases.block(address, now, 50.0)
        rows = leases._db.execute("select address, client, expires from leases").fetchall()
        assert {(int(each.address), each.client, each.expires) for each in leases} == set(rows)
        owners = [each.client for each in leases if each.client is not None]
        assert len(owners) == len(set(owners))
        assert all(leases.of(each.client) == each for each in leases if each.client is not None)
    leases.close()


# --- Bytes ---------------------------------------------------------------------------------------


def discover(**options: bytes) -> bytes:
    found = {Opt[name.upper()]: value for name, value in options.items()}
    return bytes(Message(Type.DISCOVER, 7, mac(1), options=found).pack(1))


GOOD = discover()


def changed(at: int, value: bytes) -> bytes:
    return GOOD[:at] + value + GOOD[at + len(value) :]


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        GOOD[:239],
        changed(0, b"\2"),  # a server's
        changed(1, b"\6"),  # another hardware
        changed(2, b"\x10"),
        changed(236, b"\0"),  # the cookie
        changed(28, b"\1"),  # a group's address
        changed(28, bytes(6)),
        changed(242, b"\x09"),  # type 9
    ],
)
def test_malformed_messages_are_refused(bad: bytes) -> None:
    with pytest.raises(wire.MalformedError):
        Message.parse(bad)


OVERLOADED = changed(243, b"\x34\1\1\xff")  # the field "file", bytes 108 to 235, has options
MALFORMED = {
    "61 of 0 bytes": GOOD[:243] + b"\x3d\0\xff",
    "61 of 1 byte": GOOD[:243] + b"\x3d\1a\xff",
    "50 of 0 bytes": GOOD[:243] + b"\x32\0\xff",
    "50 of 8 bytes": GOOD[:243] + b"\x32\x08\x0a\x55\0\x0b\x0a\x55\0\x0b\xff",
    "54 of 0 bytes": GOOD[:243] + b"\x36\0\xff",
    "54 of 3 bytes": GOOD[:243] + b"\x36\3abc\xff",
    "53 twice": GOOD[:243] + b"\x35\1\3\xff",
    "53 of 2 bytes and then of 1": GOOD[:240] + b"\x35\2\1\1" + GOOD[240:],
    "52 of 0 bytes": GOOD[:243] + b"\x34\0\xff",
    "52 that is 4": GOOD[:243] + b"\x34\1\4\xff",
    "52 in another field": OVERLOADED[:108] + b"\x34\1\2\xff" + OVERLOADED[112:],
    "one without a length": GOOD[:243] + b"\x0c",
    "one that is cut short": GOOD[:243] + b"\x0c\5abcd",
    "one that is cut short in another field": OVERLOADED[:234] + b"\x0c\2" + OVERLOADED[236:],
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_option_is_dropped_and_counted(bench: Bench, data: bytes) -> None:
    message = Message.parse(data)
    assert (message.type, message.malformed) == (Type.DISCOVER, 1)
    assert message.options == {}
    assert message.client == b"\1" + mac(1)
    probe = bench.rules.handle(message, bench.now)
    assert kind(bench.rules.probed(probe, None, bench.now)) == "OFFER"
    assert bench.rules.counters["malformed_options"] == 1


def test_a_malformed_server_identifier_does_not_cost_the_lease(bench: Bench) -> None:
    address = bench.offer(1)
    request = Message(Type.REQUEST, 7, mac(1), options={Opt.REQUESTED_ADDRESS: address.packed})
    data = request.pack(1)
    message = Message.parse(data[: data.index(b"\xff", 240)] + b"\x36\0\xff")
    assert message.malformed == 1
    assert kind(bench.rules.handle(message, bench.now)) == "ACK"


def test_options_in_pieces_and_in_other_fields() -> None:
    long = bytes(range(256)) * 2
    message = Message.parse(discover(client=long))
    assert message.options[Opt.CLIENT] == long
    assert message.client == long
    overloaded = changed(243, b"\x34\1\3\xff")
    overloaded = overloaded[:108] + b"\x0c\4host\xff" + overloaded[115:]
    overloaded = overloaded[:44] + b"\x3d\3\0id\xff" + overloaded[50:]
    message = Message.parse(overloaded)
    assert message.options == {Opt.HOSTNAME: b"host", Opt.CLIENT: b"\0id"}


def test_unknown_options_are_counted_and_harmless(bench: Bench) -> None:
    message = Message(Type.DISCOVER, 7, mac(1), options={224: b"x", Opt.HOSTNAME: b"h"})
    assert isinstance(bench.rules.handle(Message.parse(message.pack(1)), 0.0), rules.Probe)
    assert bench.rules.counters["unknown_options"] == 1


def test_a_missing_end_option_is_tolerated() -> None:
    assert Message.parse(GOOD[:243]).type is Type.DISCOVER


@given(st.binary(max_size=400), st.dictionaries(st.integers(0, 299), st.integers(0, 255)))
def test_hostile_messages_do_no_harm(noise: bytes, changes: dict[int, int]) -> None:
    damaged = bytes(changes.get(at, value) for at, value in enumerate(GOOD))
    bench = Bench()
    for data in (noise, damaged, GOOD[:240] + noise):
        try:
            message = Message.parse(data)
        except wire.MalformedError:
            continue
        answer = bench.rules.handle(message, bench.now)
        if isinstance(answer, rules.Probe):
            answer = bench.rules.probed(answer, None, bench.now)
        if answer is not None:
            Message.parse(answer.pack(), 2)
    bench.leases.close()


# --- Floods --------------------------------------------------------------------------------------

SLASH16 = (IPv4Address("10.86.0.1"), IPv4Address("10.86.255.254"))


class Flood:
    """A server with a /16; each message comes from an unknown client."""

    def __init__(self) -> None:
        self.now = 1e6
        self.leases = Leases(*SLASH16)
        self.rules = rules.Rules(rules.Config(IPv4Interface("10.86.0.1/16")), self.leases)
        self.clients = 0

    def lease_all(self, seconds: float) -> None:
        for number in range(int(SLASH16[0]) + 1, int(SLASH16[1]) + 1):
            self.leases.grant(IPv4Address(number), b"\0%d" % number, self.now, seconds)

    def discover(self, count: int) -> None:
        """Send DISCOVERs; the probes get no answer."""
        for _ in range(count):
            self.clients += 1
            client = b"\2\0" + self.clients.to_bytes(4, "big")
            step = self.rules.handle(Message(Type.DISCOVER, 1, client), self.now)
            if step is not None:
                self.rules.probed(step, None, self.now)

    def seconds_each(self, count: int) -> float:
        before = time.process_time()
        self.discover(count)
        return (time.process_time() - before) / count


def prepare_leased(flood: Flood) -> None:
    flood.lease_all(HOUR)


def prepare_offered(flood: Flood) -> None:
    flood.discover(65_000)


def prepare_offers_that_end(flood: Flood) -> None:
    flood.discover(65_000)
    flood.now += rules.OFFER_TIME


def prepare_leases_that_end(flood: Flood) -> None:
    flood.lease_all(HOUR)
    flood.now += HOUR


@pytest.mark.parametrize(
    "prepare",
    [prepare_leased, prepare_offered, prepare_offers_that_end, prepare_leases_that_end],
)
def test_a_flood_takes_no_longer_where_a_16_is_in_use(prepare: Callable[[Flood], None]) -> None:
    """Measures the time per message: a search of the /16 would take tens of milliseconds."""
    flood = Flood()
    prepare(flood)
    assert flood.seconds_each(1000) < 0.005
    flood.leases.close()


def test_renewals_do_not_fill_the_memory() -> None:
    leases = Leases(FIRST, LAST)
    for number in range(1000):
        leases.grant(FIRST, b"\0a", float(number), HOUR)
    assert len(leases._ending) < 100
    assert leases.unused(1e6, lambda address: address != FIRST) == FIRST
    leases.close()


@given(st.lists(st.tuples(st.sampled_from("dsrbnxw"), st.integers(0, 4)), max_size=60))
def test_every_free_address_is_found(steps: list[tuple[str, int]]) -> None:
    """After any steps a new client gets an address if and only if one is free."""
    bench = Bench()
    for what, number in steps:
        match what:
            case "d":
                bench.say(Type.DISCOVER, number)
            case "s":
                offered = bench.rules._offers.get(b"\1" + mac(number))
                bench.select(number, offered[0] if offered else FIRST)
            case "r":
                lease = bench.leases.of(b"\1" + mac(number))
                bench.say(Type.RELEASE, number, ciaddr=lease.address if lease else FIRST)
            case "b":
                for probe in list(bench.rules._probing.values()):
                    bench.rules.probed(probe, None if number else mac(99), bench.now)
            case "n":
                opt = {"requested_address": FIRST.packed, "server": SERVER.ip.packed}
                bench.say(Type.DECLINE, number, opt=opt)
            case "x":
                bench.now += (1.0, 61.0, 1000.0, HOUR, 2 * HOUR)[number]
            case _:
                bench.say(Type.DISCOVER, number, opt={"requested_address": SECOND.packed})
    bench.rules._expire_offers(bench.now)
    taken = {address for address, _ in bench.rules._offers.values()}
    taken |= {probe.address for probe in bench.rules._probing.values()}
    taken |= {each.address for each in bench.leases if each.expires > bench.now}
    found = bench.say(Type.DISCOVER, 50)
    assert (found is not None) == (len(taken) < 3)
    assert found is None or found.address not in taken
    bench.leases.close()


# --- Frames --------------------------------------------------------------------------------------


def make_frame(payload: bytes = GOOD) -> bytes:
    everybody = IPv4Address("255.255.255.255")
    return bytes(frames.udp((mac(1), b"\xff" * 6), (NOBODY, everybody), (68, 67), payload))


def test_a_datagram_is_read_from_its_frame() -> None:
    frame = make_frame()
    found = frames.read_udp(frame + b"behind")
    assert found == frames.Datagram(mac(1), IPv4Address("255.255.255.255"), GOOD)
    assert frames.read_udp(frame[:40] + b"\0\0" + frame[42:]).payload == GOOD  # no checksum


def test_a_priority_tagged_frame_is_answered_with_its_tag(bench: Bench) -> None:
    frame, tag = make_frame(), b"\x81\0\xe0\0"
    found = frames.read_udp(frame[:12] + tag + frame[12:])
    assert found == frames.Datagram(mac(1), IPv4Address("255.255.255.255"), GOOD, tag)
    answer = Message(Type.OFFER, 7, mac(1))
    plain = frames.deliver(answer, frames.read_udp(frame), mac(50), SERVER.ip)
    assert frames.deliver(answer, found, mac(50), SERVER.ip) == plain[:12] + tag + plain[12:]
    assert frames.read_udp(frame[:12] + b"\x81\0\xe0\5" + frame[12:]) is None  # of VLAN 5
    probe = frames.arp_probe(mac(1), SERVER.ip)
    assert frames.read_arp(probe[:12] + tag + probe[12:]) == frames.read_arp(probe)


@pytest.mark.parametrize(
    "damage",
    [
        lambda frame: frame[:33],
        lambda frame: frame[:-1],
        lambda frame: frame[:14] + b"\x65" + frame[15:],
        lambda frame: frame[:14] + b"\x44" + frame[15:],
        lambda frame: frame[:20] + b"\x20" + frame[21:],  # a fragment
        lambda frame: frame[:22] + b"\x05" + frame[23:],  # the header's checksum
        lambda frame: frame[:39] + b"\x07" + frame[40:],
        lambda frame: frame[:38] + b"\xff" + frame[39:],
        lambda frame: frame[:60] + b"\xaa" + frame[61:],
    ],
)
def test_damaged_datagrams_are_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(wire.MalformedError):
        frames.read_udp(damage(make_frame()))


@given(st.binary(max_size=80), st.dictionaries(st.integers(0, 60), st.integers(0, 255), max_size=4))
def test_hostile_frames_do_no_harm(noise: bytes, changes: dict[int, int]) -> None:
    damaged = bytes(changes.get(at, value) for at, value in enumerate(make_frame()))
    for frame in (noise, damaged, damaged[: len(noise)], damaged[:14] + noise):
        with contextlib.suppress(wire.MalformedError):
            frames.read_udp(frame)
        frames.read_arp(frame)
