"""The command ``meru-fast``: one door to what the scripts and modules do, light until it knows what is asked."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

#: Name, what it does, and the function that takes its arguments and returns an exit status (or None).
COMMANDS = {
    "info": ("versions, GPUs, which kernels run and why not", "meru_fast.commands.info:main"),
    "demo": ("make data, train, evaluate and report, in minutes", "meru_fast.demo:main"),
    "train": ("train a model on one or many GPUs, or on a CPU", "meru_fast.training:main"),
    "evaluate": ("zero-shot classification, retrieval, linear probes", "meru_fast.evaluation:main"),
    "traverse": ("walk from images to the root and read the texts", "meru_fast.evaluation.traversal:main"),
    "report": ("an HTML page with pictures of a model, or of two", "meru_fast.evaluation.report:main"),
    "index": ("scan shards ahead of training", "meru_fast.data.index:main"),
    "verify": ("find every bad sample in shards", "meru_fast.data.verify:main"),
    "datasets": ("list or download the evaluation datasets", "meru_fast.commands.datasets:main"),
    "export": ("write a checkpoint as one safetensors file or .pth", "meru_fast.commands.export:main"),
    "plot": ("draw the metrics of one or several runs", "meru_fast.commands.plot:main"),
    "bench": ("check and measure the kernels on this machine", "meru_fast.commands.bench:main"),
    "completion": ("print a completion script for bash, zsh or fish", "meru_fast.commands.completion:main"),
}

EXAMPLES = """
examples:
  meru-fast info                                               what is installed, and what will run
  meru-fast demo                                               see it work, ten minutes on two CPU cores
  meru-fast index 'datasets/redcaps/*.tar'                     look at the data before training
  meru-fast train --config train_meru_vit_s --output-dir runs/s --num-gpus 8 --resume auto
  meru-fast evaluate --config eval_zero_shot_classification --checkpoint-path runs/s
  meru-fast traverse --image-path cat.jpg --checkpoint-path runs/s
  meru-fast COMMAND --help                                     all options of a command, with examples

An error is one line; --debug shows where it came from.
Completion: eval "$(meru-fast completion bash)"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 for an error, 2 for wrong arguments, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    parser = _parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    arguments = [argument for argument in arguments if argument != "--debug"]
    # Only the first word is parsed here; a command parses its own arguments, --help included.
    name = parser.parse_args(arguments[:1]).command
    try:
        return _status(_function(name)(arguments[1:]), debug)
    except SystemExit as stop:
        return _status(stop.code, debug, stop.__context__)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or type(error).__name__
        hint = "" if debug else " (--debug shows where)"
        print(f"error: {kind}{message}{hint}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from meru_fast import __version__

    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:<{width}}{text}" for name, (text, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="meru-fast",
        usage="meru-fast [--debug] COMMAND ...",
        description=f"Train, evaluate and look at hyperbolic image-text models.\n\ncommands:\n{listing}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meru_fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _function(name: str) -> Callable[[list[str]], object]:
    module, function = COMMANDS[name][1].split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("meru_fast"):
            raise
        raise RuntimeError(
            f"`meru-fast {name}` needs the package {error.name!r}, which is not installed: pip install 'meru_fast[all]'"
        ) from error


def _status(code: object, debug: bool, cause: BaseException | None = None) -> int:
    """An exit status from what a command returned or handed to sys.exit: nothing, a number, or a message."""
    if debug and cause is not None and code not in (None, 0):
        traceback.print_exception(cause)
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
