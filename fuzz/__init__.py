"""Fuzz targets for everything that reads a stranger's bytes: `make fuzz`; see README.md."""

import sys
from pathlib import Path

# The examples' modules import each other from their folder.
sys.path.append(str(Path(__file__).parent.parent / "examples"))
