"""``meru-fast export``: any checkpoint as safetensors with its config, or as a ``.pth`` in the published layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from meru_fast import checkpoint, config


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one checkpoint. Raises CheckpointError or ConfigError."""
    parser = argparse.ArgumentParser(
        prog="meru-fast export",
        description="Write a checkpoint (a DeepSpeed run of any ZeRO stage, a published .pth) in a form to hand out.",
        epilog="examples:\n"
        "  meru-fast export --checkpoint-path runs/s --output export/s          model.safetensors and config.json\n"
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
    given = config.load(args.train_config).model if args.train_config else None
    model, info = checkpoint.load_model(args.checkpoint_path, given, ema=args.ema)
    state = model.state_dict()
    if args.output.suffix == ".pth":
        args.output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_published(args.output, state, info.iteration or 0, info.root)
    else:
        found = info.model if info.model is not None else checkpoint.guess_model(state)
        checkpoint.save_export(args.output, state, _plain(found if given is None else given), info.iteration, info.root)
    step = "" if info.iteration is None else f", step {info.iteration:,}"
    print(f"{args.output}: {info.kind} checkpoint {info.file}{step}")
    return 0


def _plain(node) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)
