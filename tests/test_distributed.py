"""Two processes give the losses and gradients of one; without processes there is nothing to wait for."""

import subprocess
import sys
from pathlib import Path

import joint_batch
import pytest
import torch

from meru_fast import distributed

SCRIPT = Path(joint_batch.__file__)


def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    done = subprocess.run([*command, tmp_path / "two.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(tmp_path / "two.pt"), joint_batch.everything()
    assert two.keys() == one.keys()
    for model, values in one.items():
        assert two[model].keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(two[model][name], value, rtol=1e-9, atol=1e-12, msg=f"{model}: {name}")


def test_without_a_process_group():
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    assert distributed.all_gather_object("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"
    distributed.barrier()
    x = torch.ones(2, requires_grad=True)
    for function in (distributed.sum_gradient, distributed.mean_over_ranks, distributed.gather_rows):
        assert function(x, None) is x


@pytest.mark.parametrize("factor", [1, 3])
def test_scale_gradient(factor):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = distributed.scale_gradient(x, factor)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.equal(x.grad, 2 * factor * x.detach())
