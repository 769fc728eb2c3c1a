"""docs/architecture.md against the code: who imports whom, and what every dependency is for."""

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import meru_fast

PACKAGE = Path(meru_fast.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]


def imported_by(package: str) -> set[str]:
    """First names below meru_fast that the modules of `package` import, its own apart."""
    found = set()
    for path in (PACKAGE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("meru_fast.")}
            elif isinstance(node, ast.ImportFrom) and node.module == "meru_fast":
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("meru_fast."):
                found.add(node.module.removeprefix("meru_fast."))
    return {name.partition(".")[0] for name in found} - {package, ""}


@pytest.mark.parametrize("package", ["ops", "models", "data", "training", "evaluation"])
def test_the_page_says_what_a_package_imports(package):
    [column] = [row[2] for row in ROWS if row[0] == f"`meru_fast/{package}/`"]
    documented = {name.partition("/")[0] for name in re.findall(r"`([^`]+)`", column)}
    assert documented == imported_by(package)


def test_every_module_has_a_place():
    places = " ".join(row[0] for row in ROWS)
    modules = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    modules.remove("__init__.py")
    assert [name for name in sorted(modules) if not re.search(rf"[`/]{re.escape(name)}[`/]", places)] == []


def test_every_dependency_is_explained():
    explained: dict[str, set[str]] = {}
    for packages, extras, _ in (row for row in ROWS if len(row) == 3):
        for name in packages.split(", "):
            explained.setdefault(name, set()).update(extras.strip("()").split(", "))
    expected: dict[str, set[str]] = {}
    for text in metadata.requires("meru_fast") or ():
        requirement = Requirement(text)
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
        if extra is None or extra[1] != "all":
            expected.setdefault(requirement.name, set()).add(extra[1] if extra else "core")
    assert {name: explained.get(name) for name in expected} == expected
