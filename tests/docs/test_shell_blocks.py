"""The documentation's commands run, page by page, in a folder with small things of the names that the pages use."""

import importlib.util
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import eval_miniatures
import pytest
import torch
from markdown_blocks import ROOT, blocks, pages
from shard_factory import encoded, photo, write_tar
from shell_commands import commands, run, run_in_bash, understood

from meru_fast import checkpoint, cli, config

SHELL = {page: [block for block in blocks(page) if block.language == "bash"] for page in pages()}
RUN = [page for page, found in SHELL.items() if any(block.no_run is None for block in found)]
NOT_RUN = [(page, block) for page, found in SHELL.items() for block in found if block.no_run is not None]
MAX_NOT_RUN = 15
INLINE = re.compile(r"`((?:meru-fast|make|pytest|python -m|python scripts/|python examples/|scripts/|examples/)[^`]*)`")
#: In place of a published config: the same with the smallest towers, for two steps.
SMALL = """
from meru_fast.configs.train_meru_vit_l import dataset, model, optim, train

model.visual.update({"arch": "vit_base_patch16_224", "embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 32})
model.textual.arch = "L1_W64"
model.embed_dim = 32
dataset.image_size = 32
optim["lr_scheduler"]["warmup_steps"] = 1
train |= {"total_batch_size": 16, "num_iterations": 2, "num_workers": 0, "log_period": 1}
"""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as its reader has it after some work: shards, photos, evaluation data, a run, weights."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    shutil.copytree(ROOT / "configs", folder / "configs")
    for size in "sbl":
        (folder / "configs" / f"train_meru_vit_{size}.py").write_text(SMALL)
    for shared in ("scripts", "examples", "tests", "Makefile"):
        (folder / shared).symlink_to(ROOT / shared)
    (folder / ".venv").symlink_to(sys.prefix)
    _write_data(folder)
    with pytest.MonkeyPatch.context() as inside:
        inside.chdir(folder)
        _write_models(folder)
    return folder


