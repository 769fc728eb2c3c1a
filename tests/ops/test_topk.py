"""Streaming top-k against a full sort of the fp64 distances."""

import pytest
import torch
from accuracy import near, points

from meru_fast import lorentz, ops


def expected(queries: torch.Tensor, gallery: torch.Tensor, k: int, curv: float, min_radius: float | None):
    x, y = queries.double(), gallery.double()
    distance = lorentz.pairwise_dist(x, y, curv)
    if min_radius is not None:
        outside = lorentz.half_aperture(y, curv, min_radius) < lorentz.pairwise_oxy_angle(y, x, curv).T
        distance = distance.masked_fill(outside, torch.inf)
    distance, index = distance.sort(dim=1, stable=True)
    inner = -torch.cosh(curv**0.5 * distance) / curv
    return inner[:, :k], index[:, :k].masked_fill(distance[:, :k].isinf(), -1)


def assert_found(found: tuple, truth: tuple) -> None:
    values, indices = found
    width = truth[1].shape[1]
    assert torch.equal(indices[:, :width].cpu(), truth[1].cpu())
    torch.testing.assert_close(values[:, :width].double(), truth[0], rtol=2e-6, atol=2e-6)
    assert (indices[:, width:] == -1).all()
    assert (values[:, width:] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("queries", "gallery", "width", "k", "norm", "curv"),
    [
        (1, 1, 24, 1, 1.0, 1.0),
        (5, 200, 24, 10, 1.0, 1.0),
        (33, 130, 64, 3, 0.01, 0.1),
        (7, 5, 16, 8, 1.0, 10.0),
        (3, 129, 512, 33, 5.0, 1.0),
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_exact(
    backend: str, queries: int, gallery: int, width: int, k: int, norm: float, curv: float, device: torch.device
) -> None:
    x, y = points(queries, width, norm).to(device), points(gallery, width, norm, seed=1).to(device)
    with ops.use_backend(backend):
        assert_found(ops.topk(x, y, k, curv), expected(x, y, k, curv, None))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("norm", "min_radius"), [(0.5, 0.1), (2.0, 0.3), (0.05, 0.1)])
def test_only_captions_whose_cone_holds_the_query(
    backend: str, norm: float, min_radius: float, device: torch.device
) -> None:
    captions = torch.cat([points(60, 24, norm), torch.zeros(1, 24), points(80, 24, norm, seed=2)])
    images = near(2 * captions[torch.randperm(141, generator=torch.Generator().manual_seed(0))[:40]], 0.4)
    truth = expected(images, captions, 5, 1.0, min_radius)
    full = expected(images, captions, 5, 1.0, None)
    assert not torch.equal(truth[1], full[1])  # the mask matters
    assert (truth[1][:, 0] >= 0).all()  # the root's cone holds everything
    with ops.use_backend(backend):
        assert_found(ops.topk(images.to(device), captions.to(device), 5, 1.0, entailment=min_radius), truth)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_ties_go_to_the_lower_index_and_small_norms_keep_their_order(backend: str, device: torch.device) -> None:
    """Inner products of points near the root agree to the last digits of fp32; the order is right all the same."""
    y = points(150, 32, 1e-3).to(device)
    y[140], y[70] = y[3], y[3]
    with ops.use_backend(backend):
        values, indices = ops.topk(y[:5], y, 4)
    assert indices[3, :3].tolist() == [3, 70, 140]
    assert values[3, :3].tolist() == [-1.0] * 3
    assert torch.equal(indices.cpu(), expected(y[:5], y, 4, 1.0, None)[1].cpu())


def test_large_k_falls_back_and_chunks_join(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["meru_fast.ops.topk"]
    x, y = points(7, 24, 1.0).to(device), points(500, 24, 1.0, seed=1).to(device)
    truth = expected(x, y, 100, 1.0, None)
    assert_found(ops.topk(x, y, 100), truth)
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "QUERIES", 3)
    with ops.use_backend("torch"):
        assert_found(ops.topk(x, y, 100), truth)
        assert_found(ops.topk(x.double(), y.double(), 100), truth)
    with ops.use_backend("triton"):
        assert_found(ops.topk(x, y, 100), truth)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_broken_row_is_never_found(backend: str, device: torch.device) -> None:
    x, y = points(3, 8, 1.0).to(device), points(6, 8, 1.0, seed=1).to(device)
    y[2] = torch.nan
    with ops.use_backend(backend):
        values, indices = ops.topk(x, y, 6)
    assert (indices[:, :5] != 2).all()
    assert (indices[:, 5] == -1).all()
    assert values[:, :5].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_sides(backend: str, device: torch.device) -> None:
    x, none = points(3, 8, 1.0).to(device), torch.zeros(0, 8, device=device)
    with ops.use_backend(backend):
        values, indices = ops.topk(x, none, 2)
        assert values.tolist() == [[-torch.inf] * 2] * 3
        assert indices.tolist() == [[-1] * 2] * 3
        values, indices = ops.topk(none, x, 2)
        assert values.shape == indices.shape == (0, 2)


def test_half_precision_and_strides(device: torch.device) -> None:
    x, y = points(4, 32, 1.0, torch.bfloat16).to(device), points(50, 32, 1.0, torch.bfloat16, seed=1).to(device)
    truth = expected(x, y, 3, 1.0, None)
    for backend in ("triton", "torch"):
        with ops.use_backend(backend):
            assert_found(ops.topk(x.T.contiguous().T, y, 3), truth)


@pytest.mark.slow
def test_memory_of_the_torch_path_is_bounded() -> None:
    """20,000 queries x 50,000 captions would be 4 GB of scores; the path takes a few chunks."""
    import resource

    x, y = points(20_000, 16, 1.0), points(50_000, 16, 1.0, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ops.topk(x, y, 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(
    ("k", "entailment", "error", "message"),
    [
        (0, None, ValueError, "k must be at least 1, got 0"),
        (1, -0.1, ValueError, "must not be negative, got -0.1"),
        (1, True, TypeError, "min_radius of the cones"),
    ],
)
def test_bad_arguments_are_named(k: int, entailment: float | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.topk(torch.ones(2, 3), torch.ones(2, 3), k, entailment=entailment)
