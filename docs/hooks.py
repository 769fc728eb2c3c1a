"""Build steps of the site: pages that live in the project's root, and formulas without JavaScript."""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_files(files: Files, config) -> Files:
    """Take CONTRIBUTING.md and CHANGELOG.md in; their links to docs/ become links inside the site."""
    for page, source in FROM_ROOT.items():
        text = (Path(config.config_file_path).parent / source).read_text()
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_content(html: str, **_unused) -> str:
    """LaTeX to MathML, which browsers draw themselves."""

    def draw(match: re.Match) -> str:
        kind, latex = match.groups()
        for entity, letter in ENTITIES.items():
            latex = latex.replace(entity, letter)
        latex = latex.replace("\\operatorname{log1p}", "\\mathrm{log1p}")  # the converter knows no digits in a name
        return convert(latex, display="block" if kind == "div" else "inline")

    return FORMULA.sub(draw, html)
