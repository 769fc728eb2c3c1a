"""The text tower: packed equals padded, padding is ignored, packing pays."""

import time

import pytest
import torch
from small_models import captions

from meru_fast.models import TransformerTextEncoder
from meru_fast.models.attention import packed_implementation
from meru_fast.tokenizer import PackedTokens


@pytest.fixture
def encoder(device) -> TransformerTextEncoder:
    torch.manual_seed(0)
    return TransformerTextEncoder("L3_W64_A2").to(device)


def pad(tokens: list[torch.Tensor], extra: int = 0) -> torch.Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return torch.nn.functional.pad(padded, (0, extra))


def gradients(encoder: TransformerTextEncoder, tokens) -> list[torch.Tensor]:
    encoder.zero_grad()
    out = encoder(tokens)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [parameter.grad.clone() for parameter in encoder.parameters()]


@pytest.mark.parametrize("count", [1, 2, 33])
def test_packed_equals_padded(encoder, device, count):
    tokens = captions(count)
    packed, padded = PackedTokens.from_list(tokens).to(device), pad(tokens).to(device)
    torch.testing.assert_close(encoder(packed), encoder(padded), rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients(encoder, packed), gradients(encoder, padded), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-9)


def test_padding_does_not_change_an_embedding(encoder, device):
    tokens = captions(5)
    shortest = pad(tokens).to(device)
    longest = pad(tokens, 77 - shortest.shape[1]).to(device)
    torch.testing.assert_close(encoder(longest), encoder(shortest), rtol=1e-5, atol=1e-5)
    alone = torch.cat([encoder(t[None].to(device)) for t in tokens])
    torch.testing.assert_close(alone, encoder(shortest), rtol=1e-5, atol=1e-5)


def test_a_caption_is_read_at_its_first_end(encoder, device):
    """Special strings inside a text end it, as in the published tokenizer and pooling."""
    inner = torch.tensor([49406, 5, 49407, 7, 8, 49407], dtype=torch.int32)
    packed = PackedTokens.from_list([inner]).to(device)
    assert packed.lengths == (3,)
    torch.testing.assert_close(encoder(packed), encoder(inner[None].to(device)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_recomputed_activations_give_the_same_gradient(encoder, device, form):
    tokens = captions(9)
    tokens = (PackedTokens.from_list(tokens) if form == "packed" else pad(tokens)).to(device)
    plain = gradients(encoder, tokens)
    encoder.grad_checkpointing = True
    torch.testing.assert_close(gradients(encoder, tokens), plain)


def test_half_precision_autocast(encoder, device):
    packed = PackedTokens.from_list(captions(9)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = encoder(packed)
    torch.testing.assert_close(found.float(), encoder(packed), rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_does_not_loop(dtype):
    assert packed_implementation(torch.device("cuda", 0), dtype, 64) in ("xformers", "varlen")


def test_initialisation():
    torch.manual_seed(0)
    encoder = TransformerTextEncoder("L4_W256")
    block = encoder.resblocks[2]
    into_residual = (2 * 256 * 4) ** -0.5
    for weight, std in [
        (encoder.token_embed.weight, 0.02),
        (encoder.posit_embed, 0.01),
        (block.attn.in_proj_weight, 256**-0.5),
        (block.attn.out_proj.weight, into_residual),
        (block.mlp.c_fc.weight, (2 * 256) ** -0.5),
        (block.mlp.c_proj.weight, into_residual),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 0.05 * std
    assert not block.attn.in_proj_bias.any()
    assert not block.attn.out_proj.bias.any()


def test_published_size():
    with torch.device("meta"):
        encoder = TransformerTextEncoder("L12_W512", 49408, 77)
    assert encoder.heads == 8
    assert sum(p.numel() for p in encoder.parameters()) == 63_165_952


@pytest.mark.parametrize(
    ("arch", "message"), [("l12w512", "expected L<layers>_W<width>"), ("L2_W200", r"set _A<heads>"), ("L2_W32", "_A")]
)
def test_wrong_architecture(arch, message):
    with pytest.raises(ValueError, match=message):
        TransformerTextEncoder(arch)


def test_captions_longer_than_the_context_are_refused():
    encoder = TransformerTextEncoder("L1_W64", context_length=8)
    with pytest.raises(ValueError, match="0 < n <= 8"):
        encoder(torch.ones(1, 9, dtype=torch.int32))
    with pytest.raises(ValueError, match="more than 8"):
        encoder(PackedTokens.from_list([torch.arange(9)]))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_packing_pays(record_property):
    """On a CPU the packed tower saves at least the share of padding: CPU time forward and backward, best of five."""
    torch.manual_seed(0)
    encoder = TransformerTextEncoder("L4_W256")
    encoder.token_embed.requires_grad_(False)  # its dense gradient costs the same in both forms
    tokens = [*captions(60, longest=20), *captions(4, seed=1, longest=40)]  # most captions are short, some are long
    forms = {"packed": PackedTokens.from_list(tokens), "padded": pad(tokens)}
    share = 1 - len(forms["packed"].ids) / forms["padded"].numel()
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(5):
        for name, form in forms.items():
            start = time.process_time()
            encoder(form).square().sum().backward()
            best[name] = min(best[name], time.process_time() - start)
    saved = 1 - best["packed"] / best["padded"]
    print(f"padding {share:.0%} of positions, time saved {saved:.0%}: {best['packed']:.3f} s / {best['padded']:.3f} s")
    record_property("padding_share", share)
    record_property("time_saved", saved)
    assert saved >= share
