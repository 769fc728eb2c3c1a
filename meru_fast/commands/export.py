"""``meru-fast export``: any checkpoint as safetensors with its config, or as a ``.pth`` in the published layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from meru_fast import config


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one checkpoint. Raises CheckpointError or ConfigError."""
    parser = argparse.ArgumentParser(
        prog="meru-fast export",
        description="Write a checkpoint (a DeepSpeed run of any ZeRO stage, a published .pth) in a form to hand out.",
        epilog="examples:\n"
        "  meru-fast export --checkpoint-path runs/s --output export/s          weights, config and model card\n"
        "  meru-fast export --checkpoint-path runs/s --output s.pth             the layout of the published files\n"
        "  meru-fast export --checkpoint-path meru_vit_s.pth --output export/meru_vit_s\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint-path", required=True, help="run folder, DeepSpeed checkpoint folder, exported folder or .pth")
    add("--output", required=True, type=Path, help="a folder, or a file ending in .pth")
    add("--train-config", help="the config it was trained with (default: the run's own, or a guess from the weights)")
    add("--ema", action="store_true", help="the averaged weights that a run keeps beside its own")
    args = parser.parse_args(argv)
    from meru_fast.models.export import export

    given = config.load(args.train_config).model if args.train_config else None
    info = export(args.checkpoint_path, args.output, given, ema=args.ema)
    step = "" if info.iteration is None else f", step {info.iteration:,}"
    print(f"{args.output}: {info.kind} checkpoint {info.file}{step}")
    return 0
