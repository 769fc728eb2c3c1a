"""The loss is averaged once: what reaches the optimiser is the single-process gradient of the joined batch."""

import subprocess
import sys
from pathlib import Path

import gradient_worker
import pytest
import torch
from training_runs import environment

from meru_fast.training import launch

# fp32 sums in another order: relative to the tensor's own largest gradient, plus some of the largest of all.
OWN, ALL = 1e-5, 1e-6


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """Plain autograd on the whole batch, without DeepSpeed."""
    model = gradient_worker.build()
    loss = model(*gradient_worker.batch())["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return found | {"_loss": loss.detach(), "_norm": torch.nn.utils.get_total_norm(list(found.values()))}


def run_ranks(out: Path, world_size: int, *cases: str) -> dict[str, dict[str, torch.Tensor]]:
    port = launch.free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, gradient_worker.__file__, str(out), *cases],
            env=environment(**launch.Place(rank, world_size, rank, world_size, "127.0.0.1", port).variables()),
        )
        for rank in range(world_size)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(out)


def assert_equal(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], case: str) -> None:
    assert found.keys() == reference.keys(), case
    scale = max(float(value.abs().max()) for name, value in reference.items() if name[0] != "_")
    for name, expected in reference.items():
        error = float((found[name].reshape(expected.shape) - expected).abs().max())
        limit = OWN * float(expected.abs().max()) + (ALL * scale if name[0] != "_" else 0.0)
        assert error <= limit, f"{case} {name}: off by {error:.3g}, allowed {limit:.3g}"


def test_one_process(tmp_path, reference):
    cases = [f"{stage}:{accumulation}" for stage in range(4) for accumulation in (1, 2, 4)]
    for case, found in run_ranks(tmp_path / "out.pt", 1, *cases).items():
        assert_equal(found, reference, f"one process, stage:accumulation {case}")


def test_two_processes(tmp_path, reference):
    cases = [f"{stage}:{accumulation}" for stage in range(4) for accumulation in (1, 2)]
    for case, found in run_ranks(tmp_path / "out.pt", 2, *cases).items():
        assert_equal(found, reference, f"two processes, stage:accumulation {case}")


@pytest.mark.slow
def test_four_processes(tmp_path, reference):
    cases = [f"{stage}:{accumulation}" for stage in range(4) for accumulation in (1, 2)]
    for case, found in run_ranks(tmp_path / "out.pt", 4, *cases).items():
        assert_equal(found, reference, f"four processes, stage:accumulation {case}")
