"""Runs: many packets in one buffer."""

import pytest

from aiotun._packets.runs import segments_for


class TestSegmentsFor:
    @pytest.mark.parametrize(
        ("mtu", "overhead", "expected"),
        [(1420, 32, 45), (1500, 0, 43), (9000, 32, 7), (100, 32, 64), (65_535, 50, 1)],
    )
    def test_as_many_as_one_run_of_datagrams_holds(
        self, mtu: int, overhead: int, expected: int
    ) -> None:
        assert segments_for(mtu, overhead) == expected

    @pytest.mark.parametrize(("mtu", "overhead"), [(0, 32), (1420, -1)])
    def test_invalid_sizes_are_refused(self, mtu: int, overhead: int) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            segments_for(mtu, overhead)
