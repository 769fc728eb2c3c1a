"""Contrastive kernels: the accuracy contract, what they write, how often they launch, that they repeat exactly."""

import math
from collections.abc import Iterator

import pytest
import torch
from contrastive_reference import DRAWS, FLOOR, eager_loss, embeddings, errors, outcome, pytorch_errors, sizes
from meru_fast.kernels import contrastive as kernels
from torch import Tensor

from meru_fast import ops

CASES = [  # rows, D, scale, curv, norm, kind, geometry
    (1, 24, 1.0, 1.0, 1.0, "noise", "lorentz"),
    (63, 64, 14.0, 0.1, 1.0, "noise", "lorentz"),
    (129, 24, 100.0, 1.0, 0.7, "clusters", "lorentz"),
    (65, 512, 30.0, 1.0, 0.8, "twins", "lorentz"),
    (17, 640, 100.0, 10.0, 1.0, "noise", "lorentz"),
    (9, 768, 10.0, 1.0, 1e-4, "noise", "lorentz"),
    (33, 64, 5.0, 0.1, 1e4, "noise", "lorentz"),
    (66, 24, 1.0, 10.0, 1e-2, "clusters", "lorentz"),
    (1, 64, 1.0, 1.0, 1.0, "noise", "cosine"),
    (129, 24, 100.0, 1.0, 1.0, "clusters", "cosine"),
    (33, 512, 14.0, 1.0, 1.0, "twins", "cosine"),
]
SLOW_CASES = [
    (1000, 24, 50.0, 1.0, 1.0, "clusters", "lorentz"),
    (129, 768, 100.0, 0.1, 3.0, "twins", "lorentz"),
    (63, 1024, 20.0, 10.0, 0.5, "noise", "lorentz"),
    (1000, 64, 100.0, 1.0, 1.0, "noise", "cosine"),
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, and an operation without a deterministic implementation is an error."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # padding is infinitely far, which numpy remarks on
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW_CASES)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_contract(case: tuple, device: torch.device) -> None:
    """highest, high and medium against fp64, beside PyTorch in fp32 and bf16."""
    rows, width, scale, curv, norm, kind, geometry = case
    scalars = [torch.tensor(curv), torch.tensor(scale)]
    draws = [[*embeddings(rows, width, norm, kind, seed), *scalars] for seed in range(DRAWS)]
    draws = [[value.to(device) for value in inputs] for inputs in draws]
    plain, half = (pytorch_errors(draws, geometry, dtype) for dtype in (torch.float32, torch.bfloat16))
    inputs = draws[0]
    exact = outcome(lambda *x: eager_loss(*x, geometry), [value.double() for value in inputs])
    floor = [FLOOR * size for size in sizes(inputs, exact)]

    for precision in ("highest", "high", "medium"):
        with ops.use_backend("triton"):
            ours = outcome(lambda *x: ops.contrastive_loss(*x, geometry=geometry, precision=precision), inputs)  # noqa: B023
        assert all(value.isfinite().all() for value in ours), precision
        bounds = half if precision == "medium" else plain
        for position, (mine, bound) in enumerate(zip(errors(ours, exact), bounds, strict=True)):
            allowed = 2 * bound + floor[position]
            if precision == "high" and position in (1, 2):
                assert_unbiased_bf16(ours[position].double(), exact[position], allowed)
            elif math.isfinite(bound):
                assert mine <= allowed, f"{precision}, result {position}: {mine:.2e}, PyTorch {bound:.2e}"


def assert_unbiased_bf16(mine: Tensor, truth: Tensor, allowed: float) -> None:
    """Within 4e-3, relative, as a whole, and no part of the error along the gradient itself."""
    error = mine - truth
    assert error.norm() <= 4e-3 * truth.norm() + allowed
    assert abs(float((error * truth).sum())) <= (1e-3 * float(truth.norm()) + allowed) * float(truth.norm())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_are_exact_operands(dtype: torch.dtype, device: torch.device) -> None:
    """bf16 and fp16 points lose nothing more: the loss is that of their exact values."""
    image, text = (value.to(device, dtype) for value in embeddings(70, 80, 1.0, "clusters"))
    scalars = [torch.tensor(0.5, device=device), torch.tensor(20.0, device=device)]
    exact = outcome(eager_loss, [image.double(), text.double(), *(value.double() for value in scalars)])
    with ops.use_backend("triton"):
        ours = outcome(lambda *x: ops.contrastive_loss(*x, precision="highest"), [image, text, *scalars])
    assert ours[1].dtype == dtype
    assert abs(float(ours[0] - exact[0])) < 1e-5
    for mine, truth in zip(ours[1:3], exact[1:3], strict=True):
        assert (mine.double() - truth).abs().max() <= 2**-8 * truth.abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("geometry", ["lorentz", "cosine"])
