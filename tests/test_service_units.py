"""systemd finds no fault in the units of docs/how-to/service.md."""

import re
import subprocess
from pathlib import Path

from .helpers import ROOT, need

UNITS = re.compile(r"`/etc/systemd/system/([^`]+)`.*?```ini\n(.*?)```", re.DOTALL)


def test_systemd_accepts_the_service_units_of_the_page(tmp_path: Path) -> None:
    program = need("systemd-analyze")
    units = dict(UNITS.findall((ROOT / "docs" / "how-to" / "service.md").read_text()))
    assert sorted(units) == ["aiotun-tun0.service", "responder.service"]
    for name, text in units.items():
        # It checks that the programs exist, but here they are installed elsewhere or not at all.
        text = re.sub(r"^(Exec\w+=)/\S+", r"\1/bin/true", text, flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    # Ignore messages about other units of this machine.
    ours = [line for line in done.stderr.splitlines() if any(name in line for name in units)]
    assert ours == []
