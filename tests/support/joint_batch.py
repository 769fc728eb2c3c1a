"""Losses and gradients of several models on one batch, by any number of processes: torchrun joint_batch.py FILE.

Every process takes its slice of the batch and gradients are averaged over processes, as DDP and DeepSpeed do.
"""

import sys

import small_models
import torch
import torch.distributed as dist
from hyperbolic_stand_in import models as stand_in

from meru_fast import patch
from meru_fast.distributed import (
    all_gather_object,
    barrier,
    broadcast_object,
    get_rank,
    get_world_size,
    is_main_process,
)

BATCH = 8


def share(rows):
    size = BATCH // get_world_size()
    return rows[get_rank() * size : (get_rank() + 1) * size]


def run(model: torch.nn.Module, *inputs) -> dict[str, torch.Tensor]:
    loss = model(*map(share, inputs))["loss"]
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            if get_world_size() > 1:
                dist.all_reduce(parameter.grad)
            found[name] = parameter.grad / get_world_size()
    return found


def everything() -> dict[str, dict[str, torch.Tensor]]:
    images, captions = small_models.images(BATCH).double(), small_models.captions(BATCH)
    models = {
        "meru": small_models.meru(curv_init=1.5),
        "clip": small_models.clip(),
        "meru sigmoid": small_models.meru(pair_loss="sigmoid", curv_init=1.5),
        "clip sigmoid": small_models.clip(pair_loss="sigmoid"),
    }
    results = {name: run(model.double(), images, captions) for name, model in models.items()}
    torch.manual_seed(0)
    boxes = [torch.randint(0, 50, (3,)) for _ in range(2 * BATCH)]
    parts = torch.randn(2, BATCH, 3, 2, 2, dtype=torch.float64)
    model = stand_in.HyCoCLIP().double()
    with patch.hycoclip("hyperbolic_stand_in"):
        results["hycoclip"] = run(model, parts[0], parts[1], boxes[:BATCH], boxes[BATCH:])
    return results


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = everything()
    assert all_gather_object(get_rank()) == list(range(get_world_size()))
    assert broadcast_object(f"from {get_rank()}") == "from 0"
    losses = all_gather_object({name: values["loss"].item() for name, values in found.items()})
    assert all(loss == losses[0] for loss in losses)  # every rank reports the loss of the joint batch
    barrier()
    if is_main_process():
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
