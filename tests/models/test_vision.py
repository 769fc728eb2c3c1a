"""The image tower: published sizes and positions, other sizes, timm's weights."""

import pytest
import timm
import torch
from torch import nn

from meru_fast.models import build_timm_vit
from meru_fast.models.vision import sincos_2d


@pytest.mark.parametrize(
    ("arch", "width", "depth", "heads", "parameters"),
    [
        ("vit_small_mocov3_patch16_224", 384, 12, 12, 21_665_664),
        ("vit_base_patch16_224", 768, 12, 12, 85_798_656),
        ("vit_large_patch16_224", 1024, 24, 16, 303_301_632),
    ],
)
def test_published_sizes(arch, width, depth, heads, parameters):
    with torch.device("meta"):
        vit = build_timm_vit(arch, use_sincos2d_pos=False)
    assert vit.width == width
    assert len(vit.blocks) == depth
    assert all(block.attn.num_heads == heads for block in vit.blocks)
    assert sum(parameter.numel() for parameter in vit.parameters()) == parameters
    norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * depth + 1
    assert all(norm.eps == 1e-5 for norm in norms)


def test_positions_one_by_one():
    """Channel by channel from the definition: row frequencies first, then column frequencies; the class token at 0."""
    rows, columns, width = 2, 3, 16
    positions = sincos_2d((rows, columns), width)
    assert positions.shape == (1, 1 + rows * columns, width)
    assert not positions[0, 0].any()
    for row in range(rows):
        for column in range(columns):
            for channel in range(width):
                block, index = divmod(channel, width // 4)
                angle = (row if block < 2 else column) * 10000.0 ** (-index / (width // 4))
                expected = torch.tensor(angle, dtype=torch.float64)
                expected = expected.sin() if block % 2 == 0 else expected.cos()
                found = positions[0, 1 + row * columns + column, channel].double()
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_positions_are_fixed_but_saved():
    vit = build_timm_vit("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    assert not vit.pos_embed.requires_grad
    assert vit.state_dict()["pos_embed"].shape == (1, 17, 32)
    assert torch.equal(vit.pos_embed, sincos_2d((4, 4), 32))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_other_sizes(pool):
    vit = build_timm_vit(
        "vit_tiny_patch16_224", pool, img_size=48, patch_size=12, embed_dim=32, depth=1, num_heads=2, norm_eps=1e-6
    )
    assert vit(torch.rand(2, 3, 48, 48)).shape == (2, 32)
    assert (vit.cls_token is not None) == (pool == "token")
    assert vit.norm.eps == 1e-6 if pool == "token" else vit.fc_norm.eps == 1e-6


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        vit = build_timm_vit("vit_tiny_patch16_224", grad_checkpointing=recompute, **size)
        vit(torch.ones(2, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in vit.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_start_from_timm_weights(tmp_path):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    torch.manual_seed(1)
    donor = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **size)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    vit = build_timm_vit("vit_tiny_patch16_224", pretrained=str(tmp_path / "donor.pth"), use_sincos2d_pos=False, **size)
    for name, value in vit.state_dict().items():
        assert torch.equal(value, donor.state_dict()[name]), name
    with pytest.raises(ValueError, match="use_sincos2d_pos=False"):
        build_timm_vit("vit_tiny_patch16_224", pretrained=True)


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"no ViT 'vit_bse_patch16_224' in timm .*'vit_base_patch16_224'"):
        build_timm_vit("vit_bse_patch16_224")
