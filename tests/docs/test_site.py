"""The documentation site builds without a warning, documents every public op, and loads nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_blocks import ROOT

from meru_fast import ops


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: broken links, missing anchors and pages outside the navigation are errors."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_the_reference_has_every_public_op(site):
    reference = (site / "api" / "ops" / "index.html").read_text()
    assert [name for name in ops.__all__ if not re.search(rf'id="meru_fast[.]ops[.]\w+[.]{name}"', reference)] == []


def test_pages_load_nothing_from_other_hosts(site):
    tags = r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)|<link[^>]*"stylesheet"[^>]*href="(https?:[^"]*)'
    loaded = {page.name: found for page in site.rglob("*.html") if (found := re.findall(tags, page.read_text()))}
    assert loaded == {}


def test_formulas_become_mathml():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    html = r'<p>Time <span class="arithmatex">\(x_t = \sqrt{1/c + r^2} &lt; 2\)</span> of a point.</p>'
    drawn = hooks.on_page_content(html)
    assert "<msqrt>" in drawn
    assert "arithmatex" not in drawn
    assert 'display="inline"' in drawn
