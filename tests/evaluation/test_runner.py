"""scripts/evaluate.py: checkpoints times datasets, files, resuming, and several processes with the identical result."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from eval_models import noise, tiny

from meru_fast import checkpoint
from meru_fast.evaluation import main
from meru_fast.evaluation.retrieval import ZeroShotRetrieval
from meru_fast.evaluation.zeroshot import ZeroShotClassification

TRAIN_CONFIG = """
from meru_fast.config import LazyCall as L

model = L("meru_fast.models.{kind}")(
    visual=L("meru_fast.models.build_timm_vit")(arch="vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    textual=L("meru_fast.models.TransformerTextEncoder")(arch="L2_W64", vocab_size=49408, context_length=77),
    embed_dim=48,
)
"""
RANKS = Path(__file__).parents[1] / "support" / "eval_ranks.py"
EVALUATE = Path(__file__).parents[2] / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A MERU and a CLIP checkpoint, their configs, and data of both kinds."""
    folder = tmp_path_factory.mktemp("work")
    for kind in ("meru", "clip"):
        model = tiny(kind)
        checkpoint.save_published(folder / f"{kind}.pth", model.state_dict())
        (folder / f"{kind}.py").write_text(TRAIN_CONFIG.format(kind=kind.upper()))
    rows = []
    for label in range(6):
        for shot in range(5):
            path = folder / "classes" / f"c{label}" / f"{shot}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(10 * label + shot).save(path)
            captions = [f"thing {label}", f"picture number {shot} of thing {label}"]
            rows.append({"image": str(path.relative_to(folder)), "captions": captions})
    (folder / "scenes.json").write_text(json.dumps(rows))
    return folder


def arguments(work, output, task, kinds=("meru",), datasets=None, *more):
    own = {
        "zero_shot_classification": f"{{name: classes, kind: folder, root: {work}/classes}}",
        "zero_shot_retrieval": f"{{name: scenes, kind: manifest, root: {work}/scenes.json}}",
        "linear_probe": f"{{name: classes, kind: folder, root: {work}/classes}}",
    }
    given = ["--config", f"eval_{task}", "--output-dir", str(output)]
    for kind in kinds:
        given += ["--checkpoint-path", str(work / f"{kind}.pth"), "--train-config", str(work / f"{kind}.py")]
    return [*given, *more, f"evaluator.datasets={datasets or f'[{own[task]}]'}", "evaluator.batch_size=4"]


def results(output):
    return {path.name: json.loads(path.read_text()) for path in sorted(output.rglob("*.json"))}


def test_two_checkpoints_and_a_missing_dataset(work, tmp_path, capsys):
    datasets = f"[cifar10, {{name: classes, kind: folder, root: {work}/classes}}]"
    main(arguments(work, tmp_path, "zero_shot_classification", ("meru", "clip"), datasets, "--device", "cpu"))
    text = capsys.readouterr().out
    assert text.count("cifar10: not evaluated") == 2
    assert "meru-fast datasets --download cifar10" in text
    assert "MERU, vit_tiny" in text
    assert "acc1" in text
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert len(files) == 2
    assert {path.name for path in files} == {"classes_zeroshot_classification.json"}
    with (tmp_path / "zeroshot_classification.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pretrained"] for row in rows] == [str(work / "meru.pth"), str(work / "clip.pth")]
    for path, row in zip(sorted(files, reverse=True), rows, strict=True):
        stored = json.loads((tmp_path / path).read_text())
        assert set(stored) >= {"dataset", "model", "pretrained", "task", "metrics", "language"}  # of CLIP_benchmark
        assert (stored["dataset"], stored["task"]) == ("classes", "zeroshot_classification")
        assert stored["provenance"] == "own data"
        assert set(stored["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
        assert float(row["acc1"]) == stored["metrics"]["acc1"]


def test_numbers_are_those_of_the_evaluator(work, tmp_path):
    main(arguments(work, tmp_path, "zero_shot_classification"))
    evaluator = ZeroShotClassification([{"name": "classes", "kind": "folder", "root": f"{work}/classes"}])
    expected = evaluator(tiny("meru"))
    stored = results(tmp_path)["classes_zeroshot_classification.json"]["metrics"]
    assert {f"classes/{name}": value for name, value in stored.items()} == pytest.approx(expected)


def test_skip_existing_keeps_only_the_same_weights_and_settings(work, tmp_path, monkeypatch, capsys):
    given = arguments(work, tmp_path, "zero_shot_retrieval", ("meru",), None, "--skip-existing")
    main(given)
    first = results(tmp_path)
    calls = []
    original = ZeroShotRetrieval.evaluate
    monkeypatch.setattr(ZeroShotRetrieval, "evaluate", lambda *given: calls.append(1) or original(*given))
    main(given)
    assert calls == []
    assert "kept from" in capsys.readouterr().out
    assert results(tmp_path) == first
    main([*given, "evaluator.resize=crop"])
    assert len(calls) == 1
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text()[:50])  # a file cut off is evaluated again
    main(given)
    assert len(calls) == 2
    assert results(tmp_path) == first
    checkpoint.save_published(work / "meru.pth", tiny("meru", seed=1).state_dict())
    try:
        main(given)
        assert len(calls) == 3
    finally:
        checkpoint.save_published(work / "meru.pth", tiny("meru").state_dict())


def test_architecture_is_guessed_and_said(work, tmp_path, capsys):
    given = arguments(work, tmp_path, "zero_shot_classification")
    at = given.index("--train-config")
    main(given[:at] + given[at + 2 :])
    assert "architecture guessed from the shapes of the weights" in " ".join(capsys.readouterr().out.split())
    main(arguments(work, tmp_path / "told", "zero_shot_classification"))
    assert [value["metrics"] for value in results(tmp_path / "told").values()] == [
        value["metrics"] for path, value in results(tmp_path).items()
    ][:1]


def test_an_export_brings_its_architecture(work, tmp_path, capsys):
    tiny("meru").save_pretrained(tmp_path / "export")
    given = arguments(work, tmp_path / "exported", "zero_shot_classification", ("meru",))
    at = given.index("--train-config")
    given = [str(tmp_path / "export") if word.endswith("meru.pth") else word for word in given[:at] + given[at + 2 :]]
    main(given)
    assert "guessed" not in capsys.readouterr().out
    main(arguments(work, tmp_path / "published", "zero_shot_classification"))
    exported, published = (results(tmp_path / name) for name in ("exported", "published"))
    assert [value["metrics"] for value in exported.values()] == [value["metrics"] for value in published.values()]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("cut.pth", lambda whole: whole[: len(whole) // 2], "cut.pth"),
        ("empty.pth", lambda whole: b"", "empty.pth"),
        ("picture.pth", lambda whole: b"\x89PNG" + whole[:100], "picture.pth"),
        ("cut.safetensors", lambda whole: b"\x10\x00", "cut.safetensors"),
    ],
)
def test_a_wrong_checkpoint_is_named(work, tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content((work / "meru.pth").read_bytes()))
    given = arguments(work, tmp_path, "zero_shot_classification")
    with pytest.raises(SystemExit, match=fault) as error:
        main([word.replace(str(work / "meru.pth"), str(tmp_path / name)) for word in given])
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda given: [*given, "evaluator.batchsize=4"], "unknown config key 'evaluator.batchsize'; did you mean"),
        (lambda given: ["--config", "eval_linear_prob", *given[2:]], "did you mean eval_linear_probe"),
        (lambda given: [word.replace("meru.pth", "absent.pth") for word in given], "absent.pth: no such file"),
        (lambda given: [word.replace("/classes}", "/nothing}") for word in given], "nothing was evaluated"),
        (lambda given: [word.replace("kind: folder", "kind: zip") for word in given], "nothing was evaluated"),
        (lambda given: [*given, "evaluator.resize=stretch"], "resize must be one of crop, squeeze"),
    ],
)
def test_bad_input_is_one_clear_error(work, tmp_path, change, fault, capsys):
    with pytest.raises(SystemExit) as error:
        main(change(arguments(work, tmp_path, "zero_shot_classification")))
    assert fault in str(error.value)


