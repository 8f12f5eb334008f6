"""Objects that own file descriptors or a thread can't be copied: both owners would close them."""

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

import aiotun
from aiotun.capture import PcapWriter

WAYS: dict[str, Callable[[Any], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "multiprocessing": ForkingPickler.dumps,
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("queues", [1, 2])
async def test_a_device_cannot_be_copied_or_pickled(how: str, queues: int) -> None:
    async with aiotun.open_tun("new0", queues=queues) as tun:
        with pytest.raises(TypeError, match=r"new0.*can't be copied.*device\.queues"):
            WAYS[how](tun)
        gc.collect()
        assert not tun.closed
    with pytest.raises(TypeError, match="can't be copied"):
        WAYS[how](tun)


@pytest.mark.parametrize("how", WAYS)
def test_a_capture_writer_cannot_be_copied_or_pickled(how: str) -> None:
    with PcapWriter(io.BytesIO()) as writer:
        with pytest.raises(TypeError, match="can't be copied"):
            WAYS[how](writer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gc.collect()
        assert writer.write(b"\x45")


@pytest.mark.parametrize("how", WAYS)
async def test_link_events_cannot_be_copied_or_pickled(how: str) -> None:
    link = aiotun.Link("lo")
    async with link.events() as events:
        with pytest.raises(TypeError, match=r"link\.events\(\) again"):
            WAYS[how](events)
        gc.collect()
        await link.set_mtu(1400)
        assert (await anext(events)).kind == "mtu"
