"""Fixtures for pytest; they come with aiotun, by themselves.

| fixture | value |
|---|---|
| `netns` | an fd of an empty network namespace that the test's thread is in; see `isolated` |
| `tun` | an open `TunDevice` in it, with 10.0.0.1/24 and fd00::1/64 |
| `tap` | an open `TapDevice` in it, with 10.0.1.1/24 and fd00:1::1/64 |
| `device_pair` | two connected devices; see `testing.memory_pair` |

Nothing happens to runs that use none of them. The fixtures are ordinary functions, so that they go
with pytest-asyncio, anyio, or neither.

Root needs nothing else. For an ordinary user ``pytest --aiotun-isolate``, or ``aiotun_isolate =
true`` in pytest's configuration, starts the whole run anew inside user, mount and network
namespaces, before anything is collected. It is never done unasked: in there everybody is called
root, and there is no network. Without it, and without root, `netns`, `tun` and `tap` are errors
that say so; nothing is ever opened in the machine's own namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TypeVar

import pytest

from ._kernel import isolation, threads
from .device import Device, Opener, TapDevice, TunDevice, open_tap, open_tun
from .errors import AiotunError
from .testing import isolated, memory_pair

__all__ = [
    "device_pair",
    "netns",
    "pytest_addoption",
    "pytest_cmdline_main",
    "tap",
    "tun",
]

D = TypeVar("D", bound=Device)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run everything inside user, mount and network namespaces of its own"
    parser.getgroup("aiotun").addoption("--aiotun-isolate", action="store_true", help=text)
    parser.addini("aiotun_isolate", text, type="bool", default=False)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Before anything is collected: go on in namespaces of our own, where that was asked for."""
    if not (config.getoption("--aiotun-isolate") or config.getini("aiotun_isolate")):
        return None
    try:
        if isolation.inside(os.environ):
            return None
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    # pytest has put its own files in the place of stdout and stderr, which would outlive the exec.
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    os.chdir(config.invocation_params.dir)
    sys.stdout.flush()
    sys.stderr.flush()
    # The original command line keeps everything that was said: -X, -m, -p no:..., a debugger.
    # A process anew has the single thread that it takes; this one may have others by now.
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execv(sys.executable, [sys.executable, "-m", isolation.__name__, *command])


@pytest.fixture
def netns() -> Iterator[int]:
    """An empty network namespace of the test's own, with `lo` up; its value is an fd of it."""
    with contextlib.ExitStack() as stack:
        try:
            inside = stack.enter_context(isolated())
        except AiotunError as error:
            pytest.fail(f"{getattr(error, 'strerror', None) or error}", pytrace=False)
        yield inside


@pytest.fixture
def tun(netns: int) -> Iterator[TunDevice]:
    """A TUN device that is up, with the addresses 10.0.0.1/24 and fd00::1/64."""
    device = TunDevice.from_fd(_opened(open_tun(addresses=["10.0.0.1/24", "fd00::1/64"])))
    yield device
    device.close()


@pytest.fixture
def tap(netns: int) -> Iterator[TapDevice]:
    """A TAP device that is up, with the addresses 10.0.1.1/24 and fd00:1::1/64."""
    device = TapDevice.from_fd(_opened(open_tap(addresses=["10.0.1.1/24", "fd00:1::1/64"])))
    yield device
    device.close()


@pytest.fixture
def device_pair() -> Iterator[tuple[TunDevice, TunDevice]]:
    """Two TUN devices without a kernel, of which each receives what the other sends."""
    one, other = memory_pair()
    yield one, other
    one.close()
    other.close()


def _opened(opener: Opener[D]) -> int:
    """Open a device in a loop of its own: the one that the test will run in may not be there yet.

    An fd belongs to no loop; the device that is made of it belongs to the first that awaits it.
    """

    async def main() -> int:
        return (await opener).queues[0].detach()

    return threads.run_blocking(lambda: asyncio.run(main()))
