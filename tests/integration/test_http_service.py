"""The example with a device inside a web service, used by HTTP."""

import contextlib
import http.client
import importlib.util
import json
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ..helpers import ip
from .kernel import names
from .test_examples import EXAMPLES, LOOPS, Pinger, Service, check_failure, run, start

if importlib.util.find_spec("aiohttp") is None:
    pytest.skip("missing: aiohttp; install aiotun[examples]", allow_module_level=True)

HTTP = "http_service.py"
OPTIONS = ["--name", "ex0", "--address", "10.81.0.1/24", "--http", "127.0.0.1:8080"]


def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Return status, content type and text."""
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def ask_json(path: str, method: str = "GET") -> Any:
    status, kind, text = ask(path, method)
    assert (status, kind) == (200, "application/json; charset=utf-8"), text
    return json.loads(text)


@contextlib.contextmanager
def served(*more: str) -> Iterator[tuple[Service, Pinger]]:
    with start(HTTP, *OPTIONS, *more) as service, Pinger(4) as pinger:
        assert service.process.stderr is not None
        assert service.process.stderr.readline() == "http://127.0.0.1:8080/\n"
        yield service, pinger


@LOOPS
def test_stats_and_metrics_count_the_pings(loop: list[str]) -> None:
    with served(*loop) as (service, pinger):
        before = ask_json("/stats.json")
        assert (before["name"], before["running"]) == ("ex0", True)
        for _ in range(5):
            pinger.check("10.81.0.2")
        after = ask_json("/stats.json")["counters"]
        grown = {key: after[key] - before["counters"][key] for key in after}
        assert (grown["rx_packets"], grown["tx_packets"]) == (5, 5)
        assert (after["answered"], after["unsent"]) == (5, 0)
        status, kind, text = ask("/metrics")
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert 'aiotun_answered_total{device="ex0"} 5\n' in text
        assert 'aiotun_running{device="ex0"} 1\n' in text
        for line in text.splitlines():
            assert re.fullmatch(r'# TYPE \w+ (counter|gauge)|\w+\{device="ex0"\} \d+', line), line
        assert service.end() == ""


@LOOPS
def test_stop_pauses_answering_and_start_resumes_it(loop: list[str]) -> None:
    with served(*loop) as (service, pinger):
        for _ in range(2):
            assert ask_json("/stop", "POST")["running"] is False
        asked = [pinger.ask("10.81.0.2") for _ in range(3)]
        assert ask_json("/stats.json")["counters"]["answered"] == 0
        assert not pinger.is_answered()
        for _ in range(2):
            assert ask_json("/start", "POST")["running"] is True
        # The packets that waited are answered.
        assert [pinger.answer() for _ in asked] == asked
        assert ask("/start")[0] == 405
        assert service.end() == ""


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"},  # DNS rebinding
    {"Host": "localhost.evil.example"},
    {"Host": "127.0.0.1.evil.example:8080"},
    {"Host": "localhost@evil.example"},
    {"Host": "[::1"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1:8081"},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "null"},
    {"Origin": ""},
]


@LOOPS
def test_what_another_site_has_a_browser_send_is_refused(loop: list[str]) -> None:
    with served(*loop) as (service, _):
        for headers in FOREIGN:
            for path, method in (("/stop", "POST"), ("/stats.json", "GET"), ("/events", "GET")):
                status, _, text = ask(path, method, **headers)
                assert status in (400, 403), headers
                assert "counters" not in text
                assert status == 400 or "Host" in text or "Origin" in text
        assert ask_json("/stats.json")["running"] is True
        assert service.end() == ""


def test_its_own_addresses_and_names_are_accepted() -> None:
    with served("--host-name", "Tun.Example") as (service, _):
        for host in ("127.0.0.1:8080", "localhost", "LocalHost:80", "[::1]:8080", "tun.example"):
            for headers in ({}, {"Origin": f"http://{host}"}, {"Origin": f"https://{host}"}):
                assert ask("/start", "POST", Host=host, **headers)[0] == 200, (host, headers)
        assert service.end() == ""


def test_the_page_is_served_and_other_paths_are_404() -> None:
    with served() as (service, _):
        status, kind, text = ask("/")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        assert "<canvas" in text
        assert ask("/elsewhere")[0] == 404
        assert service.end() == ""


@LOOPS
def test_running_requests_are_finished_at_the_end(loop: list[str]) -> None:
    """Each stream ends at the end of a message, and no response is truncated."""
    with served(*loop) as (service, pinger), contextlib.ExitStack() as stack:
        streams = []
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
            stack.enter_context(contextlib.closing(connection))
            connection.request("GET", "/events")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
            assert answer.readline().startswith(b"data: {")
            streams.append(answer)
        # An idle connection does not delay the end.
        idle = stack.enter_context(socket.create_connection(("127.0.0.1", 8080)))
        pinger.check("10.81.0.2")
        assert service.end() == ""
        for answer in streams:
            rest = answer.read()  # raises IncompleteRead if it was truncated
            assert rest.endswith(b"\n\n")
            last = json.loads(rest.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
            assert last["counters"]["answered"] == 1
        assert idle.recv(1) == b""


@LOOPS
def test_the_interface_is_lost(loop: list[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
    with served(*loop) as (service, _), contextlib.closing(connection):
        connection.request("GET", "/events")
        stream = connection.getresponse()
        assert stream.readline().startswith(b"data: {")
        ip("link", "del", "ex0")
        assert stream.read().endswith(b"\n")  # to its regular end
        for path in ("/stats.json", "/metrics", "/events"):
            status, _, text = ask(path)
            assert status == 503
            assert "ex0" in json.loads(text)["error"]
        assert ask("/")[0] == 200
        assert service.end() == ""


def test_the_http_service_refuses_invalid_arguments() -> None:
    for wrong in ("8080", "127.0.0.1:", ":80", "127.0.0.1:65536"):
        check_failure(run(HTTP, "--http", wrong), 2, "HOST:PORT")
    check_failure(run(HTTP, "--name", "much-too-long-a-name"), 2, "1 to 15")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 8080)):
        check_failure(run(HTTP, *OPTIONS), 1, "address already in use")
    assert names() == []


def test_without_aiohttp_the_error_names_the_extra() -> None:
    code = (
        "import sys, runpy; sys.modules['aiohttp'] = None; sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / HTTP)], capture_output=True, text=True
    )
    check_failure(done, 1, "pip install 'aiotun[examples]'")


@LOOPS
def test_a_client_that_goes(loop: list[str]) -> None:
    """A client that listens to the events disconnects."""
    with served(*loop) as (service, _):
        with socket.create_connection(("127.0.0.1", 8080), timeout=10) as rude:
            rude.sendall(b"GET /events HTTP/1.1\r\nHost: here\r\n\r\n")
            assert rude.recv(4096)
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # By the third event of another client, the service has written to that client twice.
        connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/events")
            answer = connection.getresponse()
            for _ in range(6):
                answer.readline()
        assert service.end() == ""
