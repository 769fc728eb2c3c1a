"""The documentation site builds without a warning."""

import os
import re
import subprocess
import sys

from markdown_blocks import ROOT

from meru_fast import ops


def test_the_site_builds_strictly(tmp_path):
    """Broken links, missing anchors, pages outside the navigation and undocumented API names are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    reference = (tmp_path / "site" / "api" / "ops" / "index.html").read_text()
    assert [name for name in ops.__all__ if not re.search(rf'id="meru_fast[.]ops[.]\w+[.]{name}"', reference)] == []
