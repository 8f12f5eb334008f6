"""A short run of the fuzz target, always the same one; `make fuzz` makes a long one."""

import pytest

from aiotun import PacketDecodeError, decode_frame, decode_packet

from .fuzz import fuzz_decode
from .fuzz.fuzz_decode import Findings, check, fuzz


def test_nothing_else_comes_out() -> None:
    found = fuzz(10_000, seed=4)
    assert found.wrong == []
    assert found.inputs == 10_000
    # It finds by itself what is known.
    for cause in ("AttributeError", "IndexError", "RecursionError", "NeedData"):
        assert found.causes[f"decode_packet: {cause}"] + found.causes[f"decode_frame: {cause}"] > 9


@pytest.mark.parametrize(
    ("cause", "data"),
    [(cause, data) for cause, packets in fuzz_decode.OFFENDERS.items() for data in packets],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_known_offenders_are_chained(cause: type[Exception], data: bytes) -> None:
    decode = decode_frame if data.startswith(fuzz_decode.MACS) else decode_packet
    with pytest.raises(PacketDecodeError, match=cause.__name__) as raised:
        decode(data)
    assert type(raised.value.__cause__) is cause


def test_it_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes) -> object:
        raise IndexError("told nobody")

    monkeypatch.setattr(fuzz_decode, "decode_frame", decode)
    found = Findings()
    check(b"\x45\0", found)
    assert found.wrong == ["decode: IndexError: told nobody: 4500"]
    assert len(fuzz(100, seed=1, most=3).wrong) == 3
