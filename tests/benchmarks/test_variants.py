"""All variants of an op compute the same thing: what is compared is comparable."""

import importlib
from pathlib import Path

import pytest
import torch

from benchmarks import harness, run

CPU = torch.device("cpu")
MODULES = [importlib.import_module(f"benchmarks.{Path(path).stem}") for path in run.files([])]
OPS = [value for module in MODULES for value in vars(module).values() if isinstance(value, harness.Op)]


def test_the_suite_covers_the_ops():
    covered = {"exp_map0", "pairwise_dist", "entailment_loss", "topk", "meru_loss"}
    assert {op.name for op in OPS} >= covered | {f"contrastive_{kind}" for kind in ("lorentz", "cosine", "block")}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_variants_agree_with_fp64(op):
    """The published clamps are far away at these norms, so fp32 rounding is the only difference."""
    for case in op.cases["smoke"]:
        found = harness.measure(op, case, CPU, harness.SMOKE)
        assert len(found) >= 2
        for name, measurement in found.items():
            assert measurement.status == "ok", name
            assert measurement.value_error < 1e-4, name
            assert not op.differentiable or measurement.gradient_error < 2e-3, name
