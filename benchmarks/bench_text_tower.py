"""The text tower on packed captions and on padded ones: what does padding cost?

Captions have 7 to 22 tokens, as many of each length, so 34 % of a padded batch is padding. `rows` is the number of
captions, `dim` the width of the tower's 12 layers. Padding is no work: variants differ in time alone.
"""

import functools

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.harness import Case, Op, Variant, Work, grid
from meru_fast.models import TransformerTextEncoder
from meru_fast.tokenizer import END_ID, PackedTokens

SHORTEST, LONGEST, LAYERS = 7, 22, 12
DATA = "34-percent-padding"


def lengths(captions: int) -> list[int]:
    """7, 15, 8, 16, ...: long and short ones mixed."""
    span = LONGEST - SHORTEST + 1
    return [SHORTEST + (index * span // 2 + index // 2) % span for index in range(captions)]


@functools.cache
def tower(width: int) -> TransformerTextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransformerTextEncoder(f"L{LAYERS}_W{width}")


def inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """Token ids, where each caption starts, then the tower's parameters, which the gradients are taken of."""
    generator = torch.Generator().manual_seed(seed)
    captions = [torch.randint(END_ID, (n,), generator=generator) for n in lengths(case.rows)]
    for caption in captions:
        caption[-1] = END_ID
    tokens = PackedTokens.from_list(captions)
    parameters = (p.detach().to(device, copy=True).requires_grad_() for p in tower(case.dim).parameters())
    return [tokens.ids.to(device), tokens.cu_seqlens.to(device), *parameters]


def caption_tokens(ids: Tensor, starts: Tensor) -> PackedTokens:
    return PackedTokens(ids, starts, tuple(lengths(len(starts) - 1)))


def features(tokens: PackedTokens | Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    model = tower(parameters[0].shape[-1])
    names = [name for name, _ in model.named_parameters()]
    state = dict(zip(names, parameters, strict=True))
    state["attn_mask"] = model.attn_mask.to(parameters[0].device)
    return functional_call(model, state, (tokens,))


def packed(ids: Tensor, starts: Tensor, *parameters: Tensor) -> Tensor:
    return features(caption_tokens(ids, starts), parameters)


def padded(ids: Tensor, starts: Tensor, *parameters: Tensor) -> Tensor:
    return features(caption_tokens(ids, starts).to_padded(), parameters)


def transformer_flop(layers: int, width: int, tokens: int) -> float:
    """FLOP of a forward pass of one sequence, 2 for a multiply-add: projections and MLP, then both attention products.

    ``24 T D^2 + 4 T^2 D`` per layer.
    """
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def work(case: Case) -> Work:
    forward = sum(transformer_flop(LAYERS, case.dim, n) for n in lengths(case.rows))
    return Work(forward_flop=forward, backward_flop=2 * forward)


OP = Op(
    name="text_tower",
    inputs=inputs,
    variants=[Variant("packed", packed), Variant("padded", padded)],
    reference=padded,
    work=work,
    cases={
        "smoke": grid([5], [64], data=DATA),
        "cpu": grid([64, 256], data=DATA),
        "gpu": grid([1_024], data=DATA) + grid([1_024, 4_096], data=DATA, dtype=torch.bfloat16),
    },
)
test_text_tower = OP.as_test()
