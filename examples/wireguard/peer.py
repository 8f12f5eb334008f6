"""Section 6: a peer with its sessions, its handshakes and its timers.

A timer is the time at which something is due, or None; `tick` handles the timers that are due. As
packets set and stop timers all the time, this is only an assignment: delaying or stopping a timer
does not change `Interface.due`; only a timer that is earlier than all others does.
"""

import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import PeerConfig
from .cookies import Endpoint, Stamper
from .crypto import Forged, dh, tai64n
from .handshake import Identity, Keys, Noise, Opened, initiate, open_response, respond
from .messages import Response
from .session import REKEY_AFTER_MESSAGES, Session

if TYPE_CHECKING:
    from .interface import Interface

__all__ = ["Handshake", "Peer", "Timers"]

_STAGED = 128  # how many packets wait for a session
_JITTER = 1 / 3  # seconds, so that two peers that start at once don't collide again and again
_UNANSWERED = 3  # initiations, after which the endpoint's name is looked up again
_TICK = 0.02  # seconds, by which two timestamps differ after they are rounded
_FLOOD = 0.02  # the least seconds between two initiations of a peer


@dataclass(frozen=True)
class Timers:
    """Section 6.1, in seconds."""

    rekey_after: float = 120
    reject_after: float = 180
    rekey_attempt: float = 90
    rekey_timeout: float = 5
    keepalive_timeout: float = 10


@dataclass(frozen=True)
class Handshake:
    """An initiation that we sent and that was not answered yet."""

    peer: "Peer"
    local: bytes
    noise: Noise


