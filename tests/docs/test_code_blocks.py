"""The documentation runs: Python blocks are executed, and shell blocks name only what exists."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from markdown_blocks import ROOT, Block, blocks, pages

from meru_fast.cli import COMMANDS

PYTHON = [page for page in pages() if any(block.language in ("python", "py") for block in blocks(page))]
SHELL = [page for page in pages() if any(block.language in ("bash", "sh", "console") for block in blocks(page))]
MAX_NOT_RUN = 6


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "py")]


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """A page's blocks share one namespace, as a reader's session does, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session = {"__name__": "__docs__"}
    for block in python_blocks(page):
        if block.no_run is None:
            exec(compile("\n" * (block.line - 1) + block.code, name(page), "exec"), session)


def test_few_blocks_are_not_run_and_each_says_why():
    found = [(name(page), block) for page in PYTHON for block in python_blocks(page) if block.no_run is not None]
    assert all(block.no_run for _, block in found)
    assert len(found) <= MAX_NOT_RUN, "\n".join(f"{page}:{block.line}: {block.no_run}" for page, block in found)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_fences_name_a_language_and_nothing_else(page):
    """The site would print a fence with options as plain text; the mark above it is <!-- no-run: reason -->."""
    assert re.findall(r"^ *```\w* [^\n]*", page.read_text(), re.MULTILINE) == []


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as words; continuation lines joined, comments and prompts dropped."""
    joined = re.sub(r"\\\n\s*", " ", block.code)
    return [words for line in joined.splitlines() if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def missing(words: list[str]) -> list[str]:
    """What a command names of this project that is not there: scripts, configs, modules, make targets, commands."""
    faults = [word for word in words if re.fullmatch(r"(scripts|examples|configs|benchmarks)/[\w/]+\.(py|json)", word)]
    faults = [word for word in faults if not (ROOT / word).is_file()]
    for flag, value in itertools.pairwise(words):
        ours = value.split(".")[0] in ("meru_fast", "benchmarks")
        if flag == "-m" and ours and not _module_exists(value):
            faults.append(value)
        if Path(flag).name == "make" and value.isalpha() and f"\n{value}:" not in (ROOT / "Makefile").read_text():
            faults.append(f"make {value}")
        if Path(flag).name == "meru-fast" and not value.startswith("-") and value not in COMMANDS:
            faults.append(f"meru-fast {value}")
        if flag == "--config" and value.isidentifier() and not (ROOT / "configs" / f"{value}.py").is_file():
            faults.append(value)
    return faults


def _module_exists(module: str) -> bool:
    if module.startswith("benchmarks"):
        return (ROOT / f"{module.replace('.', '/')}.py").is_file()
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", SHELL, ids=name)
def test_shell_blocks_name_only_what_exists(page):
    shell = [block for block in blocks(page) if block.language in ("bash", "sh", "console")]
    faults = {block.line: fault for block in shell for words in commands(block) if (fault := missing(words))}
    assert not faults


def test_the_table_of_commands_is_complete():
    table = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert table == [(name, what) for name, (what, _) in COMMANDS.items()]


def test_the_shell_check_can_fail():
    assert missing(["python", "scripts/trian.py"]) == ["scripts/trian.py"]
    assert missing(["python", "-m", "meru_fast.nothing"]) == ["meru_fast.nothing"]
    assert missing(["make", "deno"]) == ["make deno"]
    assert missing(["train.py", "--config", "train_meru_vit_z"]) == ["train_meru_vit_z"]
    assert missing(["meru-fast", "trian"]) == ["meru-fast trian"]
    assert missing(["make", "demo"]) == missing(["meru-fast", "train"]) == missing(["meru-fast", "--help"]) == []


def test_blocks_are_found_with_their_lines_and_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nx = 1\n```\n\n<!-- no-run: needs a GPU -->\n```python\ny\n```\n\n"
        "    ```bash\n    ls\n    ```\n"
    )
    assert blocks(page) == [
        Block("python", "x = 1\n", 4, None),
        Block("python", "y\n", 9, "needs a GPU"),
        Block("bash", "ls\n", 13, None),
    ]


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=name)
def test_links_of_the_root_pages_lead_somewhere(page):
    """mkdocs checks the links inside docs/; these pages are read on the repository's front page."""
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
