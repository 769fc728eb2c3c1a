"""The documentation runs: every Python block is executed (test_shell_blocks.py has the commands)."""

import re
from pathlib import Path

import pytest
import torch
from markdown_blocks import ROOT, Block, blocks, pages

PYTHON = [page for page in pages() if any(block.language == "python" for block in blocks(page))]
MAX_NOT_RUN = 4


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


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
def test_fences_name_a_language_that_is_tested_or_plain_data(page):
    """And nothing else: the site would print a fence with options as plain text."""
    assert {block.language for block in blocks(page)} <= {"python", "bash", "text", "json", "bibtex"}
    assert re.findall(r"^ *```\w* [^\n]*", page.read_text(), re.MULTILINE) == []


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
