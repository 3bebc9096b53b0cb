"""The benchmarks' modules, which are run by path, importable here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
