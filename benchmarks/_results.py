"""Files of results: JSON with one line for each measurement, so that a diff shows what changed."""

import json
from pathlib import Path
from typing import Any

__all__ = ["as_text", "write"]


def write(path: Path, results: Any) -> None:
    """Write results to a file, replacing its contents."""
    path.write_text(as_text(results) + "\n")


def as_text(value: Any, margin: str = "\n") -> str:
    """Return JSON in which each measurement (an object with samples) takes one line."""
    inner = margin + " "
    if isinstance(value, dict) and "samples" not in value:
        parts = [f"{json.dumps(key)}: {as_text(each, inner)}" for key, each in value.items()]
        return "{" + inner + f",{inner}".join(parts) + margin + "}"
    if isinstance(value, list):
        parts = [as_text(each, inner) for each in value]
        return "[" + inner + f",{inner}".join(parts) + margin + "]"
    return json.dumps(value)
