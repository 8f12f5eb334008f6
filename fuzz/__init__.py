"""Fuzz targets for all code that parses bytes from strangers: `make fuzz`; see README.md."""

import sys
from pathlib import Path

# The examples' modules import each other from their own folder.
sys.path.append(str(Path(__file__).parent.parent / "examples"))
