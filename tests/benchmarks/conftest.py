"""`benchmarks` is a folder of the checkout, not an installed package: make it importable for these tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
