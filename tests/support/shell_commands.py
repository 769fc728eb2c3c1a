"""The commands of the documentation's shell blocks: as words, run in this process, or only to their arguments."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from meru_fast import cli, config
from meru_fast.training import deepspeed_config


def commands(code: str) -> list[list[str]]:
    """Each command as words; continuation lines joined, comments and prompts dropped."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def program(words: list[str]) -> Callable[[], object] | None:
    """What a command would start, to be called in this process; None if it is no program of ours.

    A launcher's own arguments are read by the launcher, and it starts the one process that every rank is.
    """
    name, *rest = words
    match Path(name).name:
        case "srun":
            return program(rest)
        case "deepspeed":
            from deepspeed.launcher.runner import parse_args

            parsed = parse_args(rest)
            return _script(parsed.user_script, parsed.user_args)
        case "torchrun":
            from torch.distributed.run import parse_args

            parsed = parse_args(rest)
            return _script(parsed.training_script, parsed.training_script_args)
        case "meru-fast":
            return lambda: cli.main(rest)
        case "python" if rest[0] == "-m":
            return lambda: _as_main(runpy.run_module, rest[1], rest[1:])
        case "python":
            return _script(rest[0], rest[1:])
    return None


def _script(path: str, arguments: list[str]) -> Callable[[], object]:
    return lambda: _as_main(runpy.run_path, path, [path, *arguments])


def _as_main(start: Callable, name: str, argv: list[str]) -> int:
    with patch.object(sys, "argv", argv), patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
        try:
            start(name, run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def run(code: str) -> None:
    """Run a block: our programs in this process, a block with others in bash. Raises AssertionError."""
    started = [(words, program(words)) for words in commands(code)]
    if not all(start for _, start in started):
        run_in_bash(code)
        return
    for words, start in started:
        status = start()
        assert not status, f"status {status}: {shlex.join(words)}"


def run_in_bash(code: str) -> None:
    """Run a block as a reader does. Raises AssertionError."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


class Parsed(BaseException):
    """Ends a program that has understood its arguments."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments


@contextmanager
def parsing_only() -> Iterator[None]:
    def ending(parse: Callable) -> Callable:
        def parse_and_end(parser: argparse.ArgumentParser, *given) -> argparse.Namespace:
            arguments = parse(parser, *given)
            if parser.prog == "meru-fast":  # only chooses the command
                return arguments
            raise Parsed(arguments)

        return parse_and_end

    parser = argparse.ArgumentParser
    with (
        patch.object(parser, "parse_args", ending(parser.parse_args)),
        patch.object(parser, "parse_intermixed_args", ending(parser.parse_intermixed_args)),
    ):
        yield


def understood(words: list[str]) -> bool:
    """Whether a program of ours takes these arguments, and its configs these overrides; True for other programs."""
    start = program(words)
    if start is None:
        return True
    try:
        with parsing_only():
            start()
    except Parsed as end:
        arguments = vars(end.arguments)
    else:  # it has said what is wrong
        return False
    if arguments.get("config"):
        config.load(arguments["config"], arguments["overrides"])
    if arguments.get("deepspeed_config"):
        deepspeed_config.read(arguments["deepspeed_config"])
    return True
