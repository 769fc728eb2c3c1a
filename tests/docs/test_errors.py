"""Errors of public functions: named in their docstrings, and raised for what the docstring says."""

import ast
from pathlib import Path

import pytest
import torch
from small_models import meru

import meru_fast
from meru_fast import checkpoint, config, lorentz, ops
from meru_fast.models.text import TransformerTextEncoder
from meru_fast.models.vision import sincos_2d
from meru_fast.tokenizer import Tokenizer
from meru_fast.training.optim import build_optimizer

PACKAGE = Path(meru_fast.__file__).parent
MODULES = sorted(
    path
    for name in ("ops", "models", "data", "evaluation", "training", "*.py")
    for path in (PACKAGE.glob(name) if "*" in name else (PACKAGE / name).rglob("*.py"))
)
POINTS = torch.zeros(3, 4)


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lorentz.half_aperture(POINTS, min_radius=-1), ValueError, "min_radius must not be negative"),
        (lambda: lorentz.check_points(POINTS.long()), TypeError, "floating"),
        (lambda: lorentz.check_points(POINTS, POINTS[:, :2]), ValueError, "last dimension"),
        (lambda: lorentz.check_points(torch.zeros(3, 0)), ValueError, "at least one component"),
        (lambda: lorentz.check_pairwise(POINTS, POINTS[0]), ValueError, "B1, D"),
        (lambda: ops.exp_map0(POINTS, 0.0), ValueError, "curv must be positive"),
        (lambda: ops.exp_map0(POINTS, torch.ones(2)), ValueError, "one number"),
        (lambda: ops.set_backend("cuda"), ops.backend.BackendError, "expected one of auto"),
        (lambda: ops.topk(POINTS, POINTS, 0, 1.0), ValueError, "k"),
        (lambda: ops.contrastive_loss(POINTS, POINTS[:2], 1.0, 1.0), ValueError, ""),
        (lambda: ops.entailment_loss(POINTS, POINTS[:2], 1.0), ValueError, ""),
        (lambda: meru().encode_image(torch.zeros(3, 8, 8)), ValueError, "expected images"),
        (lambda: meru().encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.int64)), TypeError, "int64"),
        (lambda: TransformerTextEncoder("L1_W64", 50, 8)(torch.zeros(1, 9).int()), ValueError, "padded ids"),
        (lambda: sincos_2d((2, 2), 6), ValueError, "divisible by 4"),
        (lambda: Tokenizer().encode(5), TypeError, "expected a string, got int"),
        (lambda: config.find("nowhere"), config.ConfigError, "no config file 'nowhere'"),
        (lambda: checkpoint.read_checkpoint("nowhere"), checkpoint.CheckpointError, "no such file"),
        (lambda: checkpoint.guess_model({}), checkpoint.CheckpointError, "not the weights"),
        (lambda: checkpoint.find_step(Path("nowhere")), checkpoint.CheckpointError, "nowhere"),
        (lambda: checkpoint.fit_state(meru(), {}, "here"), checkpoint.CheckpointError, "here"),
        (lambda: build_optimizer(meru().requires_grad_(False)), config.ConfigError, "no trainable parameter"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
