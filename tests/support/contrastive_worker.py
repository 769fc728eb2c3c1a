"""One rank of a gloo group: its losses and gradients against those of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from contrastive_reference import embeddings

from meru_fast import ops


def run(rank: int, world: int, folder: str, backend: str, rows: int) -> None:
    """Every rank asserts; a failed assertion ends the spawn with its message."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with ops.use_backend(backend):
        for geometry in ("lorentz", "cosine"):
            for ring in (False, True):
                compare(rank, world, rows, geometry, ring)
                if backend == "triton":
                    compare_high(rank, world, rows, geometry, ring)
        compare_meru(rank, world, rows)
    dist.destroy_process_group()


def compare(rank: int, world: int, rows: int, geometry: str, ring: bool) -> None:
    image, text = embeddings(world * rows, 24, 1.0, "clusters")
    mine = slice(rank * rows, (rank + 1) * rows)
    whole = [value.clone().requires_grad_() for value in (image, text, torch.tensor(1.3), torch.tensor(20.0))]
    part = [
        value.clone().requires_grad_() for value in (image[mine], text[mine], torch.tensor(1.3), torch.tensor(20.0))
    ]
    options = {"geometry": geometry, "precision": "highest"}
    expected = ops.contrastive_loss(*whole, **options)
    loss = ops.contrastive_loss(*part, **options, group=dist.group.WORLD, ring=ring)
    (3 * expected).backward()
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected_grads = [whole[0].grad[mine], whole[1].grad[mine], whole[2].grad, whole[3].grad]
    for own, truth, size in zip(part, expected_grads, [60 / rows, 60 / rows, 60.0, 3.0], strict=True):
        if geometry == "lorentz" or truth is not None:
            assert (own.grad - truth).abs().max() <= 2e-6 * size, (rank, geometry, ring, own.shape)


def compare_high(rank: int, world: int, rows: int, geometry: str, ring: bool) -> None:
    """What `high` rounds is made good over the ranks' blocks too. Twins of Lorentz are lost in fp32 already."""
    image, text = embeddings(world * rows, 64, 1.0, "twins" if geometry == "cosine" else "clusters")
    mine = slice(rank * rows, (rank + 1) * rows)
    whole = [points.clone().requires_grad_() for points in (image, text)]
    part = [points[mine].clone().requires_grad_() for points in (image, text)]
    ops.contrastive_loss(*whole, 1.3, 20.0, geometry=geometry, precision="highest").backward()
    options = {"geometry": geometry, "precision": "high", "group": dist.group.WORLD, "ring": ring}
    ops.contrastive_loss(*part, 1.3, 20.0, **options).backward()
    for own, truth in zip(part, whole, strict=True):
        assert (own.grad - truth.grad[mine]).norm() <= 4e-3 * truth.grad[mine].norm(), (rank, geometry, ring)


def compare_meru(rank: int, world: int, rows: int) -> None:
    """The whole objective: the sum of the ranks' feature gradients, complete scalar gradients on each."""
    image, text = embeddings(world * rows, 24, 20.0, "noise")
    mine = slice(rank * rows, (rank + 1) * rows)
    scalars = [torch.tensor([value]) for value in (0.06, 0.05, 0.7, 14.0)]
    whole = [value.clone().requires_grad_() for value in (image, text, *scalars)]
    part = [value.clone().requires_grad_() for value in (image[mine], text[mine], *scalars)]
    expected = ops.meru_loss(*whole, precision="highest")
    losses = ops.meru_loss(*part, precision="highest", group=dist.group.WORLD)
    expected[0].backward()
    losses[0].backward()
    for own, truth in zip(losses, expected, strict=True):
        torch.testing.assert_close(own, truth, rtol=2e-6, atol=2e-6)
    grads = [value.grad for value in whole]
    for own, truth in zip(part, [grads[0][mine], grads[1][mine], *grads[2:]], strict=True):
        torch.testing.assert_close(own.grad, truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


def ragged(rank: int, world: int, folder: str) -> None:
    """Ranks with different numbers of pairs get one clear error."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    image, text = embeddings(3 + rank, 24, 1.0, "noise")
    with pytest.raises(ValueError, match=r"got \[3, 4\]"):
        ops.contrastive_loss(image, text, 1.0, 10.0, group=dist.group.WORLD)
    dist.destroy_process_group()