def _write_data(folder: Path) -> None:
    pictures = [encoded(photo(number, 48)) for number in range(4)]
    for name, count in (("redcaps", 600), ("cc12m", 60)):
        members = [
            (f"{name}{number}.{suffix}", content)
            for number in range(count)
            for suffix, content in (("jpg", pictures[number % 4]), ("txt", f"picture {number}".encode()))
        ]
        write_tar(folder / "datasets" / name / "shard_00000.tar", members)
    for name in ("photo.jpg", "cat.jpg", "dog.jpg", "downloads/redcaps/images/cats/c1.jpg", "data/scenes/1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pictures[0])
    (folder / "captions.txt").write_text("a dog\na corgi on wet sand\n")
    rows = [{"image": f"{name}.jpg", "captions": [f"a {name}", f"a {name} at home"]} for name in ("cat", "dog")] * 4
    (folder / "gallery.json").write_text(json.dumps(rows))
    (folder / "data" / "scenes" / "test.json").write_text(json.dumps([{"image": "1.jpg", "captions": ["a scene"]}]))
    record = {"image_id": "c1", "subreddit": "cats", "caption": "a cat"}
    (folder / "downloads" / "redcaps" / "annotations").mkdir()
    (folder / "downloads" / "redcaps" / "annotations" / "cats_2019.json").write_text(
        json.dumps({"annotations": [record]})
    )
    eval_miniatures.webdataset(folder / "datasets" / "eval" / "cifar100", "cifar100")
    eval_miniatures.coco(folder / "datasets" / "eval" / "coco", None)


def _write_models(folder: Path) -> None:
    cfg = config.load("configs/train_meru_vit_s.py")
    torch.manual_seed(0)
    checkpoint.save_published(folder / "meru_vit_s.pth", config.instantiate(cfg.model).state_dict())
    config.instantiate(config.load("configs/train_clip_vit_s.py").model).save_pretrained(folder / "runs" / "clip")
    train = ["train", "--config", "configs/train_meru_vit_s.py", "--output-dir", "runs/meru"]
    assert cli.main([*train, "dataset.shards=datasets/redcaps"]) == 0
    shutil.copytree(folder / "runs" / "meru", folder / "runs" / "meru_vit_l")


@pytest.mark.parametrize("runner", [run, pytest.param(run_in_bash, marks=pytest.mark.slow)])
@pytest.mark.parametrize("page", RUN, ids=name)
def test_commands_of_a_page_run_in_order(page, runner, checkout, tmp_path, monkeypatch):
    """In this process, where imports are paid once; behind --slow in bash, letter by letter."""
    shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    for block in SHELL[page]:
        if block.no_run is None:
            runner(block.code)


def test_few_blocks_are_not_run_and_each_says_why():
    found = "\n".join(f"{name(page)}:{block.line}: {block.no_run}" for page, block in NOT_RUN)
    assert all(block.no_run for _, block in NOT_RUN), found
    assert len(NOT_RUN) <= MAX_NOT_RUN, found


@pytest.mark.parametrize(("page", "block"), NOT_RUN, ids=lambda value: getattr(value, "line", None) or name(value))
def test_commands_that_are_not_run_have_arguments_that_their_programs_take(page, block, monkeypatch):
    """Flags by the program's own parser; configs are loaded with the overrides given."""
    monkeypatch.chdir(ROOT)
    for words in commands(block.code):
        assert not missing(words)
        assert understood(words), shlex.join(words)


def missing(words: list[str]) -> list[str]:
    """What a command names of this project that is not there: scripts, modules, make targets, commands."""
    faults = [word for word in words if re.fullmatch(r"(scripts|examples|configs|benchmarks)/[\w/]+\.(py|json)", word)]
    faults = [word for word in faults if not (ROOT / word).is_file()]
    for flag, value in itertools.pairwise(words):
        ours = value.split(".")[0] in ("meru_fast", "benchmarks")
        if flag == "-m" and ours and not _module_exists(value):
            faults.append(value)
        if Path(flag).name == "make" and value.isalpha() and f"\n{value}:" not in (ROOT / "Makefile").read_text():
            faults.append(f"make {value}")
        if Path(flag).name == "meru-fast" and value.isalpha() and value.islower() and value not in cli.COMMANDS:
            faults.append(f"meru-fast {value}")
    return faults


def _module_exists(module: str) -> bool:
    if module.startswith("benchmarks"):
        return (ROOT / f"{module.replace('.', '/')}.py").is_file()
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_within_the_text_name_what_exists(page):
    assert [fault for code in INLINE.findall(page.read_text()) for fault in missing(code.split())] == []


def test_the_table_of_commands_is_complete():
    table = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert table == [(name, what) for name, (what, _) in cli.COMMANDS.items()]


def test_the_checks_can_fail(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert missing(["python", "scripts/trian.py"]) == ["scripts/trian.py"]
    assert missing(["python", "-m", "meru_fast.nothing"]) == ["meru_fast.nothing"]
    assert missing(["make", "deno"]) == ["make deno"]
    assert missing(["meru-fast", "trian"]) == ["meru-fast trian"]
    assert missing(["make", "demo"]) == missing(["meru-fast", "train"]) == missing(["meru-fast", "--help"]) == []
    train = "torchrun --nproc_per_node 8 scripts/train.py --config train_meru_vit_l"
    assert understood(shlex.split(train))
    with pytest.raises(config.ConfigError, match="num_iterations"):
        understood(shlex.split(f"{train} train.num_iteration=1"))
    with pytest.raises(config.ConfigError, match="no config file"):
        understood(shlex.split(f"{train}arge"))
    with pytest.raises(config.ConfigError, match="no DeepSpeed config"):
        understood(shlex.split(f"{train} --deepspeed_config no.json"))
    assert not understood(shlex.split(f"{train} --output_dirr x"))
    assert not understood(["meru-fast", "report", "--gallery", "g.json"])
    with pytest.raises(AssertionError, match="status 1: meru-fast export"):
        run("meru-fast export --checkpoint-path nowhere --output x.pth")
    with pytest.raises(AssertionError, match="no such file"):
        run_in_bash("meru-fast export --checkpoint-path nowhere --output x.pth")
