"""The WireGuard example as a client of mitmproxy's WireGuard mode.

mitmproxy ends the tunnel in a stack of its own, and opens each connection of the client again.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..helpers import fetched
from .programs import Program, running
from .test_wireguard import OUTER, QUICK, Side, end, joined, start_with
from .test_wireguard_private import EXPECTED, SERVER, curl, digest_of_download, ours

pytestmark = pytest.mark.peers

SITE = "203.0.113.1"  # an address that only mitmproxy's namespace has


@contextlib.contextmanager
def intercepting(folder: Path) -> Iterator[tuple[Side, Program, str]]:
    """Our side, mitmproxy at the other side, and the configuration that mitmproxy prints for us."""
    mitmdump = fetched("mitmdump", "missing: mitmproxy; tools/peers.sh mitmproxy installs it")
    with joined(folder) as (a, b):
        b.run("ip", "addr", "add", f"{SITE}/32", "dev", "lo")
        server = [*b.prefix(), sys.executable, "-c", textwrap.dedent(SERVER)]
        command = [*b.prefix(), mitmdump, "--mode", f"wireguard@{OUTER[4][1]}:51820"]
        # Without `stream_large_bodies` it would keep each body in memory, whole.
        for option in (f"confdir={folder}", "stream_large_bodies=1m", "termlog_verbosity=info"):
            command += ["--set", option]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with running(server, "ready"), running(command, env=env) as proxy:
            proxy.expect("[Interface]")
            first = len(proxy.lines) - 1
            proxy.expect("Endpoint")
            config = proxy.lines[first:]
            proxy.expect("listening")
            yield a, proxy, "\n".join(config) + "\n"


def upload(folder: Path) -> tuple[list[str], str]:
    """The command that uploads 20 MB, and the digest with which the server answers."""
    data = os.urandom(1 << 20) * 20
    (folder / "data").write_bytes(data)
    words = curl("-T", str(folder / "data"), f"http://{SITE}/up")
    return words, hashlib.sha256(data).hexdigest()


def test_a_command_with_the_configuration_that_mitmproxy_prints(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    with intercepting(tmp_path) as (_, proxy, config):
        path.write_text(config)
        assert digest_of_download(ours(path, "--", *curl(f"http://{SITE}/down"))) == EXPECTED
        proxy.expect(f"GET http://{SITE}/down")
        words, digest = upload(tmp_path)
        done = subprocess.run(ours(path, "--", *words), capture_output=True, text=True)
        assert done.stdout == digest, done.stderr
        proxy.expect(f"PUT http://{SITE}/up")


def test_new_keys_while_connections_go_on(tmp_path: Path) -> None:
    with intercepting(tmp_path) as (a, _, config):
        path = tmp_path / f"{a.name}.conf"
        path.write_text(config.replace("0.0.0.0/0", f"{SITE}/32"))
        start_with(a, path, *QUICK)
        words, digest = upload(tmp_path)
        seen: set[int] = set()
        deadline = time.monotonic() + 30
        while len(seen) < 4:
            assert time.monotonic() < deadline
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.stdout == digest, done.stderr
            seen.add(a.handshake())
        assert end(a) == ""