class Peer:
    """The state of a peer; all methods take the time as `now`."""

    def __init__(self, interface: "Interface", config: PeerConfig) -> None:
        self.config = config
        self.endpoint: Endpoint | None = config.endpoint
        self.last_handshake: float | None = None
        self.received_bytes = self.sent_bytes = 0
        self.dropped: Counter[str] = Counter()
        self.stamper = Stamper(config.public_key)
        self._interface = interface
        self._timers = interface.timers
        self._identity: Identity = interface.identity
        self._static_static = dh(self._identity.private, config.public_key)
        # Three sessions at most: the current one, the previous one, whose last messages may still
        # be on the way, and the next one, until we know that the initiator has it (5.4.5).
        self.current: Session | None = None
        self.previous: Session | None = None
        self.next: Session | None = None
        self._handshake: Handshake | None = None
        self._staged: deque[bytes] = deque()
        self._last_initiation = -math.inf
        # The peer takes an initiation for a replay if its timestamp is not later than all before.
        # So timestamps go on when the wall clock is set back, and follow it when it is set forward:
        # a machine without a clock of its own starts in 1970.
        self._latest = 0.0
        self._unanswered = 0  # initiations since the last genuine message
        self._attempts_since = 0.0
        self._timestamp_seen = bytes(12)
        self._initiation_seen = -math.inf
        # The timers.
        self._retry_at: float | None = None  # 6.4
        self._keepalive_at: float | None = None  # 6.5
        self._another_keepalive = False
        self._silent_at: float | None = None  # 6.5: we sent, and the peer has not answered
        self._persistent_at: float | None = None
        self._forget_at: float | None = None  # 6.3
        self._last_minute = False  # 6.2: the receiver has started a new handshake
        self._patience = 0.0  # seconds that an answer may take; 0: not known yet

    def start(self, now: float) -> None:
        if self.config.keepalive:
            self._persistent_at = self._alarm(now)

    # Data

    def send(self, packets: list[bytes], now: float) -> None:
        """Seal packets for the peer, or keep them until there is a session; b"" is a keepalive."""
        session = self.current
        data = any(packets)
        if session is None or not session.may_send(now):
            self._stage(packets)
            if self._retry_at is None or data:
                self._attempts_since = now  # 6.4: a packet from the user starts the attempts again
            self._initiate(now)
            return
        self._emit(session.seal(packets, self._interface.mtu), now)
        self._sent(session, data, now)

    def ready(self, now: float) -> Session | None:
        """The session with which data can be sealed immediately, or None."""
        session = self.current
        return session if session is not None and session.may_send(now) else None

    def sent_run(self, session: Session, size_bytes: int, now: float) -> None:
        """Record data messages that were sealed elsewhere, as `send` does."""
        self._count_sent(size_bytes, now)
        self._sent(session, True, now)

    def _sent(self, session: Session, data: bool, now: float) -> None:
        if data and self._silent_at is None:
            self._silent_at = self._alarm(now + self._patience)
        if now >= session.rekey_at or session.sent >= REKEY_AFTER_MESSAGES:  # 6.2
            self._begin_handshake(now)

    def receive(
        self, session: Session, messages: Sequence[bytes], source: Endpoint, now: float
    ) -> list[bytes]:
        """Open data messages of one session; b"" is a keepalive."""
        if now >= session.reject_at:  # 6.2
            self.dropped["session too old"] += len(messages)
            return []
        packets = session.open(messages, self.dropped)
        if not packets:
            return []
        self._authenticated(source, sum(map(len, messages)), now)
        if session is self.next:  # 5.4.5: this shows that the initiator has the session
            self._drop(self.previous)
            self.previous, self.current, self.next = self.current, session, None
            self._handshake_done(now)
            self._flush(now)
        self._received(session, any(packets), now)
        return packets

    def received_run(self, session: Session, size_bytes: int, source: Endpoint, now: float) -> None:
        """Record data messages of the current session that were opened elsewhere, as `receive`."""
        self._authenticated(source, size_bytes, now)
        self._received(session, True, now)

    def _received(self, session: Session, data: bool, now: float) -> None:
        if data:
            if self._keepalive_at is None:
                self._keepalive_at = self._alarm(now + self._timers.keepalive_timeout)
            else:
                self._another_keepalive = True
        if now >= session.receiver_rekey_at and not self._last_minute:  # 6.2
            self._last_minute = True
            self._begin_handshake(now)

    def _stage(self, packets: list[bytes]) -> None:
        for packet in packets:
            if not packet and self._staged:
                continue  # the packets that wait replace a keepalive
            if len(self._staged) >= _STAGED:
                self._staged.popleft()
                self.dropped["no session in time"] += 1
            self._staged.append(packet)

    def _flush(self, now: float) -> None:
        if self._staged:
            packets = list(self._staged)
            self._staged.clear()
            self.send(packets, now)

    def _emit(self, messages: list[bytes], now: float) -> None:
        """Queue messages to send, and update the timers that every sent message affects."""
        if self.endpoint is None:
            self.dropped["no endpoint known"] += len(messages)
            return
        self._interface.outgoing.append((self.endpoint, messages))
        self._count_sent(sum(map(len, messages)), now)

    def _count_sent(self, size_bytes: int, now: float) -> None:
        self.sent_bytes += size_bytes
        self._keepalive_at = None
        if self.config.keepalive:
            self._persistent_at = now + self.config.keepalive

    def _authenticated(self, source: Endpoint, size_bytes: int, now: float) -> None:
        """Record a genuine message: the peer has its source address (section 2.1, roaming)."""
        if source != self.endpoint and not self._interface.loops(source):
            self.endpoint = source
        self.received_bytes += size_bytes
        self._unanswered = 0
        self._silent_at = None
        if self.config.keepalive:
            self._persistent_at = now + self.config.keepalive

    # Handshakes

    def _begin_handshake(self, now: float) -> None:
        """Start a handshake, unless one is running."""
        if self._retry_at is None:
            self._attempts_since = now
            self._initiate(now)

    def _initiate(self, now: float) -> None:
        """Section 5.4.2: send an initiation, but not more often than section 6.4 allows."""
        due = self._last_initiation + self._timers.rekey_timeout
        if now < due:
            self._retry_at = self._retry_at or self._alarm(due)
            return
        if self.endpoint is None:
            self._give_up()
            return
        self._last_initiation = now
        jitter = random.uniform(0, _JITTER)
        self._retry_at = self._alarm(now + self._timers.rekey_timeout + jitter)
        local = self._interface.new_index()
        self._latest = max(self._interface.epoch() + now, self._latest + _TICK)
        timestamp = tai64n(self._latest)
        message, noise = initiate(
            self._identity, self.config.public_key, self._static_static, local, timestamp
        )
        self._drop(self._handshake)
        self._handshake = Handshake(self, local, noise)
        self._interface.indices[local] = self._handshake
        self._emit([self.stamper.stamp(message.pack(), now)], now)
        self._unanswered += 1
        if self._unanswered >= _UNANSWERED:
            self._interface.unreached.add(self)

    def try_another(self, endpoints: list[Endpoint]) -> None:
        """Take the next of these endpoints, if the peer has not answered meanwhile.

        The paper has nothing like it. A peer whose address has changed, or whose address family has
        no route any more, would stay unreachable until it sends something itself.
        """
        if self._unanswered >= _UNANSWERED and endpoints:
            known = self.endpoint in endpoints
            place = endpoints.index(self.endpoint) + 1 if known and self.endpoint else 0
            self.endpoint = endpoints[place % len(endpoints)]

    def take_initiation(
        self, opened: Opened, sender: bytes, source: Endpoint, size: int, now: float
    ) -> None:
        """Sections 5.4.2 and 5.4.3: answer a genuine initiation if it is new."""
        if opened.timestamp <= self._timestamp_seen:
            self.dropped["replayed"] += 1
            return
        if now - self._initiation_seen < _FLOOD:
            self.dropped["too many handshakes"] += 1
            return
        local = self._interface.new_index()
        try:
            message, keys = respond(opened, self.config.preshared_key, local, sender)
        except Forged:
            self.dropped["forged"] += 1
            return
        self._timestamp_seen, self._initiation_seen = opened.timestamp, now
        self._authenticated(source, size, now)
        self._drop(self.next)
        self._drop(self.previous)
        self.previous = None
        self.next = self._session(keys, local, sender, initiator=False, now=now)
        self._emit([self.stamper.stamp(message.pack(), now)], now)

    def take_response(
        self, handshake: Handshake, message: Response, source: Endpoint, size: int, now: float
    ) -> None:
        """Section 5.4.3: complete the handshake, and tell the peer immediately."""
        try:
            keys = open_response(
                self._identity, handshake.noise, self.config.preshared_key, message
            )
        except Forged:
            self.dropped["forged"] += 1
            return
        self._handshake = None
        self._authenticated(source, size, now)
        if self.next is not None:
            self._drop(self.previous)
            self._drop(self.current)
            self.previous, self.next = self.next, None
        else:
            self._drop(self.previous)
            self.previous = self.current
        self.current = self._session(keys, handshake.local, message.sender, initiator=True, now=now)
        self._handshake_done(now)
        self._stage([b""])  # a keepalive is sent only if no packet waits
        self._flush(now)

    def _session(
        self, keys: Keys, local: bytes, remote: bytes, *, initiator: bool, now: float
    ) -> Session:
        timers = self._timers
        session = Session(self, keys, local, remote, initiator=initiator, timers=timers, now=now)
        self._interface.indices[local] = session
        self._forget_at = self._alarm(now + 3 * timers.reject_after)
        self._patience = timers.keepalive_timeout + timers.rekey_timeout
        self._patience += random.uniform(0, _JITTER)
        return session

    def _handshake_done(self, now: float) -> None:
        self.last_handshake = now
        self._retry_at = None
        self._last_minute = False
        self._drop(self._handshake)
        self._handshake = None

    def _drop(self, entry: "Session | Handshake | None") -> None:
        if entry is not None:
            self._interface.indices.pop(entry.local, None)

    def _give_up(self) -> None:
        self._retry_at = None
        self._drop(self._handshake)
        self._handshake = None
        self.dropped["no session in time"] += sum(map(bool, self._staged))
        self._staged.clear()

    # Timers

    def _alarm(self, due: float) -> float:
        """Have `tick` called at this time or earlier; returns the time."""
        if due < self._interface.due:
            self._interface.due = due
        return due

    def deadline(self) -> float:
        """The time of the earliest timer."""
        due = math.inf
        for each in (
            self._retry_at,
            self._keepalive_at,
            self._silent_at,
            self._persistent_at,
            self._forget_at,
        ):
            if each is not None and each < due:
                due = each
        return due

    def tick(self, now: float) -> None:
        """Do what is due."""
        # First, because after the machine has slept all timers may be due, and the next ones begin
        # a handshake.
        if self._forget_at is not None and now >= self._forget_at:  # 6.3
            self._forget_at = None
            for entry in (self.previous, self.current, self.next, self._handshake):
                self._drop(entry)
            self.previous = self.current = self.next = self._handshake = None
        if self._retry_at is not None and now >= self._retry_at:
            if now - self._attempts_since >= self._timers.rekey_attempt:  # 6.4
                self._give_up()
            else:
                self._initiate(now)
        if self._keepalive_at is not None and now >= self._keepalive_at:  # 6.5
            self._keepalive_at = None
            self.send([b""], now)
            if self._another_keepalive:
                self._another_keepalive = False
                self._keepalive_at = now + self._timers.keepalive_timeout
        if self._silent_at is not None and now >= self._silent_at:  # 6.5
            self._silent_at = None
            self._begin_handshake(now)
        if self._persistent_at is not None and now >= self._persistent_at:
            self._persistent_at = now + self.config.keepalive
            self.send([b""], now)
