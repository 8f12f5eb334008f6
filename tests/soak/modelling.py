"""The model (tests/model) beside the scenes: random interleavings for as long as the soak lasts."""

import subprocess
import sys
import tempfile

__all__ = ["Beside"]

_LONGER = 120.0  # seconds that the model may take beyond its time: to make a case shorter


class Beside:
    """A process of its own, in namespaces of its own."""

    def __init__(self, seconds: float, seed: int) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by finish
        command = [sys.executable, "-m", "tests.model", "--seconds", str(seconds)]
        # The machine is busy with the scenes: what takes a few seconds is no hang yet.
        command += ["--seed", str(seed), "--patience", "10", "--shrink"]
        self._process = subprocess.Popen(command, stdout=self._said, stderr=subprocess.STDOUT)

    def finish(self, *, early: bool) -> str:
        """Give what it found: nothing where all was well, or where the soak ends early."""
        if early:
            self._process.terminate()
        try:
            status = self._process.wait(_LONGER)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = -1
        self._said.seek(0)
        said = self._said.read().strip()
        self._said.close()
        if early:
            return ""
        print(f"\nmodel: {said}")
        return "" if status == 0 else f"status {status}; what it said stands above"
