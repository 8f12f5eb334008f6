"""The WireGuard example's protocol: two interfaces that exchange bytes, with a simulated clock."""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wireguard import crypto
from wireguard.allowedips import AllowedIPs
from wireguard.config import PeerConfig
from wireguard.cookies import Endpoint
from wireguard.interface import Interface
from wireguard.messages import COOKIE, DATA, INITIATION, RESPONSE, SIZES
from wireguard.runs import Opener, Sealer
from wireguard.session import WINDOW, ReplayWindow
from wireguard.status import text

from .helpers import make_icmp_echo
from .test_gso import Packet, run_of, written
from .wireguard_paths import by_runs, messages_run, packets_run, runs_of

A, B = ("192.0.2.1", 1001), ("192.0.2.2", 1002)
EPOCH = 1_700_000_000.0
PING = make_icmp_echo("10.0.0.1", "10.0.0.2")
PONG = make_icmp_echo("10.0.0.2", "10.0.0.1")


# Of the module: Hypothesis does not reset a fixture of a function between its examples.
@pytest.fixture(autouse=True, scope="module", params=["lists", "runs"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "runs":
            by_runs(patch)
        yield request.param


class World:
    """Interfaces `a` and `b`, which are peers; messages are lost only if `lose` says so."""

    def __init__(self, keepalive: int = 0, handshakes: int = 100, psk: bool = True) -> None:
        keys = {A: os.urandom(32), B: os.urandom(32)}
        shared = os.urandom(32)
        self.now = 1000.0
        self.epoch = EPOCH
        self.sides: dict[Endpoint, Interface] = {}
        self.got: dict[Endpoint, list[bytes]] = {A: [], B: []}
        self.log: list[tuple[Endpoint, Endpoint, bytes]] = []  # from, to, message
        self.lose: Callable[[Endpoint, bytes], bool] = lambda source, message: False
        for own, far, network in ((A, B, "10.0.0.2/32"), (B, A, "10.0.0.1/32")):
            peer = PeerConfig(
                crypto.public_key(keys[far]),
                preshared_key=shared if own == A or psk else bytes(32),
                allowed_ips=[ip_network(network)],
                endpoint=far,
                keepalive=keepalive if own == A else 0,
            )
            self.sides[own] = Interface(
                keys[own], [peer], epoch=lambda: self.epoch, handshakes=handshakes
            )
        self.a, self.b = self.sides[A], self.sides[B]
        (self.pa,), (self.pb,) = self.a.peers.values(), self.b.peers.values()

    def settle(self) -> None:
        """Deliver messages in both directions until there are none."""
        assert all(side.due <= side.deadline() for side in self.sides.values())
        while any(side.outgoing for side in self.sides.values()):
            for source, side in self.sides.items():
                outgoing, side.outgoing = side.outgoing, []
                for target, messages in outgoing:
                    for message in messages:
                        self.log.append((source, target, message))
                        if target in self.sides and not self.lose(source, message):
                            self.take(target, message, source)

    def take(self, target: Endpoint, message: bytes, source: Endpoint) -> None:
        side = self.sides[target]
        self.got[target] += side.receive([message], source, self.now)
        assert side.due <= side.deadline()  # otherwise tick would not be called in time

    def run(self, seconds: float) -> None:
        """Let time pass, and call tick when timers are due."""
        end = self.now + seconds
        while (due := min(side.due for side in self.sides.values())) <= end:
            self.now = max(self.now, due)
            for side in self.sides.values():
                side.tick(self.now)
            self.settle()
        self.now = end

    def ping(self) -> None:
        """One packet each way, which must arrive."""
        before = len(self.got[A]), len(self.got[B])
        self.a.send([PING], self.now)
        self.settle()
        self.b.send([PONG], self.now)
        self.settle()
        assert (self.got[A][before[0] :], self.got[B][before[1] :]) == ([PONG], [PING])

    def count(self, kind: bytes, source: Endpoint | None = None) -> int:
        return sum(
            message[:4] == kind and source in (None, origin) for origin, _, message in self.log
        )

    def drops(self) -> dict[str, int]:
        counted = [self.a.dropped, self.b.dropped, self.pa.dropped, self.pb.dropped]
        return {why: n for each in counted for why, n in each.items() if n}


def state(world: World) -> list[Any]:
    """Everything that a message may change, except counters."""
    found: list[Any] = []
    for side in world.sides.values():
        found += [sorted(side.indices), list(side.outgoing)]
        for peer in side.peers.values():
            values = {k: v for k, v in vars(peer).items() if k not in ("dropped", "stamper")}
            for name in ("current", "previous", "next"):
                session = values.pop(name)
                found.append(session and (session.local, session.sent, session.window.next))
            found.append(sorted((k, repr(v)) for k, v in values.items()))
            found.append(sorted((k, repr(v)) for k, v in vars(peer.stamper).items()))
    return found


# --- Cryptography --------------------------------------------------------------------------------


def test_hchacha20_agrees_with_the_drafts_vector() -> None:
    """draft-irtf-cfrg-xchacha-03, section 2.2.1."""
    found = crypto._hchacha20(bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927"))
    assert found.hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"


def test_xchacha20poly1305_agrees_with_the_drafts_vector() -> None:
    """draft-irtf-cfrg-xchacha-03, appendix A.3.1."""
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    key, nonce = bytes(range(0x80, 0xA0)), bytes(range(0x40, 0x58))
    authenticated = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    sealed = crypto.xaead_seal(key, nonce, plain, authenticated)
    assert sealed[:16].hex() == "bd6d179d3e83d43b9576579493c0e939"
    assert sealed[-16:].hex() == "c0875924c1c7987947deafd8780acf49"
    assert crypto.xaead_open(key, nonce, sealed, authenticated) == plain
    with pytest.raises(crypto.Forged):
        crypto.xaead_open(key, nonce, sealed[:-1] + bytes([sealed[-1] ^ 1]), authenticated)


def test_a_key_of_small_order_is_refused() -> None:
    with pytest.raises(crypto.Forged):
        crypto.dh(os.urandom(32), bytes(32))


def test_timestamps_sort_as_time_does() -> None:
    times = [EPOCH, EPOCH + 0.02, EPOCH + 1, EPOCH + 1.9, EPOCH + 70_000]
    stamps = [crypto.tai64n(each) for each in times]
    assert stamps == sorted(set(stamps))
    assert stamps[0][:8].hex() == "400000006553f10a"  # as computed with `date +%s` and libtai


# --- Handshakes ----------------------------------------------------------------------------------


def test_packets_both_ways_after_one_handshake() -> None:
    world = World()
    world.ping()
    for _ in range(5):
        world.ping()
    assert (world.count(INITIATION), world.count(RESPONSE)) == (1, 1)
    assert {len(m) for _, _, m in world.log if m[:4] == INITIATION} == {SIZES[INITIATION]}
    assert world.drops() == {}
    assert world.pa.last_handshake == world.pb.last_handshake == world.now
    assert world.pa.sent_bytes == world.pb.received_bytes
    assert world.pb.sent_bytes == world.pa.received_bytes


def test_what_was_sent_before_the_session_waits_for_it() -> None:
    world = World()
    packets = [PING[:-1] + bytes([number]) for number in range(200)]
    world.a.send(packets, world.now)
    world.settle()
    assert world.got[B] == packets[-128:]
    assert world.drops() == {"no session in time": 72}


def test_a_responder_waits_until_the_session_is_confirmed() -> None:
    """Section 5.4.5: a response may be lost, and then the initiator could not read its data."""
    world = World()
    world.lose = lambda source, message: (
        message[:4] == DATA or ((source, message[:4]) == (B, INITIATION))
    )
    world.a.send([PING], world.now)
    world.settle()
    assert world.pa.current is not None
    assert world.pb.current is None
    assert world.pb.next is not None
    world.b.send([PONG], world.now)
    world.settle()
    assert world.count(DATA, B) == 0
    assert world.pb.last_handshake is None


def test_two_handshakes_at_once_lead_to_one_session() -> None:
    world = World()
    world.a.send([PING], world.now)
    world.b.send([PONG], world.now)
    world.settle()
    assert (world.got[A], world.got[B]) == ([PONG], [PING])
    world.ping()


def test_another_preshared_key_is_no_session() -> None:
    world = World(psk=False)
    world.a.send([PING], world.now)
    world.settle()
    assert (world.pa.current, world.got[B]) == (None, [])
    assert world.pa.dropped == {"forged": 1}


def test_strangers_are_not_answered() -> None:
    world, other = World(), World()
    other.pa.config.public_key = world.b.identity.public  # it knows b, but b does not know it
    stranger = Interface(os.urandom(32), [other.pa.config], epoch=lambda: EPOCH)
    stranger.send([PING], world.now)
    ((_, (message,)),) = stranger.outgoing
    before = state(world)
    world.take(B, message, A)
    assert state(world) == before
    assert world.drops() == {"from a stranger": 1}


# --- Timers (section 6) --------------------------------------------------------------------------


def test_only_the_initiator_renews_a_session() -> None:
    world = World()
    world.ping()
    world.now += 119
    world.ping()
    world.now += 1
    world.b.send([PONG], world.now)
    world.settle()
    assert world.count(INITIATION) == 1
    world.a.send([PING], world.now)
    world.settle()
    assert (world.count(INITIATION, A), world.count(INITIATION, B)) == (2, 0)
    assert world.drops() == {}
    world.ping()


def test_an_initiator_that_only_receives_renews_before_it_is_too_late() -> None:
    world = World()
    world.ping()
    for seconds, wanted in ((164, 1), (1, 2), (1, 2)):
        world.now += seconds
        world.b.send([PONG], world.now)
        world.settle()
        assert world.count(INITIATION) == wanted


def test_messages_of_the_session_before_still_count() -> None:
    world = World()
    world.ping()
    late, world.b.outgoing = world.pb.current, []
    assert late is not None
    message = late.seal([PONG], 1420)[0]
    world.now += 120
    world.a.send([PING], world.now)
    world.settle()
    assert world.pa.previous is not None
    world.got[A].clear()
    world.take(A, message, B)
    assert world.got[A] == [PONG]


def test_a_session_that_is_too_old_is_neither_used_nor_believed() -> None:
    world = World()
    world.ping()
    assert world.pb.current is not None
    message = world.pb.current.seal([PONG], 1420)[0]
    world.lose = lambda source, message: True
    world.now += 180
    world.got[A].clear()
    world.take(A, message, B)
    assert world.got[A] == []
    assert world.pa.dropped == {"session too old": 1}
    world.b.send([PONG], world.now)
    world.settle()
    assert [m[:4] for _, _, m in world.log[-1:]] == [INITIATION]


def test_initiations_are_repeated_and_then_given_up() -> None:
    world = World()
    world.lose = lambda source, message: True
    world.a.send([PING], world.now)
    world.settle()
    start, times = world.now, [0.0]
    while world.a.deadline() < float("inf"):
        sent = len(world.log)
        world.run(world.a.deadline() - world.now)
        times += [world.now - start] * (len(world.log) - sent)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(5 <= gap <= 5.34 for gap in gaps)
    assert 84 < times[-1] < 90 <= world.now - start
    assert world.drops() == {"no session in time": 1}
    assert world.a.indices == {}
    world.lose = lambda source, message: False
    world.ping()


def test_after_three_initiations_without_an_answer_other_addresses_are_tried() -> None:
    world = World()
    others: list[Endpoint] = [("192.0.2.7", 1), ("2001:db8::7", 1, 0, 0)]
    world.lose = lambda source, message: True
    world.a.send([PING], world.now)
    world.settle()
    while world.count(INITIATION) < 3:
        assert world.a.unreached == set()
        world.pa.try_another(others)
        assert world.pa.endpoint == B
        world.run(world.a.deadline() - world.now)
    assert world.a.unreached == {world.pa}
    for expected in (*others, *others):
        world.pa.try_another(others)
        assert world.pa.endpoint == expected
    world.pa.try_another([])  # the name could not be resolved
    assert world.pa.endpoint == others[-1]
    world.pa.try_another([B])
    world.lose = lambda source, message: False
    world.run(6)
    assert world.got[B] == [PING]
    world.pa.try_another(others)  # too late: the peer has answered
    assert world.pa.endpoint == B


@pytest.mark.parametrize("jump", [-3600, -86_400 * 365, 86_400 * 365])
def test_handshakes_go_on_when_the_wall_clock_is_set(jump: float) -> None:
    """The peer believes only timestamps that are later than all before."""
    world = World()
    for _ in range(3):
        world.ping()
        world.epoch += jump
        world.run(200)  # the session is too old then
    world.ping()
    assert world.count(INITIATION) == world.count(RESPONSE) == 4
    assert world.drops() == {}


def test_a_clock_that_was_wrong_at_the_start_may_be_set_later() -> None:
    """Before a restart, the peer saw a later timestamp than ours in 1970."""
    world = World()
    world.ping()
    world.a.peers.clear()
    restarted = Interface(world.a.identity.private, [world.pa.config], epoch=lambda: world.epoch)
    world.sides[A], world.epoch = restarted, 0.0
    world.run(10)
    restarted.send([PING], world.now)
    world.settle()
    assert world.drops()["replayed"] == 1
    world.epoch = EPOCH
    world.run(6)
    assert world.got[B] == [PING, PING]


def test_after_a_suspension_the_first_packet_begins_a_handshake() -> None:
    """Both ways, and if the machine slept in the middle of a handshake."""
    world = World(keepalive=25)
    world.ping()
    world.now += 3600
    world.ping()
    world.now += 3600
    world.b.send([PONG], world.now)
    world.settle()
    assert world.got[A][-1] == PONG
    world.now += 3600
    world.lose = lambda source, message: True
    world.a.send([PING], world.now)
    world.settle()
    world.now += 3600
    world.lose = lambda source, message: False
    world.run(0)  # the timers that are late
    world.ping()


def test_not_more_than_one_initiation_in_five_seconds() -> None:
    world = World()
    world.lose = lambda source, message: True
    for _ in range(49):
        world.a.send([PING], world.now)
        world.settle()
        world.now += 0.1
    assert world.count(INITIATION) == 1


def test_a_keepalive_answers_what_got_no_answer() -> None:
    world = World()
    world.ping()
    world.run(30)
    world.log.clear()
    world.a.send([PING], world.now)
    world.settle()
    world.run(9.9)
    assert len(world.log) == 1
    world.run(0.2)
    assert [(source, len(message)) for source, _, message in world.log[1:]] == [(B, 32)]
    world.run(60)
    assert len(world.log) == 2


def test_silence_after_sending_begins_a_handshake() -> None:
    world = World()
    world.ping()
    world.run(30)
    world.lose = lambda source, message: source == B
    world.a.send([PING], world.now)
    world.settle()
    world.run(14.9)
    assert world.count(INITIATION) == 1
    world.run(0.5)
    assert world.count(INITIATION) == 2


def test_a_keepalive_is_sent_every_25_seconds() -> None:
    world = World(keepalive=25)
    world.a.start(world.now)
    world.settle()
    assert world.pb.last_handshake == world.now
    world.log.clear()
    world.run(100)
    assert [len(m) for s, _, m in world.log if s == A and m[:4] == DATA] == [32] * 4


def test_keys_are_forgotten_after_nine_minutes() -> None:
    world = World()
    world.ping()
    world.run(539)
    assert world.pa.current is not None
    world.run(2)
    for side, peer in ((world.a, world.pa), (world.b, world.pb)):
        assert (peer.current, peer.previous, peer.next, side.indices) == (None, None, None, {})


# --- Whom to believe -----------------------------------------------------------------------------


def every_kind() -> tuple[World, list[tuple[Endpoint, Endpoint, bytes]]]:
    """A world with a session, and a message of every kind that can still be delivered.

    The initiation, the cookie and the data would be accepted. The response would be, too, if
    its handshake were not complete.
    """
    world = World(handshakes=2)
    world.ping()
    world.now += 6
    for _ in range(3):  # load
        world.b._checker.under_load(world.now)
    world.pa._begin_handshake(world.now)
    ((target, (initiation,)),) = world.a.outgoing
    world.a.outgoing.clear()
    world.take(B, initiation, A)
    ((_, (cookie,)),) = world.b.outgoing
    world.b.outgoing.clear()
    assert world.pb.current is not None
    data = world.pb.current.seal([PONG], 1420)[0]
    world.got = {A: [], B: []}
    world.now += 10
    response = next(entry for entry in world.log if entry[2][:4] == RESPONSE)
    return world, [(A, target, initiation), response, (B, A, cookie), (B, A, data)]


KINDS = pytest.mark.parametrize("place", range(4), ids=["initiation", "response", "cookie", "data"])


@KINDS
def test_a_forged_message_changes_nothing(place: int) -> None:
    world, messages = every_kind()
    _, target, message = messages[place]
    before = state(world)
    for octet in range(len(message)):
        if message[:4] == INITIATION and octet >= 132:
            continue  # mac2, which is checked only under load
        if message[:4] == RESPONSE and octet >= 76:
            continue
        forged = bytearray(message)
        forged[octet] ^= 1 << octet % 8
        world.take(target, bytes(forged), ("198.51.100.9", 9))
        assert state(world) == before, octet
    assert world.got == {A: [], B: []}
    assert sum(world.drops().values()) > 60


@KINDS
def test_a_truncated_message_changes_nothing(place: int) -> None:
    world, messages = every_kind()
    _, target, message = messages[place]
    before = state(world)
    counted = sum(world.drops().values())
    for length in range(len(message)):
        world.take(target, message[:length], ("198.51.100.9", 9))
        assert state(world) == before, length
    if message[:4] != DATA:  # which may have any length
        world.take(target, message + b"\0", ("198.51.100.9", 9))
        assert state(world) == before
    assert sum(world.drops().values()) - counted >= len(message)
    assert world.got == {A: [], B: []}


@KINDS
def test_a_replayed_message_changes_nothing(place: int) -> None:
    world, messages = every_kind()
    source, target, message = messages[place]
    if message[:4] != RESPONSE:  # this response was accepted before
        before = state(world)
        world.take(target, message, source)
        assert state(world) != before
        world.settle()
    for side in world.sides.values():
        side.outgoing.clear()
    world.now += 0.5
    before, counted = state(world), sum(world.drops().values())
    world.got = {A: [], B: []}
    world.take(target, message, ("198.51.100.9", 9))
    assert state(world) == before
    assert sum(world.drops().values()) == counted + 1
    assert world.got == {A: [], B: []}


def test_data_that_came_already_is_not_taken_again() -> None:
    world = World()
    world.ping()
    for source, target, message in list(world.log):
        world.got = {A: [], B: []}
        before = state(world)
        world.take(target, message, source)
        assert (state(world), world.got) == (before, {A: [], B: []})


@pytest.mark.parametrize("data", [b"", b"\x04", DATA, bytes(200), b"\x05\0\0\0" + bytes(100)])
def test_invalid_messages_are_counted_and_change_nothing(data: bytes) -> None:
    world = World()
    before = state(world)
    world.take(B, data, A)
    assert state(world) == before
    assert sum(world.drops().values()) == 1


def test_the_endpoint_follows_authentic_messages_only() -> None:
    world = World()
    world.ping()
    moved = ("198.51.100.7", 7)
    world.a.send([PING], world.now)
    ((_, (message,)),) = world.a.outgoing
    world.a.outgoing.clear()
    world.take(B, message[:-1] + bytes([message[-1] ^ 1]), moved)
    assert world.pb.endpoint == A
    world.take(B, message, moved)
    assert world.pb.endpoint == moved
    world.b.send([PONG], world.now)
    assert [target for target, _ in world.b.outgoing] == [moved]


def test_a_peer_without_an_endpoint_is_learned() -> None:
    world = World()
    world.pb.endpoint = None
    world.b.send([PONG], world.now)
    assert world.b.outgoing == []
    assert world.pb.dropped == {"no session in time": 1}
    world.ping()


@given(
    st.lists(
        st.one_of(
            st.integers(0, 50), st.integers(WINDOW - 20, WINDOW + 20), st.integers(0, 3 * WINDOW)
        ),
        max_size=60,
    )
)
def test_the_replay_window(counters: list[int]) -> None:
    window = ReplayWindow()
    seen: set[int] = set()
    for counter in counters:
        highest = max(seen, default=-1)
        assert window.accept(counter) == (counter not in seen and counter > highest - WINDOW)
        if counter > highest - WINDOW:
            seen.add(counter)


def test_messages_may_overtake_each_other() -> None:
    world = World()
    world.ping()
    assert world.pa.current is not None
    messages = world.pa.current.seal([PING] * (WINDOW + 1), 1420)
    world.got[B].clear()
    newest = messages.pop()
    world.take(B, newest, A)
    for message in reversed(messages):
        world.take(B, message, A)
    assert len(world.got[B]) == WINDOW
    assert world.pb.dropped == {"replayed": 1}  # the oldest message, which is outside of the window


# --- Load (section 5.3) --------------------------------------------------------------------------


def loaded() -> World:
    world = World(handshakes=2)
    for _ in range(4):
        world.b._checker.under_load(world.now)
    return world


def test_under_load_a_cookie_is_asked_for_and_then_believed() -> None:
    world = loaded()
    world.a.send([PING], world.now)
    world.settle()
    assert [m[:4] for _, _, m in world.log] == [INITIATION, COOKIE]
    assert world.log[0][2][-16:] == bytes(16)
    assert world.b.dropped == {"under load, answered with a cookie": 1}
    world.log.clear()
    world.now += 5
    for _ in range(4):
        world.b._checker.under_load(world.now)
    world.run(0.5)
    assert world.log[0][2][-16:] != bytes(16)
    assert world.got[B] == [PING]
    assert world.pb.last_handshake is not None


def test_a_cookie_is_for_one_address_and_two_minutes() -> None:
    world = loaded()
    world.a.send([PING], world.now)
    world.settle()
    message = os.urandom(116)
    stamped = world.pa.stamper.stamp(message, world.now)
    checker = world.b._checker
    assert checker.mac1_fits(stamped)
    assert checker.mac2_fits(stamped, A, world.now)
    assert not checker.mac2_fits(stamped, (A[0], A[1] + 1), world.now)
    assert not checker.mac2_fits(stamped, B, world.now)
    assert not checker.mac2_fits(stamped, A, world.now + 121)
    assert world.pa.stamper.stamp(message, world.now + 120)[-16:] == bytes(16)


def test_no_address_gets_more_than_its_share_under_load() -> None:
    checker = World().b._checker
    assert [checker.grants(A, 5.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert checker.grants(B, 5.0)
    assert [checker.grants(A, 5.11) for _ in range(3)] == [True, True, False]
    assert [checker.grants(("2001:db8::1", 1, 0, 0), 5.0) for _ in range(5)] == [True] * 5
    assert not checker.grants(("2001:db8::2", 1, 0, 0), 5.0)


# --- Whose an address is -------------------------------------------------------------------------


def test_packets_from_addresses_of_others_are_dropped() -> None:
    world = World()
    world.ping()
    world.got[B].clear()
    assert world.pa.current is not None
    session, now = world.pa.current, world.now
    strange = [make_icmp_echo("10.0.0.9", "10.0.0.2"), make_icmp_echo("fd00::1", "fd00::2")]
    broken = [b"\x45", b"\x45" + bytes(30), PING[:2] + b"\1" + PING[3:], b"\x60" + bytes(50)]
    for message in session.seal([*strange, *broken], 1420):
        world.take(B, message, A)
    assert world.got[B] == []
    assert world.pb.dropped == {"from an address that is not its own": 3, "not an IP packet": 3}
    world.a.send([make_icmp_echo("10.0.0.1", "10.0.0.3")], now)
    assert world.a.dropped == {"to nobody's address": 1}


def test_packets_go_to_the_peer_with_the_longest_prefix() -> None:
    keys = [os.urandom(32) for _ in range(3)]
    nets = [["10.0.0.0/24", "fd00::/64"], ["10.0.0.128/25"], ["10.0.0.129/32"]]
    hub = Interface(
        os.urandom(32),
        [
            PeerConfig(
                crypto.public_key(key),
                allowed_ips=[ip_network(each) for each in nets[number]],
                endpoint=("192.0.2.9", number),
            )
            for number, key in enumerate(keys)
        ],
        epoch=lambda: EPOCH,
    )
    for target in ("10.0.0.1", "10.0.0.130", "10.0.0.129", "10.0.0.128"):
        hub.send([make_icmp_echo("10.9.9.9", target)], 1.0)
    hub.send([make_icmp_echo("fd99::", "fd00::5")], 1.0)
    staged = [len(peer._staged) for peer in hub.peers.values()]
    assert staged == [2, 2, 1]


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), max_size=12),
    st.lists(st.integers(0, 2**32 - 1), max_size=8),
)
def test_the_longest_prefix_wins(entries: list[tuple[int, int]], asked: list[int]) -> None:
    nets = [ip_network((address, prefix), strict=False) for address, prefix in entries]
    table = AllowedIPs(zip(nets, itertools.count(), strict=False))
    for number in [*asked, *(address ^ 1 for address, _ in entries)] * 2:
        address = ip_address(number)
        matches = [(net.prefixlen, place) for place, net in enumerate(nets) if address in net]
        assert table.owner(address.packed) == (max(matches)[1] if matches else None)


def test_messages_are_padded_to_16_bytes_up_to_the_mtu() -> None:
    world = World()
    world.ping()
    assert world.pa.current is not None
    for length, padded in ((1, 16), (16, 16), (17, 32), (1409, 1420), (1420, 1420), (1500, 1500)):
        (message,) = world.pa.current.seal([bytes(length)], 1420)
        assert len(message) == 32 + padded


# --- Runs ----------------------------------------------------------------------------------------


def wide_world(mtu: int = 1420) -> World:
    """A world with a session, where each peer may have any address."""
    world = World()
    for side, peer in ((world.a, world.pa), (world.b, world.pb)):
        side.mtu = mtu
        everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
        side.owner = AllowedIPs((network, peer) for network in everything).owner
    world.ping()
    return world


def traffic(chance: random.Random, mtu: int) -> list[bytes]:
    """Streams of super-packets' segments, single packets, and odd ones."""
    packets: list[bytes] = []
    for _ in range(chance.randrange(1, 5)):
        first = Packet(
            version=chance.choice((4, 6)),
            protocol=chance.choice(("tcp", "udp")),
            tos=chance.choice((0, 2)),
            source=chance.choice(("", "")),
        )
        head = len(bytes(first))
        size = chance.choice((mtu - head, 1, 100, chance.randrange(1, mtu - head)))
        sizes = [size] * chance.choice((1, 2, 3, 44)) + [chance.randrange(1, size + 1)]
        packets += written(run_of(first, sizes, seed=chance.randrange(99)))
    return packets


def kept(world: World) -> list[Any]:
    """What a run of data may change on both sides."""
    found: list[Any] = state(world)
    for peer in (world.pa, world.pb):
        assert peer.current is not None
        found += [bytes(peer.current.window.seen), peer.sent_bytes, peer.received_bytes]
    return found


@pytest.mark.parametrize("mtu", [1420, 1280, 1408, 1417])
@pytest.mark.parametrize("seed", range(8))
def test_both_paths_seal_and_open_random_traffic_alike(mtu: int, seed: int, path: str) -> None:
    chance = random.Random(seed)
    world = wide_world(mtu)
    session = world.pa.current
    far = world.pb.current
    assert session is not None
    assert far is not None
    sealer, opener = Sealer(world.a), Opener(world.b)
    by_the_fast_path = 0
    for packets in itertools.chain(*(runs_of(traffic(chance, mtu), mtu) for _ in range(6))):
        counter = session.sent
        expected = session.seal(packets, mtu)
        session.sent = counter
        before = kept(world)
        run = packets_run(packets, mtu)
        endpoint = sealer.seal(run, world.now)
        if endpoint is None:
            assert run.segments() == packets
            assert kept(world) == before
            assert mtu % 4, "the fast path left a run to the lists"
            assert len(packets) > 1, "the fast path left a single packet to the lists"
            session.sent = counter + len(packets)
        else:
            assert (run.segments(), endpoint) == (expected, B)
            by_the_fast_path += 1
            assert session.sent == counter + len(packets)
        assert far.window.next == counter
        opened = opener.open(messages_run(expected), A, world.now)
        if opened is None:
            # Streams of the same addresses that differ in what the fast path compares.
            heads = {(each[0], each[:4] if each[0] >> 4 == 4 else each[4:8]) for each in packets}
            assert len(packets) > 1
            assert len(heads) > 1 or len(expected[0]) % 4
            assert world.b.receive(expected, A, world.now) == packets
        else:
            assert opened.segments() == packets
        assert far.window.next == counter + len(packets)
        assert all(far.window.seen[at % WINDOW] for at in range(counter, counter + len(packets)))
    assert by_the_fast_path
    assert world.drops() == {}


def test_the_last_run_before_a_counter_needs_more_than_32_bits() -> None:
    world = wide_world()
    packets = written(run_of(Packet(), [1000] * 10))
    assert world.pa.current is not None
    for start, fast in ((2**32 - 11, True), (2**32 - 5, False), (2**33, False)):
        world.pa.current.sent = world.pb.current.window.next = start  # type: ignore[union-attr]
        expected = world.pa.current.seal(packets, 1420)
        world.pa.current.sent = start
        run = packets_run(packets)
        assert Sealer(world.a).seal(run, world.now) == (B if fast else None)
        assert run.segments() == (expected if fast else packets)
        opened = Opener(world.b).open(messages_run(expected), A, world.now)
        assert (opened is not None) is fast


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_run_that_is_not_in_order_is_left_to_the_lists_unchanged(count: int) -> None:
    """A run with a message that is forged, replayed, lost before, or of another receiver."""
    world = wide_world()
    assert world.pa.current is not None
    packets = written(run_of(Packet(), [1000] * (count + 1)))
    early, *messages = world.pa.current.seal(packets, 1420)
    keepalive = world.pa.current.seal([b""], 1420)[0]
    opener = Opener(world.b)
    wrong: list[list[bytes]] = [messages, [*messages[:-1], keepalive]]
    for octet in (0, 1, 4, 7, 8, 15, 16, 500, -1):
        forged = bytearray(messages[-1])
        forged[octet] ^= 4
        wrong.append([early, *messages[:-1], bytes(forged)])
    wrong.append([early, *messages[:-1], early])
    wrong.append([early, *messages[:-1], messages[-1][:32]])
    before = kept(world)
    for each in wrong:
        run = messages_run(each)
        assert opener.open(run, ("198.51.100.9", 9), world.now) is None
        assert kept(world) == before
        assert run.segments() == each  # so that the other path can open them
    assert opener.open(messages_run([early, *messages]), A, world.now) is not None


def test_a_message_that_is_not_the_next_is_left_to_the_lists_unchanged() -> None:
    """A single message that is forged, truncated, without a packet, or not the next one."""
    world = World()
    world.ping()
    assert world.pa.current is not None
    packet, stranger = bytes(Packet(source="10.0.0.1")), bytes(Packet(source="10.0.0.9"))
    assert world.pb.current is not None
    first = world.pa.current.sent
    messages = world.pa.current.seal([packet, b"", stranger, bytes(64), packet], 1420)
    opener = Opener(world.b)
    for place, message in enumerate(messages):
        world.pb.current.window.next = first + place
        wrong = [message[:-1], message[:33], messages[place - 1]]
        for octet in (0, 1, 4, 7, 8, 15, 16, -1):
            forged = bytearray(message)
            forged[octet] ^= 4
            wrong.append(bytes(forged))
        if message not in (messages[0], messages[-1]):
            wrong.append(message)
        before = kept(world)
        for each in wrong:
            run = messages_run([each])
            assert opener.open(run, ("198.51.100.9", 9), world.now) is None
            assert kept(world) == before
            assert run.segments() == [each]  # so that the other path can open it
    opened = opener.open(messages_run(messages[-1:]), A, world.now)
    assert opened is not None
    assert opened.segments() == [packet]


def test_packets_that_are_not_alike_or_not_the_peers_are_left_to_the_lists() -> None:
    world = World()
    world.ping()
    assert world.pa.current is not None
    one, other = Packet(source="10.0.0.1"), Packet(source="10.0.0.9")
    long = run_of(one, [1000] * 3)
    six = bytes(Packet(version=6, payload=bytes(980)))
    broken = bytearray(bytes(long[0]))
    broken[2] = 0xFF  # the length
    for packets in (
        written([*long[:2], other.but(payload=bytes(1000))]),
        written(run_of(other, [1000] * 3)),
        written([*long[:1], long[1].but(tos=4), *long[2:]]),
        [bytes(long[0]), six],
        [bytes(broken)] * 2,
        [bytes(1000)] * 2,
    ):
        counter = world.pa.current.sent
        messages = world.pa.current.seal(packets, 1420)
        before = kept(world)
        assert Opener(world.b).open(messages_run(messages), A, world.now) is None
        assert kept(world) == before
        world.b.receive(messages, A, world.now)
        assert world.pb.current is not None
        assert world.pb.current.window.next == counter + len(packets)


def test_without_a_session_or_an_owner_a_run_is_left_to_the_lists() -> None:
    world = World()
    packets = written(run_of(Packet(source="10.0.0.1"), [1000] * 3))
    assert Sealer(world.a).seal(packets_run(packets), world.now) is None
    world.ping()
    before = kept(world)
    stranger = written([Packet(version=6)] * 2)
    assert Sealer(world.a).seal(packets_run(stranger), world.now) is None
    assert kept(world) == before
    world.now += 180
    assert Sealer(world.a).seal(packets_run(packets), world.now) is None


# --- Status --------------------------------------------------------------------------------------


def test_the_status_shows_the_interface_and_its_peers() -> None:
    world = World(keepalive=25)
    world.ping()
    world.take(A, b"nonsense", B)
    world.now += 7
    shown = text("wg7", 51820, world.a, world.a.dropped, world.now)
    for line in (
        "interface: wg7\n",
        "  dropped: 1 of no known type\n",
        "  endpoint: 192.0.2.2:1002\n",
        "  latest handshake: 7 seconds ago\n",
        "  transfer: 156 B received, 212 B sent\n",
        "  persistent keepalive: every 25 seconds\n",
    ):
        assert line in shown
