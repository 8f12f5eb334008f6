"""Fixtures for pytest; pytest finds them when aiotun is installed.

| fixture | value |
|---|---|
| `netns` | an fd of the empty network namespace that the test's thread is in; see `isolated` |
| `tun` | an open `TunDevice` in it, with 10.0.0.1/24 and fd00::1/64 |
| `tap` | an open `TapDevice` in it, with 10.0.1.1/24 and fd00:1::1/64 |
| `device_pair` | two connected devices; see `testing.memory_pair` |

The plugin does not affect test runs that use none of the fixtures. The fixtures are ordinary
functions, so they work with pytest-asyncio, with anyio, and without either.

Root needs nothing else. For an ordinary user ``pytest --aiotun-isolate``, or ``aiotun_isolate =
true`` in pytest's configuration, restarts the whole run inside user, mount and network namespaces
before anything is collected. The plugin never does this without being asked, because inside the
namespaces the user appears as root and has no network. Without this option and without root, the
fixtures `netns`, `tun` and `tap` fail with an error that explains it. They never open anything in
the machine's own namespace.
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
    text = "run all tests inside private user, mount and network namespaces"
    parser.getgroup("aiotun").addoption("--aiotun-isolate", action="store_true", help=text)
    parser.addini("aiotun_isolate", text, type="bool", default=False)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Restart the run in private namespaces if that was asked for, before collecting tests."""
    if not (config.getoption("--aiotun-isolate") or config.getini("aiotun_isolate")):
        return None
    try:
        if isolation.inside(os.environ):
            return None
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    # Restore stdout and stderr: pytest has replaced them by files, which would stay after the exec.
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    os.chdir(config.invocation_params.dir)
    sys.stdout.flush()
    sys.stderr.flush()
    # Repeat the original command line, with all its options: -X, -m, -p no:..., a debugger. Only a
    # process with a single thread may enter a user namespace. This one may have other threads by
    # now, so replace it by a new program.
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execv(sys.executable, [sys.executable, "-m", isolation.__name__, *command])


@pytest.fixture
def netns() -> Iterator[int]:
    """An fd of an empty network namespace, which only this test is in, with `lo` up."""
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
    """Two TUN devices without a kernel interface; each receives what the other sends."""
    one, other = memory_pair()
    yield one, other
    one.close()
    other.close()


def _opened(opener: Opener[D]) -> int:
    """Open a device in a temporary loop, because the test's loop may not exist yet.

    An fd belongs to no loop. The device made from it belongs to the first loop that awaits it.
    """

    async def main() -> int:
        return (await opener).queues[0].detach()

    return threads.run_blocking(lambda: asyncio.run(main()))
