"""The program in the README does what is said about it."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..helpers import ROOT, ip


def test_the_ping_responder_answers(tmp_path: Path) -> None:
    ping = shutil.which("ping")
    if ping is None:
        pytest.skip("missing: ping(8); install iputils-ping")
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    program = tmp_path / "responder.py"
    program.write_text(found[1])
    responder = subprocess.Popen([sys.executable, str(program)])
    try:
        deadline = time.monotonic() + 10
        while not any("UP" in link["flags"] for link in ip("addr") if link["ifname"] == "tun0"):
            assert responder.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        asking = [ping, "-n", "-c", "3", "-i", "0.2", "-W", "5", "10.0.0.2"]
        done = subprocess.run(asking, capture_output=True, text=True, timeout=20)
        assert " 3 received" in done.stdout, done.stdout + done.stderr
    finally:
        responder.terminate()
        responder.wait(10)
