"""The checkpoints that a command looks at: the options that name them, and their models."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from meru_fast import checkpoint, config
from meru_fast.checkpoint import CheckpointInfo

if TYPE_CHECKING:
    from meru_fast.models import CLIP


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint-path`` and ``--train-config``, as often as there are checkpoints, and ``--device``."""
    add = parser.add_argument
    add("--checkpoint-path", required=True, action="append", help="what to load; give it several times for several")
    add(
        "--train-config",
        action="append",
        help="the config the checkpoint was trained with: once for all checkpoints or once for each. Default: the "
        "config.yaml of its run folder, or else a guess from the shapes of the weights",
    )
    add("--device", **DEVICE)


def device(name: str) -> torch.device:
    """The device of that name. Raises ArgumentTypeError: it is not here."""
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {reason}") from error


DEVICE: dict[str, Any] = {"type": device, "help": "cpu, cuda or cuda:N (default: a GPU where there is one)"}


def named(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Path and training config of every checkpoint. Ends the command if they cannot be paired."""
    configs = args.train_config or [None]
    if len(configs) == 1:
        configs = configs * len(args.checkpoint_path)
    if len(configs) != len(args.checkpoint_path):
        parser.error(
            f"{len(configs)} --train-config for {len(args.checkpoint_path)} --checkpoint-path: give one or as many"
        )
    return list(zip(args.checkpoint_path, configs, strict=True))


def load_model(
    path: str, train_config: str | None = None, device: torch.device | str | None = None
) -> tuple["CLIP", CheckpointInfo]:
    """The model of a checkpoint in eval mode on `device` (default: a GPU where there is one), and what is known of it.

    ``info.model`` is the config it was built from, None if that was guessed from the weights.

    Raises:
        CheckpointError, ConfigError: as ``checkpoint.load_model`` and ``config.load`` do.
    """
    given = config.load(train_config).model if train_config else None
    model, info = checkpoint.load_model(path, given)
    if given is not None:
        info = replace(info, model=given)
    return cast("CLIP", model).to(device or ("cuda" if torch.cuda.is_available() else "cpu")), info
