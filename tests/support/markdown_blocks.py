"""Fenced code blocks of the project's Markdown files, with the line they start at."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
NO_RUN = re.compile(r"<!-- no-run: (?P<reason>[^\n]*?) *-->\s*$")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    no_run: str | None
    """Why the block is not executed: the text of a `<!-- no-run: reason -->` right above it."""


def pages() -> list[Path]:
    """Every page that a reader is meant to follow."""
    return sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        mark = NO_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], code, line, mark["reason"] if mark else None))
    return found
