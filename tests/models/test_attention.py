"""The choice of attention for packed captions: what cannot run or is wrong is found out and named."""

import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

from meru_fast.models import attention
from meru_fast.models.attention import PackedAttention, packed_implementation
from meru_fast.tokenizer import PackedTokens

CPU = torch.device("cpu")
LENGTHS = (3, 1, 5, 3)


@pytest.fixture
def packed() -> PackedAttention:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return PackedAttention(PackedTokens(torch.arange(sum(LENGTHS)).int(), starts, LENGTHS))


def test_captions_of_equal_length_lie_together_on_a_cpu(packed):
    assert packed.tokens.lengths == (1, 3, 3, 5)
    assert packed.tokens.ids.tolist() == [3, 0, 1, 2, 9, 10, 11, 4, 5, 6, 7, 8]
    assert packed.restore(torch.tensor([1, 30, 31, 5])).tolist() == [30, 1, 5, 31]


@pytest.mark.parametrize("name", ["sdpa", "padded"])
def test_captions_attend_to_themselves_and_backwards_only(packed, name):
    """Against one softmax over all tokens with the mask that xformers uses on a GPU."""
    qkv = torch.randn(12, 3, 2, 8, dtype=torch.float64)
    mask = BlockDiagonalCausalMask.from_seqlens(list(packed.tokens.lengths)).materialize((12, 12)).double()
    query, key, value = qkv.unbind(1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / 8**0.5 + mask
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    torch.testing.assert_close(attention._IMPLEMENTATIONS[name](packed, qkv), expected)


def test_no_gpu_no_gpu_kernels():
    assert packed_implementation(CPU, torch.float32, 64) == "sdpa"
    assert "No operator found" in attention.unusable_because("xformers", CPU, torch.float32, 64)
    assert "NotImplementedError" in attention.unusable_because("varlen", CPU, torch.bfloat16, 64)
    assert attention.unusable_because("padded", CPU, torch.float32, 64) is None  # values and gradient of the reference


def test_an_implementation_that_is_wrong_is_not_used(monkeypatch):
    def sees_the_future(self, qkv):
        return qkv[:, 2] + qkv[:, 2].mean(0)

    monkeypatch.setitem(attention._IMPLEMENTATIONS, "xformers", sees_the_future)
    assert "results differ from the reference" in attention.unusable_because("xformers", CPU, torch.float32, 64)


def test_causal_keyword_of_this_torch():
    assert set(attention._varlen_causal()) <= set(inspect.signature(varlen_attn).parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_gpu_kernels_work(name):
    assert attention.unusable_because(name, torch.device("cuda", 0), torch.bfloat16, 64) is None
