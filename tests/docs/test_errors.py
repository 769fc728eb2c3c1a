"""Errors of public functions: named in their docstrings, and raised for what the docstring says."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import clip, meru
from torch import nn

import meru_fast
from meru_fast import checkpoint, config, lorentz, ops, patch
from meru_fast.checkpoint import CheckpointError
from meru_fast.config import ConfigError
from meru_fast.data.errors import DataError
from meru_fast.data.index import open_shards
from meru_fast.data.loader import build_loader
from meru_fast.evaluation import catalog, cones, features, hierarchy, traversal, zeroshot
from meru_fast.evaluation.evaluator import Evaluator
from meru_fast.evaluation.linear_probe import LinearProbe
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.retrieval import ZeroShotRetrieval
from meru_fast.evaluation.sources import ImageFiles, LabelledImages
from meru_fast.evaluation.transforms import EvalTransform
from meru_fast.models import MERU, TransformerTextEncoder, build_timm_vit
from meru_fast.ops import BackendError
from meru_fast.tokenizer import PackedTokens, Tokenizer
from meru_fast.training import train
from meru_fast.training.optim import LinearWarmupCosineDecayLR, build_optimizer
from meru_fast.training.settings import TrainSettings

PACKAGE = Path(meru_fast.__file__).parent
MODULES = sorted(
    path
    for name in ("ops", "models", "data", "evaluation", "training", "*.py")
    for path in (PACKAGE.glob(name) if "*" in name else (PACKAGE / name).rglob("*.py"))
)
POINTS, FEW = torch.zeros(3, 4), torch.zeros(2, 4)
PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.md"))


def undocumented(tree: ast.AST) -> list[str]:
    """Public functions that raise an error that their docstring does not name (a method without one inherits it)."""
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
            continue
        text = ast.get_docstring(function)
        raised = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc]
        names = {ast.unparse(error.func if isinstance(error, ast.Call) else error).split(".")[-1] for error in raised}
        found += [
            f"{function.name}: {name}"
            for name in sorted(names)
            if name[0].isupper() and text is not None and name not in text and name != "NotImplementedError"
        ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_name_what_is_raised(path):
    assert undocumented(ast.parse(path.read_text())) == []


def test_the_check_can_fail():
    source = 'def f(x):\n    """Text."""\n    raise ValueError("x")\n'
    assert undocumented(ast.parse(source)) == ["f: ValueError"]


def located(dotted: str) -> Any:
    """The module, class or function of that name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


def public() -> list[tuple[str, Any]]:
    """What the API pages show: functions, classes and their methods, by name below meru_fast."""
    found = []
    for name, options in re.findall(
        r"^::: (\S+)((?:\n    .*)*)", "\n".join(p.read_text() for p in PAGES), re.MULTILINE
    ):
        thing, members = located(name), re.search(r"members: \[(.*)\]", options)
        if not inspect.ismodule(thing):
            found.append((name, thing))
        elif members:
            found += [(f"{name}.{member}", getattr(thing, member)) for member in members[1].split(", ")]
        else:
            own = [key for key, value in vars(thing).items() if getattr(value, "__module__", "") == name]
            found += [(f"{name}.{key}", getattr(thing, key)) for key in own if not key.startswith("_")]
    for name, thing in list(found):
        if inspect.isclass(thing):
            found += [(f"{name}.{key}", getattr(thing, key)) for key in vars(thing) if not key.startswith("_")]
    return [(name.removeprefix("meru_fast."), thing) for name, thing in found]


def documented_errors(thing: Any) -> set[str]:
    """Names of errors behind the word "Raises" of a docstring."""
    text = thing.__doc__ if inspect.isroutine(thing) or inspect.isclass(thing) or isinstance(thing, property) else None
    return set(re.findall(r"\b(\w+Error)\b", (text or "").partition("Raises")[2]))


class Tower(nn.Module):
    """An encoder that does not tell how it was built."""

    width = 8


def forced_on_fp64() -> None:
    before = ops.backend.requested_backend()
    try:
        ops.backend._requested = "triton"
        ops.active_backend(POINTS.double())
    finally:
        ops.backend._requested = before


def load_with(model_config: dict[str, Any]) -> None:
    checkpoint.save_published("weights.pth", {"a": POINTS})
    try:
        checkpoint.load_model("weights.pth", model_config)
    finally:
        Path("weights.pth").unlink()


def geometry(module: Any, name: str, points: int = 2) -> dict[tuple[str, type], tuple]:
    """The two bad calls that all functions of points share."""
    function = getattr(module, name)
    path = f"{function.__module__}.{name}".removeprefix("meru_fast.")
    return {
        (path, TypeError): (lambda: function(*[POINTS.long()] * points, 1.0), "floating"),
        (path, ValueError): (lambda: function(*[POINTS] * points, 0.0), "curv must be positive"),
    }


