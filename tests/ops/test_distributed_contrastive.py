"""contrastive_loss and meru_loss over gloo groups equal one process on the concatenated batch."""

import subprocess
import sys
from pathlib import Path

import contrastive_worker
import pytest
import torch.multiprocessing as mp


@pytest.mark.parametrize(
    ("world", "rows", "backend"), [(2, 37, "torch"), (3, 9, "torch"), (4, 5, "torch"), (2, 9, "triton")]
)
def test_group_equals_one_process(world: int, rows: int, backend: str, tmp_path: Path) -> None:
    """Loss, feature gradients and scalar gradients; texts gathered or passed around a ring; odd local sizes."""
    mp.spawn(contrastive_worker.run, (world, str(tmp_path), backend, rows), nprocs=world)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "rows"), [(3, 130), (4, 9)])
def test_group_equals_one_process_on_the_kernels(world: int, rows: int, tmp_path: Path) -> None:
    mp.spawn(contrastive_worker.run, (world, str(tmp_path), "triton", rows), nprocs=world)


def test_ragged_ranks_are_refused(tmp_path: Path) -> None:
    mp.spawn(contrastive_worker.ragged, (2, str(tmp_path)), nprocs=2)


def test_a_destroyed_group_is_gone(tmp_path: Path) -> None:
    """Nothing keeps its threads alive until the interpreter ends, where they would abort the process."""
    code = f"""
import weakref
import torch
import torch.distributed as dist
from meru_fast import ops

dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
image, text = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
ops.contrastive_loss(image, text, 1.0, 2.0, group=group()).backward()
dist.destroy_process_group()
assert group() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
