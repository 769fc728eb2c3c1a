"""The wheel: complete, claims one top-level name, and works away from the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["meru_fast", "kernels", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive that was built from a copy of the checkout, without network or isolation."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=JUNK)
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list((source / "dist").glob("*.tar.gz"))) == 1
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_one_top_level_name(members):
    """`kernels` is another project's import name and must not be claimed, nor tests or configs."""
    assert {name.split("/")[0] for name in members if ".dist-info/" not in name} == {"meru_fast"}


def test_every_file_of_the_packages_is_inside(members):
    installed = {"meru_fast": "meru_fast", "kernels": "meru_fast/kernels", "configs": "meru_fast/configs"}
    expected = set()
    for folder, target in installed.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {f"{target}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    assert expected - members == set()
    assert "meru_fast/py.typed" in members


def test_it_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    code = """
import sys, torch, meru_fast, meru_fast.kernels, meru_fast.configs
from pathlib import Path
from meru_fast import config, ops
from meru_fast.tokenizer import Tokenizer

home = Path(sys.argv[1])
for module in (meru_fast, meru_fast.kernels, meru_fast.configs, ops):
    assert Path(module.__file__).is_relative_to(home), module.__file__
x, y = ops.exp_map0(torch.randn(2, 8, 4)).unbind()
assert ops.contrastive_loss(x, y, 1.0, 10.0).isfinite()
assert Tokenizer()("a photo")[0].tolist() == [49406, 320, 1125, 49407]
assert config.load("train_meru_vit_s").model.embed_dim == 512
print("works")
"""
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code, str(target)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "works", run.stdout + run.stderr