def unreadable() -> LabelledImages:
    return LabelledImages("photos", ImageFiles([Path("nowhere.jpg")], [0]), ["a", "b"], ["a {}."])


def loss_twice_differentiated() -> None:
    image = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.contrastive_loss(image, POINTS + 1, 1.0, 1.0), image, create_graph=True)
    gradient.sum().backward()


#: A call for every error that a docstring of the API pages names, and what its message must say.
BAD_CALLS: dict[tuple[str, type], tuple] = {
    **{
        key: value
        for module in (lorentz, ops)
        for name, points in (
            *((name, 2) for name in ("pairwise_inner", "pairwise_dist", "elementwise_inner", "elementwise_dist")),
            *(("oxy_angle", 2), ("pairwise_oxy_angle", 2), ("exp_map0", 1), ("log_map0", 1), ("half_aperture", 1)),
        )
        for key, value in geometry(module, name, points).items()
    },
    ("ops.contrastive.contrastive_loss", TypeError): (
        lambda: ops.contrastive_loss(POINTS.long(), POINTS, 1.0, 1.0),
        "image must be floating point",
    ),
    ("ops.contrastive.contrastive_loss", ValueError): (
        lambda: ops.contrastive_loss(POINTS, FEW, 1.0, 1.0),
        "3 images and 2 texts: pass labels",
    ),
    ("ops.contrastive.contrastive_loss", RuntimeError): (loss_twice_differentiated, "double|second|twice"),
    ("ops.entailment.entailment_loss", TypeError): (
        lambda: ops.entailment_loss(POINTS.long(), POINTS, 1.0),
        "floating",
    ),
    ("ops.entailment.entailment_loss", ValueError): (
        lambda: ops.entailment_loss(POINTS, FEW, 1.0),
        "must have one shape",
    ),
    ("ops.meru.meru_loss", TypeError): (lambda: ops.meru_loss(POINTS.long(), POINTS, 1, 1, 1, 1), "floating"),
    ("ops.meru.meru_loss", ValueError): (lambda: ops.meru_loss(POINTS, FEW, 1, 1, 1, 1), "3 images and 2 texts"),
    ("ops.topk.topk", TypeError): (lambda: ops.topk(POINTS, POINTS, 1, 1.0, entailment=True), "not a bool"),
    ("ops.topk.topk", ValueError): (lambda: ops.topk(POINTS, POINTS, 0, 1.0), "k must be at least 1"),
    ("ops.backend.set_backend", BackendError): (lambda: ops.set_backend("cuda"), "expected one of auto"),
    ("ops.backend.use_backend", BackendError): (lambda: ops.use_backend("cuda").__enter__(), "expected one of auto"),
    ("ops.backend.active_backend", BackendError): (forced_on_fp64, "float32, float16 and bfloat16, not torch.float64"),
    ("models.meru.MERU", ValueError): (lambda: meru(curv_init=-1.0), "curv_init must be positive"),
    ("models.meru.MERU.loss", ValueError): (
        lambda: meru().loss(torch.zeros(3, 32), torch.zeros(2, 32)),
        "3 images and 2 texts",
    ),
    ("models.clip.CLIP", ValueError): (lambda: clip(precision="low"), "precision is one of"),
    ("models.clip.CLIP.encode_image", ValueError): (lambda: clip().encode_image(POINTS), "expected images"),
    ("models.clip.CLIP.encode_image", TypeError): (
        lambda: clip().encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.int64)),
        "int64",
    ),
    ("models.clip.CLIP.encode_text", ValueError): (lambda: clip().encode_text([]), "no captions"),
    ("models.clip.CLIP.encode_text", TypeError): (lambda: clip().encode_text(["a dog"]), "pass Tokenizer"),
    ("models.clip.CLIP.forward", ValueError): (lambda: clip()(POINTS, Tokenizer()(["a"])), "expected images"),
    ("models.clip.CLIP.forward", TypeError): (lambda: clip()(torch.zeros(1, 3, 32, 32), ["a"]), "pass Tokenizer"),
    ("models.clip.CLIP.loss", ValueError): (
        lambda: clip().loss(torch.zeros(3, 32), torch.zeros(2, 32)),
        "3 images and 2 texts",
    ),
    ("models.clip.CLIP.hub_config", ValueError): (lambda: MERU(Tower(), Tower(), 8).hub_config(), "give it a `recipe`"),
    ("models.vision.build_timm_vit", ValueError): (lambda: build_timm_vit("vit_nano"), "vit_nano"),
    ("models.text.TransformerTextEncoder", ValueError): (lambda: TransformerTextEncoder("W64"), "W64"),
    ("models.text.TransformerTextEncoder.forward", ValueError): (
        lambda: TransformerTextEncoder("L1_W64", 50, 8)(torch.zeros(1, 9).int()),
        "padded ids",
    ),
    ("tokenizer.Tokenizer.encode", TypeError): (lambda: Tokenizer().encode(5), "expected a string, got int"),
    ("tokenizer.PackedTokens.from_list", ValueError): (lambda: PackedTokens.from_list([]), "no captions to pack"),
    ("tokenizer.PackedTokens.from_list", TypeError): (lambda: PackedTokens.from_list(["a"]), "pass Tokenizer"),
    ("patch.meru", ImportError): (lambda: patch.meru("nowhere"), "nowhere"),
    ("patch.meru", AttributeError): (lambda: patch.meru("without_models"), "without_models.models has no"),
    ("patch.hycoclip", ImportError): (lambda: patch.hycoclip("nowhere"), "nowhere"),
    ("patch.hycoclip", AttributeError): (lambda: patch.hycoclip("without_models"), "without_models.models has no"),
    ("patch.pairwise_inner_batch", ValueError): (
        lambda: patch.pairwise_inner_batch(POINTS, POINTS, torch.ones(3)),
        r"expected points \[B, N, D\]",
    ),
    ("config.load", ConfigError): (lambda: config.load("nowhere"), "no config file 'nowhere'"),
    ("config.apply_overrides", ConfigError): (
        lambda: config.apply_overrides(config.load("train_meru_vit_s"), ["train.seeds=1"]),
        "did you mean train.seed",
    ),
    ("config.instantiate", ConfigError): (
        lambda: config.instantiate({"_target_": "meru_fast.models.MERUX"}),
        "meru_fast.models.MERUX",
    ),
    ("config.LazyCall", ConfigError): (lambda: config.LazyCall(lambda: None), "cannot be imported by name"),
    ("checkpoint.load_model", CheckpointError): (lambda: checkpoint.load_model("nowhere"), "no such file"),
    ("checkpoint.load_model", ConfigError): (lambda: load_with({"_target_": "meru_fast.models.MERUX"}), "MERUX"),
    ("checkpoint.load_weights", CheckpointError): (lambda: checkpoint.load_weights(meru(), "nowhere"), "no such file"),
    ("checkpoint.read_checkpoint", CheckpointError): (lambda: checkpoint.read_checkpoint("nowhere"), "no such file"),
    ("checkpoint.save_export", CheckpointError): (
        lambda: checkpoint.save_export("never_written", {}, {"_target_": "os.system"}),
        "refused, it names 'os.system'",
    ),
    ("data.loader.build_loader", DataError): (lambda: build_loader("nowhere", batch_size=2), "nowhere"),
    ("data.loader.build_loader", ValueError): (
        lambda: build_loader("synthetic", batch_size=2, rank=2, world_size=2),
        "rank must be from 0",
    ),
    ("data.loader.Loader.load_state_dict", DataError): (
        lambda: build_loader("synthetic", num_samples=8, batch_size=2).load_state_dict({}),
        "no valid 'step'",
    ),
    ("data.index.open_shards", DataError): (lambda: open_shards("nowhere"), "nowhere"),
    ("evaluation.evaluator.Evaluator", DatasetError): (lambda: Evaluator(["cifar10", "cifar10"]), "distinct names"),
    ("evaluation.evaluator.Evaluator", ValueError): (
        lambda: Evaluator([], batch_size=0),
        "batch_size must be at least 1",
    ),
    ("evaluation.evaluator.Evaluator.open", DatasetError): (
        lambda: Evaluator(["cifar10"], "nowhere").open("cifar10", "test"),
        "test part is missing",
    ),
    ("evaluation.evaluator.Evaluator.open_labelled", DatasetError): (
        lambda: Evaluator(["coco"], "nowhere").open_labelled("coco", "test"),
        "coco: the test part is missing",
    ),
    ("evaluation.evaluator.Evaluator.evaluate", DatasetError): (
        lambda: zeroshot.ZeroShotClassification(["cifar10"], "nowhere").evaluate(meru(), "cifar10"),
        "test part is missing",
    ),
    ("evaluation.zeroshot.ZeroShotClassification.classify", DatasetError): (
        lambda: zeroshot.ZeroShotClassification([]).classify(meru(), unreadable()),
        "nowhere.jpg",
    ),
    ("evaluation.zeroshot.class_embeddings", ValueError): (
        lambda: zeroshot.class_embeddings(meru(), ["dog"], ["a photo"]),
        "with one {} each",
    ),
    ("evaluation.retrieval.ZeroShotRetrieval", ValueError): (lambda: ZeroShotRetrieval([], ks=[0]), "positive numbers"),
    ("evaluation.linear_probe.LinearProbe", ValueError): (
        lambda: LinearProbe([], solver="sgd"),
        "solver must be one of",
    ),
    ("evaluation.hierarchy.HierarchicalClassification", ValueError): (
        lambda: hierarchy.HierarchicalClassification(["cifar10"], trees={}),
        "no tree for cifar10",
    ),
    ("evaluation.hierarchy.Hierarchy", ValueError): (lambda: hierarchy.Hierarchy({"a": "b", "b": "a"}), "has a cycle"),
    ("evaluation.hierarchy.Hierarchy.load", ValueError): (lambda: hierarchy.Hierarchy.load("nowhere"), "no such file"),
    ("evaluation.hierarchy.Hierarchy.distance", ValueError): (
        lambda: hierarchy.Hierarchy({"a": "b", "c": "d"}).distance("a", "c"),
        "no path between 'a' and 'c'",
    ),
    ("evaluation.hierarchy.hierarchical_metrics", ValueError): (
        lambda: hierarchy.hierarchical_metrics(hierarchy.Hierarchy({"a": "b"}), ["a"], ["x"]),
        "not in the tree: x",
    ),
    ("evaluation.catalog.open_dataset", DatasetError): (
        lambda: catalog.open_dataset("cifar10", "nowhere"),
        "test part is missing",
    ),
    ("evaluation.catalog.open_own", DatasetError): (lambda: catalog.open_own("mine", "folder", "nowhere"), "nowhere"),
    ("evaluation.catalog.download_dataset", DatasetError): (
        lambda: catalog.download_dataset("imagenet", "nowhere"),
        "register",
    ),
    ("evaluation.transforms.EvalTransform", ValueError): (lambda: EvalTransform(8, "stretch"), "resize must be one of"),
    ("evaluation.features.image_features", DatasetError): (
        lambda: features.image_features(meru(), [], EvalTransform(32), features.Loading(), "photos"),
        "photos: no images",
    ),
    ("evaluation.traversal.traverse", ValueError): (
        lambda: traversal.traverse(meru(), FEW[0], FEW[1], FEW, ["a", "b"], FEW[0], steps=1),
        "steps must be at least 2",
    ),
    ("evaluation.traversal.load_pool", ValueError): (lambda: traversal.load_pool("nowhere"), "nowhere"),
    ("evaluation.cones.cone_statistics", ValueError): (
        lambda: cones.cone_statistics(clip(), POINTS, POINTS),
        "entailment cones exist in hyperbolic models",
    ),
    ("training.settings.TrainSettings.from_config", ConfigError): (
        lambda: TrainSettings.from_config({"total_batchsize": 8}),
        "total_batch_size",
    ),
    ("training.loop.train", ConfigError): (
        lambda: train(config.load("train_meru_vit_s", ["train.seed=1", "train.accumulation_steps=0"]), "never_written"),
        "train.accumulation_steps=0",
    ),
    ("training.optim.build_optimizer", ConfigError): (
        lambda: build_optimizer(meru().requires_grad_(False)),
        "no trainable parameter",
    ),
    ("training.optim.LinearWarmupCosineDecayLR", ConfigError): (
        lambda: LinearWarmupCosineDecayLR(torch.optim.SGD([nn.Parameter(POINTS)]), total_steps=2, warmup_steps=2),
        "warmup_steps=2",
    ),
}
#: What takes a whole run: tests/training/test_guards.py and test_checkpoints.py.
ELSEWHERE = {("training.loop.train", "NonFiniteError"), ("training.loop.train", "CheckpointError")}


@pytest.mark.parametrize("case", BAD_CALLS, ids=lambda case: f"{case[0]}-{case[1].__name__}")
def test_bad_calls(case, tmp_path, monkeypatch):
    call, message = BAD_CALLS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "without_models").mkdir()
    for module in ("__init__", "models", "lorentz"):
        (tmp_path / "without_models" / f"{module}.py").touch()
    with pytest.raises(case[1], match=message) as caught:
        call()
    assert caught.type is case[1] or case[1] in (ImportError, ValueError)
    assert [path.name for path in tmp_path.iterdir()] == ["without_models"]  # nothing was begun


def test_every_documented_error_has_a_bad_call():
    documented = {(name, error) for name, thing in public() for error in documented_errors(thing)}
    assert documented - ELSEWHERE == {(name, error.__name__) for name, error in BAD_CALLS}
