"""The units in docs/how-to/service.md: systemd finds nothing wrong with them."""

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
        # It looks for the programs, which are installed elsewhere here, or not at all.
        text = re.sub(r"^(Exec\w+=)/\S+", r"\1/bin/true", text, flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    # About other units, of this machine, it may say what it likes.
    ours = [line for line in done.stderr.splitlines() if any(name in line for name in units)]
    assert ours == []
