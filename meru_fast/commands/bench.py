"""``meru-fast bench``: the benchmark suite of a source checkout."""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import meru_fast


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m benchmarks.run`` of the checkout. Raises RuntimeError where there is none."""
    checkout = Path(meru_fast.__file__).parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise RuntimeError(
            "the benchmarks are not part of the installed package: clone the repository, install it with "
            "`pip install -e .[all]` and run this command again"
        )
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(checkout))
    try:
        return runpy.run_module("benchmarks.run")["main"](argv)
    finally:
        sys.path.remove(str(checkout))
