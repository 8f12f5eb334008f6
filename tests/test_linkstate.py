"""The state of a link in a watcher, and the events from one state to the next."""

import dataclasses
from typing import Any

from aiotun import LinkEvent
from aiotun._link.info import LinkInfo
from aiotun._link.state import BACKLOG, Backlog, Change, LinkState, differences, state_of
from aiotun._link.values import LinkAddress, parse_address

INFO = LinkInfo("a0", 7, 1500, None, False, False, None, None, 500, None)
ONE, TWO = parse_address("10.0.0.1/24"), parse_address("fd00::1/64")


def state(*addresses: LinkAddress, **info: Any) -> LinkState:
    return state_of(dataclasses.replace(INFO, **info), list(addresses))


def kinds(backlog: Backlog) -> list[str]:
    """Take all events."""
    found: list[str] = []
    while (event := backlog.take()) is not None:
        found.append(event.kind)
    return found


class TestDifferences:
    def test_equal_states_have_no_differences(self) -> None:
        assert differences(state(ONE), state(ONE)) == []

    def test_other_fields_make_no_event(self) -> None:
        assert differences(state(), state(alias="x", txqueuelen=1, mac="m", master="br0")) == []

    def test_every_difference_is_an_event_in_order(self) -> None:
        after = state(TWO, name="b0", mtu=1400, up=True, carrier=True)
        assert differences(state(ONE), after) == [
            LinkEvent("renamed", after.info),
            LinkEvent("mtu", after.info),
            LinkEvent("up", after.info),
            LinkEvent("carrier", after.info),
            LinkEvent("address_removed", after.info, ONE),
            LinkEvent("address_added", after.info, TWO),
        ]
        back = [event.kind for event in differences(after, state(ONE))]
        assert back[2:4] == ["down", "carrier"]


class TestAfter:
    def test_a_link_change_replaces_the_info(self) -> None:
        info = dataclasses.replace(INFO, mtu=1400)
        assert state(ONE).after(Change(7, info, None, False)) == state(ONE, mtu=1400)
        assert state(ONE).after(Change(7, info, None, True)) is None

    def test_an_address_change_adds_or_removes_it(self) -> None:
        assert state(ONE).after(Change(7, None, TWO, False)) == state(ONE, TWO)
        assert state(ONE, TWO).after(Change(7, None, ONE, True)) == state(TWO)

    def test_a_repeated_change_gives_the_same_state(self) -> None:
        before = state(ONE)
        assert before.after(Change(7, None, ONE, False)) is before
        assert before.after(Change(7, None, TWO, True)) is before

    def test_a_peer_makes_another_address(self) -> None:
        plain, peer = parse_address("10.0.0.1/32"), parse_address("10.0.0.1 peer 10.0.0.2/32")
        after = state(plain).after(Change(7, None, peer, False))
        assert after is not None
        assert len(after.addresses) == 2


class TestBacklog:
    def test_events_are_taken_in_order(self) -> None:
        backlog = Backlog(state())
        assert backlog.take() is None
        backlog.add(state(up=True))
        backlog.add(state(up=True, alias="no event"))
        backlog.add(state(ONE, up=True))
        backlog.add(state())
        assert kinds(backlog) == ["up", "address_added", "down", "address_removed"]

    def test_a_slow_reader_gets_the_differences(self) -> None:
        backlog = Backlog(state(ONE))
        backlog.add(state(ONE, up=True, mtu=1400))
        first = backlog.take()
        assert first is not None
        assert first.kind == "mtu"
        for number in range(10 * BACKLOG):
            backlog.add(state(mtu=1000 + number, up=bool(number % 2)))
        assert len(backlog._changes) <= BACKLOG
        # The rest of a change of which the reader has already taken a part is reported in full.
        assert kinds(backlog) == ["up", "mtu", "address_removed"]
        backlog.add(state())
        assert kinds(backlog) == ["mtu", "down"]

    def test_nothing_is_left_of_what_came_and_went(self) -> None:
        backlog = Backlog(state())
        for number in range(2 * BACKLOG):
            backlog.add(state(up=not number % 2))
        assert backlog.take() is None

    def test_up_to_the_limit_all_is_kept(self) -> None:
        backlog = Backlog(state())
        for number in range(BACKLOG):
            backlog.add(state(up=not number % 2))
        assert kinds(backlog) == ["up", "down"] * (BACKLOG // 2)

    def test_the_deletion_is_the_last_event(self) -> None:
        backlog = Backlog(state())
        for number in range(2 * BACKLOG):
            backlog.add(state(mtu=1000 + number))
        backlog.add_deleted()
        assert kinds(backlog) == ["mtu", "deleted"]
        assert backlog.take() is None
