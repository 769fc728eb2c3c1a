"""What importing costs: the package is light, the ops need torch and Triton only."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torchvision", "timm", "transformers", "deepspeed", "nvidia", "sklearn", "scipy", "matplotlib", "webdataset"}
HEAVY |= {"omegaconf", "tokenizers", "ftfy", "wordsegment", "tensorboard", "xformers", "rich", "PIL", "safetensors"}
TOP_BUDGET_MS = 100  # importlib.metadata is most of it
OPS_BUDGET_MS = 500


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def own_milliseconds(statement: str, given: str) -> float:
    """Time that `statement` takes after the import of `given`, all modules that it brings included."""
    code = f"import time, {given}\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return 1e3 * float(run.stdout)


def test_the_package_alone_imports_no_torch():
    assert "torch" not in modules_after("import meru_fast")


def test_the_ops_import_torch_and_triton_only():
    used = "from meru_fast.ops import contrastive_loss, entailment_loss, exp_map0, meru_loss, pairwise_dist, topk"
    new = modules_after(used) - modules_after("import torch, triton")
    assert not HEAVY & {name.split(".")[0] for name in new}


@pytest.mark.parametrize(
    ("statement", "given", "budget"),
    [
        ("import meru_fast", "sys", TOP_BUDGET_MS),
        ("from meru_fast.ops import contrastive_loss, topk", "torch, triton", OPS_BUDGET_MS),
    ],
)
def test_import_time_stays_within_its_budget(statement, given, budget):
    """The best of a few, because the machine may be busy."""
    assert min(own_milliseconds(statement, given) for _ in range(3)) < budget


@pytest.mark.parametrize("module", ["meru_fast.config", "meru_fast.cli", "meru_fast.lorentz", "meru_fast.data"])
def test_light_modules_leave_heavy_packages_alone(module):
    assert not {"deepspeed", "sklearn", "matplotlib", "timm", "tensorboard"} & modules_after(f"import {module}")
