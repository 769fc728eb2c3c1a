"""Kernel launches per call: one read and one write each way. On a GPU also: no host synchronisation, graph capture."""

from collections.abc import Callable

import pytest
import torch
import triton
from accuracy import points
from triton.runtime.interpreter import InterpretedFunction

from meru_fast import ops

LAUNCHES = [  # op, points it takes, launches forward, launches backward
    (ops.exp_map0, 1, 1, 1),
    (ops.log_map0, 1, 1, 1),
    (ops.half_aperture, 1, 1, 1),
    (ops.elementwise_inner, 2, 1, 1),
    (ops.elementwise_dist, 2, 1, 1),
    (ops.oxy_angle, 2, 1, 1),
    (ops.entailment_loss, 2, 1, 1),
    (ops.pairwise_inner, 2, 3, 0),  # two of row norms; the backward is two matrix products
    (ops.pairwise_dist, 2, 3, 0),
    (ops.pairwise_oxy_angle, 2, 3, 0),
]
NAMES = [case[0].__name__ for case in LAUNCHES]


def leaves(count: int, device: torch.device) -> list[torch.Tensor]:
    curv = torch.tensor(0.5, device=device, requires_grad=True)
    return [points(9, 24, 1.0, seed=seed).to(device).requires_grad_() for seed in range(count)] + [curv]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton kernels launched since."""
    seen: list[str] = []
    for kind in (InterpretedFunction, triton.JITFunction):
        plain = kind.run

        def run(self, *args, _plain=plain, **kwargs):
            seen.append(self.fn.__name__)
            return _plain(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)
    return seen


@pytest.mark.parametrize(
    ("op", "count", "forward", "backward"), LAUNCHES, ids=lambda value: getattr(value, "__name__", "")
)
def test_launches(
    op: Callable, count: int, forward: int, backward: int, launches: list[str], device: torch.device
) -> None:
    inputs = leaves(count, device)
    with ops.use_backend("triton"):
        out = op(*inputs)
        assert len(launches) == forward, launches
        launches.clear()
        torch.autograd.grad(out.sum(), inputs)
        assert len(launches) == backward, launches


def test_topk_launches_norms_and_one_search(launches: list[str], device: torch.device) -> None:
    with ops.use_backend("triton"):
        ops.topk(points(3, 24, 1.0).to(device), points(200, 24, 1.0).to(device), 4)
    assert launches == ["row_norm_kernel", "row_norm_kernel", "topk_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "count"), [case[:2] for case in LAUNCHES], ids=lambda value: getattr(value, "__name__", "")
)
def test_no_host_synchronisation_and_graph_capture(op: Callable, count: int) -> None:
    inputs = leaves(count, torch.device("cuda"))

    def step() -> list[torch.Tensor]:
        out = op(*inputs)
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    eager = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for mine, expected in zip(captured, eager, strict=True):
        torch.testing.assert_close(mine, expected)
