"""Benchmarks are scripts: their folder is where they find each other, and where tests find their parts."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
