"""One rank of a gradient comparison: ``python gradient_worker.py OUT CASE...`` with a CASE as ``stage:accumulation``.

Rank 0 writes to OUT, for every case, the gradients that all ranks together hand to the optimiser, and its norm.
"""

import sys
from functools import partial

import torch
from training_runs import TINY

from meru_fast import config
from meru_fast.distributed import get_rank, get_world_size
from meru_fast.tokenizer import PackedTokens
from meru_fast.training import deepspeed_config
from meru_fast.training.engine import Engine
from meru_fast.training.loop import prepare_process
from meru_fast.training.optim import LinearWarmupCosineDecayLR, build_optimizer
from meru_fast.training.settings import TrainSettings

BATCH = 8


def build() -> torch.nn.Module:
    """The tiny model, with weights from the seed and scalars away from their starting values."""
    torch.manual_seed(0)
    model = config.instantiate(config.load(TINY).model)
    with torch.no_grad():
        model.curv.fill_(0.3)
        model.visual_alpha.fill_(-0.5)
    return model


def batch() -> tuple[torch.Tensor, PackedTokens]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, 16, 16, generator=generator)
    lengths = torch.randint(3, 12, (BATCH,), generator=generator)
    captions = [torch.randint(1, 40_000, (int(n),), generator=generator) for n in lengths]
    end = torch.tensor([49407])
    return images, PackedTokens.from_list([torch.cat([caption, end]) for caption in captions])


def engine(stage: int, accumulation: int, lr: float = 1e-3) -> Engine:
    settings = TrainSettings(total_batch_size=BATCH, zero_stage=stage, accumulation_steps=accumulation)
    model = build()
    optimizer = build_optimizer(model, lr=lr)
    schedule = partial(LinearWarmupCosineDecayLR, total_steps=10, warmup_steps=1)
    return Engine(model, optimizer, schedule, deepspeed_config.resolve({}, settings, get_world_size(), on_gpu=False))


def gradients(stage: int, accumulation: int) -> dict[str, torch.Tensor]:
    images, tokens = batch()
    share = BATCH // get_world_size()
    mine = slice(get_rank() * share, (get_rank() + 1) * share)
    ours = engine(stage, accumulation)
    output, _ = ours.backward(images[mine], tokens[mine])
    found = ours.full_gradients()
    norm, applied = ours.update()
    assert applied
    found |= {"_loss": output["loss"].detach().clone(), "_norm": norm}
    ours.close()
    return found


def main(out: str, *cases: str) -> None:
    prepare_process(TrainSettings(), on_gpu=False)
    results = {}
    for case in cases:
        stage, accumulation = map(int, case.split(":"))
        results[case] = gradients(stage, accumulation)
    if get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
