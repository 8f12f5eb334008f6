"""What every test gets: private namespaces, both event loops, and a check that nothing leaks."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping

import hypothesis
import pytest
import uvloop

from . import _isolation, invariants
from ._leaks import LeakCheck

# A busy or emulated machine is slow, which is no fault of what is tested.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

# --- The whole run -------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Before anything is collected, restart in private namespaces; without them, run nothing."""
    if _isolation.MARKER in os.environ:
        return None  # pytest_configure checks that the marker tells the truth
    # pytest has replaced stdout and stderr by its own files, and these would survive the exec.
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    os.chdir(config.invocation_params.dir)
    # The original command line keeps every option: -X, -m, -p no:..., a debugger.
    command = [sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        _isolation.enter(command, os.environ)
    except (_isolation.IsolationError, OSError) as error:
        sys.stderr.write(f"aiotun tests: {error}\n")
        sys.stderr.flush()
    return pytest.ExitCode.USAGE_ERROR


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run outside of the private namespaces.

    This also catches a run that loaded this file too late for the hook above: pytest loads the
    conftest.py files of the folders that its arguments name, and no others.
    """
    if _isolation.MARKER not in os.environ:
        pytest.exit("aiotun tests: name the tests folder, or a file in it, on the command line", 4)
    why = _isolation.problem(os.environ)
    if why is not None:
        pytest.exit(f"aiotun tests: {why}", 4)
    # The workers of pytest-xdist (-n) run at the same time, and their tests put files, mounts and
    # names of namespaces into /run.
    if hasattr(config, "workerinput"):
        _isolation.unshare_run()
    # A shell makes a program that it starts with '&' ignore SIGINT, and the programs that the tests
    # start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- Skips that are no excuse in CI --------------------------------------------------------------


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI, turn a skip for something that the machine lacks into a failure."""
    if not os.environ.get("CI") or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason.startswith("missing:"):
        report.outcome = "failed"
        report.longrepr = f"{reason}\n(in CI a test may not be skipped for that)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)
    return report


# --- Every test ----------------------------------------------------------------------------------


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test on both loops: aiotun promises to behave the same on each."""
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves open files or threads of ours behind."""
    check = LeakCheck()
    yield
    # All other fixtures of the test have ended by now, but pytest still holds their values. A Link
    # among them would keep its namespace open.
    request.node.funcargs.clear()
    problem = check.problem()
    if problem is not None:
        pytest.fail(problem, pytrace=False)


@pytest.fixture(autouse=True)
def netns(no_leaks: None) -> Iterator[int]:
    """Give the test an empty network namespace of its own, with `lo` up; the value is its fd.

    Only this thread enters the namespace, and threads that it starts. An event loop of a wider
    scope was made before: its sockets stay in the previous namespace, but they are socket pairs,
    which don't use the network.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _isolation.unshare_netns()
        try:
            _isolation.prepare_netns()
            inside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield inside
            finally:
                os.close(inside)
        finally:
            _isolation.setns(before)
    finally:
        os.close(before)


@pytest.fixture(autouse=True)
def checked_queues(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert the invariants of every queue after everything that a loop calls.

    After `no_leaks`, so that what a test patched is let go of before leaks are looked for.
    """
    invariants.install(monkeypatch)