def test_labels_and_rectangles(geometry: str, device: torch.device) -> None:
    """b x n blocks whose images share texts, and texts that belong to no image."""
    image, text = embeddings(150, 40, 1.0, "noise")
    image, text = image[:70].to(device), text.to(device)
    labels = torch.randint(0, 30, (70,), generator=torch.Generator().manual_seed(3)).to(device)
    inputs = [image, text, torch.tensor(1.5, device=device), torch.tensor(8.0, device=device)]
    exact = outcome(lambda *x: eager_loss(*x, geometry, labels), [value.double() for value in inputs])
    plain = errors(outcome(lambda *x: eager_loss(*x, geometry, labels), inputs), exact)
    allowed = [2 * bound + FLOOR * size for bound, size in zip(plain, sizes(inputs, exact), strict=True)]

    def ours(precision: str) -> list[Tensor]:
        def loss(*x: Tensor) -> Tensor:
            return ops.contrastive_loss(*x, geometry=geometry, precision=precision, labels=labels)

        with ops.use_backend("triton"):
            return outcome(loss, inputs)

    for mine, bound in zip(errors(ours("highest"), exact), allowed, strict=True):
        assert mine <= bound
    for mine, truth, bound in zip(ours("high")[1:3], exact[1:3], allowed[1:3], strict=True):
        assert_unbiased_bf16(mine.double(), truth, bound)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_columns_that_underflow_are_computed_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One far outlier at scale 100: its column lies hundreds of powers of two below its tile's best logit."""
    image, text = embeddings(66, 24, 0.3, "clusters")
    image[5], text[5] = 30 * image[5], -40 * text[5]
    inputs = [image.to(device), text.to(device), torch.tensor(1.0, device=device), torch.tensor(100.0, device=device)]
    exact = eager_loss(*(value.double() for value in inputs))
    with ops.use_backend("triton"):
        assert abs(float(ops.contrastive_loss(*inputs) - exact)) <= 1e-5 * float(exact)
        monkeypatch.setattr(kernels, "_LOST", kernels.tl.constexpr(-1.0))  # without the repair the column is lost
        assert not math.isclose(float(ops.contrastive_loss(*inputs)), float(exact), rel_tol=1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_blocks_of_weights(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that holds only a corner of the weights gives the same gradients."""
    image, text = (value.to(device) for value in embeddings(200, 24, 1.0, "noise"))
    inputs = [image, text, torch.tensor(1.0, device=device), torch.tensor(10.0, device=device)]

    def loss(*x: Tensor) -> Tensor:
        return ops.contrastive_loss(*x)

    with ops.use_backend("triton"):
        whole = outcome(loss, inputs)
        monkeypatch.setattr(kernels, "WORKSPACE", 2 * 128 * 128)
        parts = outcome(loss, inputs)
        again = outcome(loss, inputs)
    for one, other, repeated in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert torch.equal(other, repeated)  # deterministic to the last bit


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("precision", "products"), [("medium", 2), ("high", 4), ("highest", 12)])
def test_launches(precision: str, products: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 63 x 63 block: 3 kernels and a sum forward; 3 or 4 kernels, one fill and the products backward."""
    calls: list[str] = []
    names = [name for name in dir(kernels) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(kernels, name, Counting(getattr(kernels, name), name, calls))
    plain = kernels._add_product
    monkeypatch.setattr(kernels, "_add_product", lambda *args, **kw: (calls.append("product"), plain(*args, **kw)))
    image, text = (value.to(device).requires_grad_() for value in embeddings(63, 24, 1.0, "noise"))
    with ops.use_backend("triton"):
        loss = ops.contrastive_loss(image, text, 1.0, 10.0, precision=precision)
        assert calls == ["prepare_kernel", "forward_kernel", "merge_kernel"]
        calls.clear()
        loss.backward()
    expand = [] if precision == "medium" else ["expand_kernel"]
    assert calls == ["weights_kernel", *expand, *["product"] * products, "finish_kernel", "scalars_kernel"]


class Counting:
    """A kernel that notes each launch."""

    def __init__(self, kernel, name: str, calls: list[str]) -> None:
        self.kernel, self.name, self.calls = kernel, name, calls

    def __getitem__(self, grid):
        self.calls.append(self.name)
        return self.kernel[grid]


def test_split_tiles_covers_every_tile_once() -> None:
    for row_tiles, col_tiles, programs in [
        (1, 1, 264),
        (512, 512, 264),
        (2, 16, 264),
        (7, 3, 5),
        (1, 999, 264),
        (9, 9, 1),
    ]:
        split = kernels.split_tiles(row_tiles, col_tiles, programs)
        assert split.groups * split.spans <= programs
        assert (split.groups - 1) * split.row_span < row_tiles <= split.groups * split.row_span
        assert (split.spans - 1) * split.col_span < col_tiles <= split.spans * split.col_span
    assert kernels.split_tiles(512, 512, 264)[1] * kernels.split_tiles(512, 512, 264)[3] <= 1.05 * 512 * 512 / 264


def test_split_operand_keeps_22_bits() -> None:
    """What the interpreter hides: the bits of the float16 pair and of the bf16 parts, product by product."""
    x, y = embeddings(64, 512, 1.0, "noise")
    curv, scale = torch.tensor(1.0), torch.tensor(1.0)
    engine = kernels.TritonEngine("cosine", "high", torch.float32, curv, scale)
    left, right, _ = engine.prepare(x, y, None)
    hi_x, lo_x = (part[:64].double() for part in left.matrix.split(512, 1))
    hi_y, lo_y = (part[:64].double() for part in right.matrix.split(512, 1))
    undo = left.scale[:64, None].double() * right.scale[:64].double()
    three = (lo_x @ hi_y.T + hi_x @ lo_y.T + hi_x @ hi_y.T) * undo
    size = x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    exact = x.double() @ y.double().T
    assert ((three - exact) / size).abs().max() < 2**-23
    assert ((hi_x @ hi_y.T * undo - exact) / size).abs().max() > 2**-17  # one product alone would not do
