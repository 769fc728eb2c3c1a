"""Command line of the evaluation: checkpoints times datasets, resumable, on one or several processes."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from rich.console import Console

from meru_fast import checkpoint, config
from meru_fast.distributed import broadcast_object, is_main_process
from meru_fast.evaluation import checkpoints, output
from meru_fast.evaluation.evaluator import Evaluator
from meru_fast.evaluation.features import fingerprint
from meru_fast.evaluation.output import Result
from meru_fast.evaluation.protocol import DatasetError

if TYPE_CHECKING:
    from meru_fast.models import CLIP

DESCRIPTION = """
Evaluate checkpoints: zero-shot classification, retrieval or linear probes, as the config says.

A checkpoint is a run folder, a DeepSpeed checkpoint folder, an exported file or folder, or a published .pth.
Datasets that are missing are named, with how to get them, and the others go on (`meru-fast datasets` lists them all).
"""

EXAMPLES = """
examples:
  # all 20 classification sets (those that are there)
  meru-fast evaluate --config eval_zero_shot_classification \\
      --checkpoint-path meru_vit_s.pth --train-config train_meru_vit_s
  # two models side by side; continue where a former call stopped
  meru-fast evaluate --config eval_zero_shot_retrieval --skip-existing \\
      --checkpoint-path runs/meru --checkpoint-path runs/clip
  # your own images, one folder for each class
  meru-fast evaluate --config eval_zero_shot_classification --checkpoint-path runs/meru \\
      'evaluator.datasets=[{name: pets, kind: folder, root: my/photos, prompts: ["a photo of a {}."]}]'
  # four GPUs share the images, with the identical result
  torchrun --nproc-per-node 4 scripts/evaluate.py --config ... --checkpoint-path ...
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate. Exits with 1 if no dataset could be evaluated."""
    args = parse(argv)
    console = Console(quiet=not is_main_rank())
    own_group = not dist.is_initialized()
    device = start(args.device)
    try:
        results = run(args, device, console)
    except (config.ConfigError, checkpoint.CheckpointError, DatasetError, ValueError) as error:
        sys.exit(f"error: {error}")
    finally:
        if own_group and dist.is_initialized():
            dist.destroy_process_group()
    if not results:
        sys.exit("error: nothing was evaluated")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="meru-fast evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="a config file with an `evaluator`: configs/eval_*.py")
    checkpoints.add_options(parser)
    add("--output-dir", type=Path, default=Path("output/evaluation"), help="results as JSON and CSV (%(default)s)")
    add("--skip-existing", action="store_true", help="keep results of the same weights and settings in --output-dir")
    add("overrides", nargs="*", metavar="key=value", help="changes to the config, such as evaluator.batch_size=256")
    args = parser.parse_intermixed_args(argv)
    args.checkpoints = checkpoints.named(parser, args)
    return args


def is_main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def start(device: torch.device | None) -> torch.device:
    """The device of this process; joins the process group if a launcher (torchrun) started several processes."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def run(args: argparse.Namespace, device: torch.device, console: Console) -> list[Result]:
    """Evaluate all checkpoints; prints and writes what it finds, and returns it."""
    evaluator: Evaluator = config.instantiate(config.load(args.config, args.overrides).evaluator)
    results = []
    for path, train_config in args.checkpoints:
        model, info = checkpoints.load_model(path, train_config, device)
        title = checkpoint.describe(info.model or checkpoint.guess_model(model.state_dict()))
        origin = f"of {train_config}" if train_config else "recorded with the checkpoint"
        origin = origin if info.model else "guessed from the shapes of the weights"
        console.print(f"[bold]{path}[/bold]: {title} (architecture {origin})", soft_wrap=True, highlight=False)
        results += evaluate_checkpoint(evaluator, model, title, path, args, console)
    if results and is_main_process():
        output.print_table(results, console)
        output.write_csv(results, args.output_dir / f"{evaluator.task}.csv")
        console.print(f"JSON and CSV are in {args.output_dir}", soft_wrap=True, highlight=False)
    return results


def evaluate_checkpoint(
    evaluator: Evaluator, model: "CLIP", title: str, pretrained: str, args: argparse.Namespace, console: Console
) -> list[Result]:
    """One checkpoint on all datasets; a dataset that cannot be read is reported and passed over."""
    weights = fingerprint(model)
    results = []
    for name in evaluator.names:
        path = output.result_path(args.output_dir, pretrained, name, evaluator.task)
        former = broadcast_object(output.read_json(path) if args.skip_existing else None)
        if former and (former.checkpoint_hash, former.settings) == (weights, evaluator.settings):
            console.print(f"  {name}: kept from {path}", soft_wrap=True, highlight=False)
            results.append(former)
            continue
        began = time.perf_counter()
        try:
            metrics = evaluator.evaluate(model, name)
        except DatasetError as error:
            console.print(f"  [yellow]{name}: not evaluated.[/yellow] {error}", soft_wrap=True, highlight=False)
            continue
        result = Result(
            dataset=name,
            model=title,
            pretrained=pretrained,
            task=evaluator.task,
            metrics=metrics,
            provenance=evaluator.provenance(name),
            checkpoint_hash=weights,
            settings=evaluator.settings,
        )
        if is_main_process():
            output.write_json(result, path)
        console.print(f"  {name}: {time.perf_counter() - began:.1f} s", soft_wrap=True, highlight=False)
        results.append(result)
    return results
