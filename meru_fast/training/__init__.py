"""Training: DeepSpeed engine, loop, schedule, checkpoints, guards, metrics. Imports nothing heavy by itself."""

from typing import Any


def main(argv: list[str] | None = None) -> int:
    """``scripts/train.py`` and ``meru-fast train``. Returns the exit status."""
    from meru_fast.training.launch import main

    return main(argv)


def train(config: Any, output_dir: str, **options: Any) -> int:
    """Train in this process. See :func:`meru_fast.training.loop.train`."""
    from meru_fast.training.loop import train

    return train(config, output_dir, **options)
