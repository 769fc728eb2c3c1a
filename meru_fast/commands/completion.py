"""``meru-fast completion``: a script that completes commands and options, without a package of its own.

The options are asked from every command's ``--help`` once, when the script is made; completing is instant then.
"""

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Sequence

from meru_fast import cli

BASH = """\
_meru_fast() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version --debug" -- "$word"))
    return
  fi
  local options=""
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [[ "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "--config" ] || [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "--train-config" ]; then
    COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _meru_fast meru-fast
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script."""
    parser = argparse.ArgumentParser(
        prog="meru-fast completion",
        description="Print a script that completes commands and options of meru-fast.",
        epilog="examples:\n"
        '  bash, zsh:  eval "$(meru-fast completion bash)"    in ~/.bashrc or ~/.zshrc\n'
        "  fish:       meru-fast completion fish > ~/.config/fish/completions/meru-fast.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(argv).shell
    options = {name: options_of(name) for name in cli.COMMANDS}
    print(fish(options) if shell == "fish" else bash(options, for_zsh=shell == "zsh"))
    return 0


def options_of(command: str) -> list[str]:
    """Long options that a command's help names."""
    module, function = cli.COMMANDS[command][1].split(":")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    # Options begin their line; in the running text of examples they do not.
    return sorted(set(re.findall(r"^ +(?:-\w, )?(--[a-z][\w-]*)", text.getvalue(), re.MULTILINE)) | {"--help"})


def bash(options: dict[str, list[str]], for_zsh: bool = False) -> str:
    """The script for bash; zsh reads it through its own emulation."""
    from meru_fast import config

    cases = "\n".join(f'    {name}) options="{" ".join(known)}" ;;' for name, known in options.items())
    script = BASH.format(commands=" ".join(options), cases=cases, configs=" ".join(config.available()))
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if for_zsh else script


def fish(options: dict[str, list[str]]) -> str:
    lines = []
    for name, known in options.items():
        text = cli.COMMANDS[name][0].replace("'", "\\\\'")
        lines.append(f"complete -c meru-fast -n __fish_use_subcommand -a {name} -d '{text}'")
        for option in known:
            lines.append(
                f"complete -c meru-fast -n '__fish_seen_subcommand_from {name}' -l {option.removeprefix('--')}"
            )
    return "\n".join(lines)
