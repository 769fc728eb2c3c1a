"""Causal self-attention over packed captions, on the fastest implementation that runs here, and over padded ones.

Packed captions lie end to end, [total, ...]; a caption attends only to itself. Tried in this order, each probed once
per device, dtype and head size by a forward and backward pass on three tiny captions:

    xformers    memory_efficient_attention with BlockDiagonalCausalMask (GPU)
    varlen      torch.nn.attention.varlen (GPU, half precision)
    padded      scaled_dot_product_attention on a padded copy: one call, the rest of the tower stays packed (GPU)
    sdpa        scaled_dot_product_attention on groups of captions of equal length (CPU, and the reference)
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meru_fast.tokenizer import PackedTokens

_log = logging.getLogger(__name__)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of ``torch.nn.MultiheadAttention``.

    How the heads attend is an argument of ``forward``, so that packed and padded captions share the weights.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """x: [..., width]; `attend` maps queries, keys and values [..., 3, heads, d] to [..., heads, d].

        With `rows` the result is that of these (leading) indices only.
        """
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        attended = attend(qkv.unflatten(-1, (3, self.heads, -1))).flatten(-2)
        return self.out_proj(attended if rows is None else attended.index_select(0, rows))


class PaddedAttention:
    """Attention of right-padded captions [b, n, 3, heads, d]; `forbidden` is bool [context, context]."""

    def __init__(self, forbidden: Tensor):
        self.forbidden = forbidden

    def __call__(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        n = query.shape[2]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=~self.forbidden[:n, :n])
        return out.transpose(1, 2)


class PackedAttention:
    """Attention of packed captions [total, 3, heads, d], planned once for all layers of a forward pass.

    Attributes:
        tokens: the captions in the order in which they must be laid out (on the CPU sorted by length, so that captions
            of equal length are one call without a copy).
    """

    def __init__(self, tokens: PackedTokens):
        self._mask = None
        self._inverse = None
        self.tokens = tokens
        if tokens.ids.device.type == "cpu":
            order = sorted(range(len(tokens)), key=tokens.lengths.__getitem__)
            captions = tokens.to_list()
            starts = torch.tensor([0] + [tokens.lengths[row] for row in order]).cumsum(0).to(torch.int32)
            self.tokens = PackedTokens(
                torch.cat([captions[row] for row in order]), starts, tuple(tokens.lengths[row] for row in order)
            )
            self._inverse = torch.tensor(order).argsort()

    def restore(self, rows: Tensor) -> Tensor:
        """Rows [b, ...] in the order of the captions that were given."""
        return rows if self._inverse is None else rows[self._inverse]

    @torch.compiler.disable  # the lengths differ from batch to batch: nothing here is worth compiling
    def __call__(self, qkv: Tensor) -> Tensor:
        name = packed_implementation(qkv.device, qkv.dtype, qkv.shape[-1])
        return _IMPLEMENTATIONS[name](self, qkv)

    def _xformers(self, qkv: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        if self._mask is None:
            self._mask = BlockDiagonalCausalMask.from_seqlens(list(self.tokens.lengths), device=qkv.device)
        query, key, value = qkv[None].unbind(2)
        return memory_efficient_attention(query, key, value, attn_bias=self._mask)[0]

    def _varlen(self, qkv: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = qkv.unbind(1)
        starts, longest = self.tokens.cu_seqlens, max(self.tokens.lengths)
        return varlen_attn(query, key, value, starts, starts, longest, longest, **_varlen_causal())

    def _padded(self, qkv: Tensor) -> Tensor:
        starts, longest = self.tokens.cu_seqlens, max(self.tokens.lengths)
        row = torch.arange(len(self.tokens), device=qkv.device)
        row = row.repeat_interleave(starts.diff(), output_size=len(qkv))
        column = torch.arange(len(qkv), device=qkv.device) - starts[row]
        spread = qkv.new_zeros(len(self.tokens), longest, *qkv.shape[1:]).index_put((row, column), qkv)
        query, key, value = spread.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # so padding behind is never seen
        return out.transpose(1, 2)[row, column]

    def _sdpa(self, qkv: Tensor) -> Tensor:
        groups = [(n, len(list(run))) for n, run in groupby(self.tokens.lengths)]
        outputs = []
        for part, (n, count) in zip(qkv.split([n * count for n, count in groups]), groups, strict=True):
            query, key, value = part.unflatten(0, (count, n)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)


_IMPLEMENTATIONS: dict[str, Callable[[PackedAttention, Tensor], Tensor]] = {
    "xformers": PackedAttention._xformers,
    "varlen": PackedAttention._varlen,
    "padded": PackedAttention._padded,
    "sdpa": PackedAttention._sdpa,
}


@cache
def _varlen_causal() -> dict:
    """The keyword that makes torch's variable-length attention causal: older releases say `is_causal`."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}


@cache
def packed_implementation(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The implementation used for packed captions: ``"xformers"``, ``"varlen"``, ``"padded"`` or ``"sdpa"``."""
    if device.type == "cpu":
        return "sdpa"
    for name in ("xformers", "varlen"):
        reason = unusable_because(name, device, dtype, head_dim)
        if reason is None:
            return name
        _log.info("packed attention: no %s for %s on %s: %s", name, dtype, device, reason)
    return "padded"


def unusable_because(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why an implementation cannot be used, None if it gives the values and the gradient of the reference."""
    starts = torch.tensor([0, 3, 4, 9], dtype=torch.int32, device=device)
    attend = PackedAttention(PackedTokens(torch.zeros(9, dtype=torch.int32, device=device), starts, (3, 1, 5)))
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        qkv = torch.linspace(-1, 1, 9 * 3 * head_dim, device=device).sin().view(9, 3, 1, head_dim).to(dtype)
        results = []
        try:
            for candidate in (name, "sdpa"):
                leaf = qkv.clone().requires_grad_()
                out = _IMPLEMENTATIONS[candidate](attend, leaf)
                (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf)
                results.append((out.float(), gradient.float()))
        except Exception as error:  # the libraries signal "no operator" in many ways
            return f"{type(error).__name__}: {error}".splitlines()[0]
    for found, expected in zip(*results, strict=True):
        if not torch.allclose(found, expected, rtol=0.05, atol=0.05):
            return f"results differ from the reference by {(found - expected).abs().max():.2g}"
    return None
