"""meru_loss: the parts of the published objective, their weights, and gradients down to the raw features."""

import pytest
import torch
from contrastive_reference import eager_loss, embeddings
from torch import Tensor

from meru_fast import lorentz, ops


def published(
    image: Tensor, text: Tensor, alpha_x: Tensor, alpha_y: Tensor, curv: Tensor, scale: Tensor
) -> list[Tensor]:
    """Lift both, contrast, and open every caption's cone; entail_weight 0.2, min_radius 0.1."""
    x, y = lorentz.exp_map0(alpha_x * image, curv), lorentz.exp_map0(alpha_y * text, curv)
    outside = lorentz.oxy_angle(y, x, curv) - lorentz.half_aperture(y, curv, min_radius=0.1)
    contrastive, entailment = eager_loss(x, y, curv, scale), outside.clamp_min(0).mean()
    return [contrastive + 0.2 * entailment, contrastive, entailment]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
)
def test_against_the_published_objective(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    image, text = embeddings(37, 64, 20.0, "noise")
    scalars = [torch.tensor([value]) for value in (0.06, 0.05, 0.7, 14.0)]
    inputs = [value.to(device, dtype).requires_grad_() for value in (image, text, *scalars)]
    exact_inputs = [value.detach().double().requires_grad_() for value in inputs]
    exact = published(*exact_inputs)
    with ops.use_backend(backend):
        ours = ops.meru_loss(*inputs, precision="highest")
        ours[0].backward()
    exact[0].backward()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for mine, truth in zip(ours, exact, strict=True):
        assert abs(float(mine.detach() - truth.detach())) <= tolerance
    for mine, truth in zip(inputs, exact_inputs, strict=True):
        assert mine.grad.shape == truth.grad.shape
        assert (mine.grad.double() - truth.grad).norm() <= 10 * tolerance * truth.grad.norm()
    assert not ours[1].requires_grad
    assert not ours[2].requires_grad


def test_without_entailment_the_text_cones_have_no_gradient() -> None:
    image, text = (value.requires_grad_() for value in embeddings(9, 24, 20.0, "noise"))
    loss, contrastive, entailment = ops.meru_loss(image, text, 0.05, 0.05, 1.0, 14.0, entail_weight=0.0)
    assert float(loss.detach()) == float(contrastive)
    assert float(entailment) > 0
    (grad,) = torch.autograd.grad(loss, image)
    (plain,) = torch.autograd.grad(
        ops.contrastive_loss(ops.exp_map0(image, 1.0, scale=0.05), ops.exp_map0(text, 1.0, scale=0.05), 1.0, 14.0),
        image,
    )
    assert torch.equal(grad, plain)


def test_half_precision_features_under_autocast() -> None:
    """Everything after the projection is float32, whatever the encoders hand over."""
    image, text = embeddings(9, 24, 20.0, "noise")
    plain = ops.meru_loss(image.bfloat16(), text.bfloat16(), 0.05, 0.05, 1.0, 14.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ops.meru_loss(image.bfloat16(), text.bfloat16(), 0.05, 0.05, 1.0, 14.0)
    assert [value.dtype for value in mixed] == [torch.float32] * 3
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))