def test_a_damaged_image_is_named_and_the_others_go_on(work, tmp_path, capsys):
    folder = tmp_path / "classes" / "a"
    folder.mkdir(parents=True)
    noise(0).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:200])
    own = "{{name: {}, kind: folder, root: {}/classes}}"
    datasets = f"[{own.format('bad', tmp_path)}, {own.format('good', work)}]"
    main(arguments(work, tmp_path / "out", "zero_shot_classification", ("clip",), datasets))
    assert "bad.png: not a readable image" in "".join(capsys.readouterr().out.split("\n"))
    assert list(results(tmp_path / "out")) == ["good_zeroshot_classification.json"]


def test_two_processes_give_the_identical_result(work, tmp_path):
    """30 images in batches of 4: eight batches over two ranks, the last one short; same bits, same files.

    An image that only the second rank reads is broken in one dataset: both ranks pass over that dataset, and neither
    waits.
    """
    for part in ("train", "val", "test"):
        (tmp_path / part).symlink_to(work / "classes")
    (tmp_path / "bad" / "a").mkdir(parents=True)
    for number in range(8):
        noise(number).save(tmp_path / "bad" / "a" / f"{number}.png")
    (tmp_path / "bad" / "a" / "6.png").write_bytes(b"no image")
    folder = "{{name: {}, kind: folder, root: '{}'}}"
    classification = f"[{folder.format('bad', tmp_path / 'bad')}, {folder.format('good', work / 'classes')}]"
    probe = f"[{folder.format('probe', tmp_path / '{part}')}]"
    tasks = {"zero_shot_classification": classification, "zero_shot_retrieval": None, "linear_probe": probe}

    def commands(output):
        return [
            arguments(work, tmp_path / output, task, ("meru",), datasets, "--device", "cpu")
            + (["evaluator.cache_dir=null"] if task == "linear_probe" else [])
            for task, datasets in tasks.items()
        ]

    for command in commands("one"):
        main(command)
    (tmp_path / "commands.json").write_text(json.dumps(commands("two")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, str(RANKS), str(tmp_path / "commands.json")],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    names = ["good_zeroshot_classification.json", "probe_linear_probe.json", "scenes_zeroshot_retrieval.json"]
    assert list(results(tmp_path / "two")) == names
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_script_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(EVALUATE), run_name="__main__")
    assert error.value.code == 0
    text = capsys.readouterr().out
    for word in ("--checkpoint-path", "--train-config", "--skip-existing", "torchrun", "examples:"):
        assert word in text


def test_device_can_be_chosen(work, tmp_path, device):
    main(arguments(work, tmp_path, "zero_shot_retrieval", ("meru",), None, "--device", str(device)))
    assert results(tmp_path)
