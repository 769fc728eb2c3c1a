"""Text tower: a causal pre-norm transformer (CLIP, arXiv:2103.00020) that runs on packed captions without padding."""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meru_fast.models.attention import PackedAttention, PaddedAttention, SelfAttention
from meru_fast.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE, PackedTokens


class TransformerTextEncoder(nn.Module):
    """Captions to features [b, width], taken at the end of each text.

    Args:
        arch: ``L12_W512`` is 12 layers of width 512 with width / 64 heads; ``L12_W512_A16`` sets 16 heads.
        vocab_size: number of token ids.
        context_length: longest caption in tokens.
        grad_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: `arch` is not of that form, or its heads do not divide its width.
    """

    attn_mask: Tensor

    def __init__(
        self,
        arch: str = "L12_W512",
        vocab_size: int = VOCAB_SIZE,
        context_length: int = CONTEXT_LENGTH,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        match = re.fullmatch(r"L(\d+)_W(\d+)(?:_A(\d+))?", arch)
        if match is None:
            raise ValueError(f"text arch {arch!r}: expected L<layers>_W<width> with optional _A<heads>, as in L12_W512")
        self.layers, self.width = int(match[1]), int(match[2])
        self.heads = int(match[3]) if match[3] else self.width // 64
        if self.heads == 0 or self.width % self.heads:
            raise ValueError(f"text arch {arch!r}: {self.heads} heads do not divide width {self.width}; set _A<heads>")
        self.vocab_size, self.context_length = vocab_size, context_length
        self.grad_checkpointing = grad_checkpointing
        self.recipe = {
            "_target_": "meru_fast.models.TransformerTextEncoder",
            "arch": arch,
            "vocab_size": vocab_size,
            "context_length": context_length,
        }

        self.token_embed = nn.Embedding(vocab_size, self.width)
        self.posit_embed = nn.Parameter(torch.empty(context_length, self.width))
        self.resblocks = nn.ModuleList(ResidualBlock(self.width, self.heads) for _ in range(self.layers))
        self.ln_final = nn.LayerNorm(self.width)
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("attn_mask", future)  # True where attention is forbidden; published checkpoints hold it
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.posit_embed, std=0.01)
        into_residual = (2 * self.width * self.layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=into_residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=into_residual)

    # Under torch.compile this driver stays Python (its shapes are those of the batch) and the blocks are compiled.
    @torch.compiler.disable(recursive=False)
    def forward(self, tokens: PackedTokens | Tensor) -> Tensor:
        """Features [b, width] of packed captions, or of right-padded int ids [b, n] (the slower reference).

        A caption is read at its largest id, which is its first end of text.

        Raises:
            ValueError: padded ids of another shape, or longer than the context.
        """
        if isinstance(tokens, PackedTokens):
            return self._packed(tokens)
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= self.context_length:
            raise ValueError(
                f"expected padded ids [b, n] with 0 < n <= {self.context_length}, got {tuple(tokens.shape)}"
            )
        x = self.token_embed(tokens.long()) + self.posit_embed[: tokens.shape[1]]
        x = self._blocks(x, PaddedAttention(self.attn_mask))
        ends = tokens.argmax(dim=1)
        return self.ln_final(x[torch.arange(len(x), device=x.device), ends])

    def _packed(self, tokens: PackedTokens) -> Tensor:
        if max(tokens.lengths) > self.context_length:
            raise ValueError(f"a packed caption has {max(tokens.lengths)} tokens, more than {self.context_length}")
        attend = PackedAttention(tokens)
        tokens = attend.tokens
        starts = tokens.cu_seqlens[:-1].repeat_interleave(tokens.cu_seqlens.diff(), output_size=len(tokens.ids))
        positions = torch.arange(len(tokens.ids), device=tokens.ids.device) - starts
        x = self.token_embed(tokens.ids) + F.embedding(positions, self.posit_embed)
        return attend.restore(self.ln_final(self._blocks(x, attend, tokens.cu_seqlens[1:] - 1)))

    def _blocks(self, x: Tensor, attend: PackedAttention | PaddedAttention, ends: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            rows = ends if block is self.resblocks[-1] else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, rows, use_reentrant=False)
            else:
                x = block(x, attend, rows)
        return x


class ResidualBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, attend: PackedAttention | PaddedAttention, rows: Tensor | None = None) -> Tensor:
        """The stream after this block; with `rows` only at these tokens, which is all that the last block is for."""
        attended = self.attn(self.ln_1(x), attend, rows)
        x = (x if rows is None else x.index_select(0, rows)) + attended
        return x + self.mlp(self.ln_2(x))
