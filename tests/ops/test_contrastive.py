"""contrastive_loss as users meet it: the PyTorch path, its memory, dtypes, autocast, compilation, errors."""

import subprocess
import sys
import textwrap

import pytest
import torch
from contrastive_reference import DRAWS, FLOOR, eager_loss, embeddings, errors, pytorch_errors, sizes
from contrastive_reference import outcome as gradients
from torch import Tensor

from meru_fast import ops
from meru_fast.ops import contrastive_torch


@pytest.mark.parametrize("geometry", ["lorentz", "cosine"])
@pytest.mark.parametrize(
    ("rows", "texts", "width", "scale", "curv", "norm", "kind"),
    [
        (1, 1, 24, 1.0, 1.0, 1.0, "noise"),
        (63, 63, 64, 100.0, 10.0, 1.0, "clusters"),
        (1100, 1100, 24, 30.0, 0.1, 1.0, "noise"),  # several tiles both ways
        (70, 300, 40, 10.0, 1.0, 2.0, "noise"),
    ],
)
def test_float64_is_exact(
    rows: int, texts: int, width: int, scale: float, curv: float, norm: float, kind: str, geometry: str
) -> None:
    """Value and every gradient in float64, to 1e-9 of their size; b x n blocks through labels."""
    image, text = (value.double() for value in embeddings(texts, width, norm, kind))
    image = image[:rows]
    labels = None if rows == texts else torch.randint(0, texts // 4, (rows,))
    inputs = [image, text, torch.tensor(curv).double(), torch.tensor([scale]).double()]
    exact = gradients(lambda *x: eager_loss(*x[:3], x[3][0], geometry, labels), inputs)
    ours = gradients(lambda *x: ops.contrastive_loss(*x, geometry=geometry, labels=labels), inputs)
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.shape == truth.shape
        assert mine.dtype == torch.float64
        assert (mine - truth).abs().max() <= 1e-9 * max(1e-3, truth.abs().max().item())


@pytest.mark.parametrize(
    ("rows", "width", "scale", "curv", "norm", "kind", "geometry"),
    [
        (600, 64, 1.0, 1.0, 0.8, "noise", "lorentz"),
        (600, 64, 100.0, 1.0, 0.8, "noise", "lorentz"),
        (600, 64, 1.0, 1.0, 0.8, "clusters", "lorentz"),
        (600, 64, 100.0, 1.0, 0.8, "clusters", "lorentz"),
        (600, 64, 30.0, 0.1, 3.0, "noise", "lorentz"),
        (200, 512, 30.0, 1.0, 0.8, "twins", "lorentz"),
        (63, 768, 10.0, 1.0, 1e-4, "noise", "lorentz"),
        (600, 64, 100.0, 1.0, 1.0, "clusters", "cosine"),
    ],
)
def test_float32_errs_at_most_twice_what_pytorch_errs(
    rows: int, width: int, scale: float, curv: float, norm: float, kind: str, geometry: str
) -> None:
    """The largest error of five draws against the largest of PyTorch on the same draws."""
    scalars = [torch.tensor(curv), torch.tensor(scale)]
    draws = [[*embeddings(rows, width, norm, kind, seed), *scalars] for seed in range(DRAWS)]
    found, natural = [], []
    for inputs in draws:
        exact = gradients(lambda *x: eager_loss(*x, geometry), [value.double() for value in inputs])
        found.append(errors(gradients(lambda *x: ops.contrastive_loss(*x, geometry=geometry), inputs), exact))
        natural.append(sizes(inputs, exact))
    bounds = pytorch_errors(draws, geometry, torch.float32)
    for mine, bound, size in zip(zip(*found, strict=True), bounds, zip(*natural, strict=True), strict=True):
        assert max(mine) <= 2 * bound + FLOOR * min(size)


def test_duplicates_at_scale_100_stay_finite() -> None:
    image, text = embeddings(64, 32, 1.0, "twins")
    text[7] = image[7] = 0
    for precision in ("highest", "high", "medium"):
        results = gradients(
            lambda *x: ops.contrastive_loss(*x, precision=precision),  # noqa: B023
            [image, text, torch.tensor(1.0), torch.tensor(100.0)],
        )
        assert all(value.isfinite().all() for value in results)


def test_an_outlier_does_not_underflow_its_column() -> None:
    """The rebased exponentials of a column far below its tile are computed again."""
    image, text = embeddings(66, 24, 0.3, "clusters")
    image[5], text[5] = 30 * image[5], -40 * text[5]
    inputs = [image, text, torch.tensor(1.0), torch.tensor(100.0)]
    exact = gradients(eager_loss, [value.double() for value in inputs])
    ours = gradients(ops.contrastive_loss, inputs)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize(
    ("rows", "width", "limit"),
    [(6144, 64, 75e6), pytest.param(16384, 512, 1e9, marks=pytest.mark.slow)],  # one B x B tensor: 151 MB, 1.07 GB
)
def test_no_tensor_is_quadratic(rows: int, width: int, limit: float) -> None:
    """Peak memory of a process over its inputs, forward and backward."""
    script = rf"""
        import re, torch
        from meru_fast import ops
        memory = lambda key: 1024 * int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read())[1])
        warm = [torch.randn(1024, {width}).requires_grad_() for _ in range(2)]
        ops.contrastive_loss(*warm, 1.0, 10.0).backward()
        inputs = [(torch.randn({rows}, {width}) / 22).requires_grad_() for _ in range(2)]
        before = memory("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
        ops.contrastive_loss(*inputs, 1.0, 10.0).backward()
        print(memory("VmHWM") - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=580)
    assert 0 < int(done.stdout) <= limit


def test_dtypes_and_layouts() -> None:
    """Half precision is computed in float32, strides do not matter, gradients have the dtype of their inputs."""
    image, text = embeddings(40, 24, 1.0, "noise")
    for dtype in (torch.float16, torch.bfloat16):
        results = gradients(
            ops.contrastive_loss, [image.to(dtype), text.to(dtype), torch.tensor(1.0), torch.tensor(9.0)]
        )
        assert [value.dtype for value in results] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
        exact = ops.contrastive_loss(image.to(dtype).double(), text.to(dtype).double(), 1.0, 9.0)
        assert abs(float(results[0] - exact)) < 1e-5
    spread = torch.stack([image, text], 2)
    assert torch.equal(
        ops.contrastive_loss(spread[..., 0], spread[..., 1], 1.0, 9.0), ops.contrastive_loss(image, text, 1.0, 9.0)
    )


def test_autocast_changes_nothing() -> None:
    inputs = [*embeddings(40, 24, 1.0, "noise"), torch.tensor(1.0), torch.tensor(9.0)]
    plain = gradients(ops.contrastive_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(ops.contrastive_loss, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_custom_op_rules(backend: str, device: torch.device) -> None:
    """Schema, fake tensors, autograd registration: torch.library.opcheck."""
    image, text = (value.to(device).requires_grad_() for value in embeddings(9, 24, 1.0, "noise"))
    curv, scale = (torch.tensor(value, device=device, requires_grad=True) for value in (1.0, 9.0))
    for labels in (None, torch.arange(9, device=device).flip(0)):
        arguments = (image, text, labels, curv, scale, "lorentz", "high", backend, "", False)
        torch.library.opcheck(
            torch.ops.meru_fast.contrastive_forward.default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static"),
        )


def test_compiles_without_graph_breaks() -> None:
    inputs = [*embeddings(33, 24, 1.0, "noise"), torch.tensor(1.0), torch.tensor(9.0)]

    def loss(image: Tensor, text: Tensor, curv: Tensor, scale: Tensor) -> Tensor:
        return ops.contrastive_loss(2 * image, text, curv, scale.exp().log())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(loss, inputs), gradients(compiled, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivative_is_refused() -> None:
    image, text = (value.requires_grad_() for value in embeddings(5, 24, 1.0, "noise"))
    (grad,) = torch.autograd.grad(ops.contrastive_loss(image, text, 1.0, 9.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"geometry": "poincare"}, ValueError, "geometry is 'poincare', expected one of lorentz, cosine"),
        ({"precision": "low"}, ValueError, "precision is 'low'"),
        ({"text": torch.randn(6, 8)}, ValueError, "pass labels"),
        ({"text": torch.randn(5, 9)}, ValueError, "agree in dtype, device and D"),
        ({"image": torch.ones(5, 8, dtype=torch.int32)}, TypeError, "image must be floating point"),
        ({"image": torch.randn(8)}, ValueError, r"image must be \[rows, D\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels must be int64 \[5\]"),
        ({"curv": torch.ones(2)}, ValueError, "curv must be one number"),
        ({"ring": True}, ValueError, "give the group too"),
    ],
)
def test_bad_arguments_are_one_clear_error(change: dict, error: type, message: str) -> None:
    arguments = {"image": torch.randn(5, 8), "text": torch.randn(5, 8), "curv": 1.0, "logit_scale": 9.0} | change
    with pytest.raises(error, match=message):
        ops.contrastive_loss(**arguments)


def test_one_exponential_and_two_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared exponential is an optimisation of the CPU path, not another formula."""
    inputs = [*embeddings(90, 24, 1.0, "noise"), torch.tensor(1.0), torch.tensor(9.0)]
    shared = gradients(ops.contrastive_loss, inputs)
    monkeypatch.setattr(contrastive_torch, "_known", lambda condition: False)
    for one, other in zip(shared, gradients(ops.contrastive_loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)
