"""Makes ``cases`` importable from this folder and the one below, and the benchmarks' baseline beside it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
