"""The accuracy contract of the ops: at most twice the error of PyTorch in the same dtype, both against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

FLOOR = 4e-7  # relative to the largest value: a few roundings of fp32
BF16_STORE = 2.0**-7  # Triton's interpreter truncates where a GPU rounds


def points(rows: int, width: int, norm: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random directions whose norms spread by a factor of two around ``norm``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    length = norm * torch.exp2(torch.rand(rows, 1, generator=generator) * 2 - 1)
    return (x / x.norm(dim=1, keepdim=True) * length).to(dtype)


def near(x: Tensor, relative: float, seed: int = 1) -> Tensor:
    """A cluster: every row of x moved by ``relative`` times its norm in a random direction."""
    return (x.float() + relative * x.float().norm(dim=1, keepdim=True) * points(len(x), x.shape[1], 1.0, seed=seed)).to(
        x.dtype
    )


def weights_of(out: Tensor) -> Tensor:
    """The same random weights for every result of one shape."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)


def outcome(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value and the gradient of every input, for a random weighting of the outputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad((out * weights_of(out)).sum(), leaves)
    return [out.detach(), *grads]


def scale_of(reference: Callable[..., Tensor], inputs: list[Tensor], position: int, truth: Tensor) -> float:
    """The size against which rounding is judged: the largest value.

    A scalar's gradient is a sum of terms of both signs; there it is the root of the sum of their squares.
    """
    if truth.dim() or position == 0 or not truth.numel():
        return truth.abs().max().item() if truth.numel() else 0.0
    tangents = tuple(torch.ones_like(v) if i == position - 1 else torch.zeros_like(v) for i, v in enumerate(inputs))
    out, slope = torch.func.jvp(reference, tuple(inputs), tangents)
    return (weights_of(out) * slope).norm().item()


def assert_contract(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    floors: dict[int, float] | None = None,
    relative: float = FLOOR,
) -> None:
    """``op`` against ``reference`` in the dtype of the inputs and in fp64, value and every gradient.

    Args:
        floors: by position (0 the value, 1.. the gradients), an absolute error that is allowed on top.
        relative: error allowed on top, relative to the size of the result.
    """
    wide = [value.double() for value in inputs]
    exact = outcome(reference, wide)
    plain = outcome(reference, inputs)
    ours = outcome(op, inputs)
    for position, (mine, torch_, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.dtype == torch_.dtype
        assert mine.shape == torch_.shape
        assert mine.isfinite().all(), f"result {position} is not finite"
        size = scale_of(reference, wide, position, truth)
        error, bound = (0.0 if not truth.numel() else (v.double() - truth).abs().max().item() for v in (mine, torch_))
        allowed = 2 * bound + relative * size + (floors or {}).get(position, 0.0)
        if mine.dtype in (torch.bfloat16, torch.float16):
            allowed += BF16_STORE * size
        assert error <= allowed, f"result {position}: error {error:.2e}, PyTorch {bound:.2e}, size {size:.2e}"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` returns NaN (or a huge integer), so that an element no kernel wrote is seen."""
    plain = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
