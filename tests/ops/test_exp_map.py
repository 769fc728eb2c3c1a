"""exp_map0 and log_map0: the accuracy contract, the folded scale, layouts, custom-op rules."""

import pytest
import torch
from accuracy import assert_contract, outcome, points

from meru_fast import lorentz, ops
from meru_fast.ops.exp_map import radial_map

MAPS = {"exp_map0": lorentz.exp_map0, "log_map0": lorentz.log_map0}
CASES = [  # rows, width, norm, curv, dtype
    (1, 24, 1.0, 1.0, torch.float32),
    (63, 64, 1e-4, 0.1, torch.float32),
    (129, 512, 1.0, 10.0, torch.float32),
    (1000, 24, 0.3, 1.0, torch.float32),
    (17, 640, 1e4, 0.1, torch.float32),
    (9, 768, 3.0, 10.0, torch.float32),
    (5, 1024, 100.0, 1.0, torch.float32),
    (7, 1, 1.0, 1.0, torch.float32),
    (63, 512, 1.0, 1.0, torch.bfloat16),
    (63, 129, 1.0, 0.1, torch.float16),
]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_contract(name: str, case: tuple, device: torch.device) -> None:
    rows, width, norm, curv, dtype = case
    x = points(rows, width, norm, dtype).to(device)
    x[0] = 0
    scalars = [torch.tensor(curv, device=device), torch.tensor(0.7, device=device)]
    with ops.use_backend("triton"):
        assert_contract(
            lambda x, c, a: getattr(ops, name)(x, c, scale=a),
            lambda x, c, a: MAPS[name](x.to(torch.promote_types(x.dtype, torch.float32)) * a, c),
            [x, *scalars],
        )


@pytest.mark.parametrize("name", MAPS)
def test_the_torch_path_is_the_reference(name: str) -> None:
    x = points(9, 24, 1.0, torch.bfloat16)
    with ops.use_backend("torch"):
        assert torch.equal(getattr(ops, name)(x, 0.5, scale=0.3), MAPS[name](x.float() * 0.3, 0.5))
        assert torch.equal(getattr(ops, name)(x.double(), 0.5), MAPS[name](x.double(), 0.5))


def test_layouts(device: torch.device) -> None:
    """Any leading dimensions, any strides, no rows: the result is that of the contiguous tensor."""
    x = points(24, 40, 1.0).to(device)
    with ops.use_backend("triton"):
        flat = ops.exp_map0(x, 0.5)
        assert torch.equal(ops.exp_map0(x.view(2, 3, 4, 40), 0.5), flat.view(2, 3, 4, 40))
        assert torch.equal(ops.exp_map0(x[0], 0.5), flat[0])
        assert torch.equal(ops.exp_map0(x[::3], 0.5), flat[::3])
        wide = torch.cat([x, x], 1)
        assert torch.equal(ops.exp_map0(wide[:, 40:], 0.5), flat)
        assert torch.equal(ops.exp_map0(x.T.contiguous().T, 0.5), flat)
        empty = x[:0].clone().requires_grad_()
        curv = torch.tensor(0.5, device=device, requires_grad=True)
        out = ops.exp_map0(empty, curv)
        assert out.shape == (0, 40)
        grads = torch.autograd.grad(out.sum(), (empty, curv))
        assert grads[0].shape == (0, 40)
        assert grads[1] == 0


def test_gradients_of_strided_outputs(device: torch.device) -> None:
    """An expanded or transposed incoming gradient."""
    x = points(8, 8, 1.0).to(device).requires_grad_()
    with ops.use_backend("triton"):
        grad = torch.autograd.grad(ops.exp_map0(x).sum(), x)[0]
        other = torch.autograd.grad(ops.exp_map0(x).T.contiguous().sum(), x)[0]
    torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_of_one_element_keep_their_shape(shape: tuple[int, ...], device: torch.device) -> None:
    x = points(3, 8, 1.0).to(device)
    curv, scale = (torch.full(shape, value, device=device, requires_grad=True) for value in (0.5, 2.0))
    with ops.use_backend("triton"):
        grads = torch.autograd.grad(ops.exp_map0(x, curv, scale=scale).sum(), (curv, scale))
    assert [grad.shape for grad in grads] == [torch.Size(shape)] * 2


def test_saturation(device: torch.device) -> None:
    x = points(4, 16, 1e3).to(device).requires_grad_()
    with ops.use_backend("triton"):
        y = ops.exp_map0(x, 4.0)
    torch.testing.assert_close(y.norm(dim=1), torch.full((4,), 2.0**14, device=device))
    radial = torch.autograd.grad(y.norm(dim=1).sum(), x)[0]
    assert radial.abs().max() < 1e-2  # the norm no longer depends on x: 16384 is constant to its rounding


def test_custom_op_rules(device: torch.device) -> None:
    x = points(5, 24, 1.0).to(device).requires_grad_()
    curv, scale = (torch.tensor(v, device=device, requires_grad=True) for v in (0.5, 1.5))
    for inverse in (False, True):
        torch.library.opcheck(radial_map, (x, scale, curv, inverse))
        torch.library.opcheck(radial_map, (x, None, curv, inverse))


def test_compiles_into_one_graph(device: torch.device) -> None:
    torch.compiler.reset()
    inputs = [points(5, 24, 1.0).to(device), torch.tensor(0.5, device=device), torch.tensor(2.0, device=device)]

    def lift(x, curv, scale):
        return ops.exp_map0(x, curv, scale=scale) * 2

    for backend in ("torch", "triton"):
        torch.compiler.reset()
        with ops.use_backend(backend):
            compiled = torch.compile(lift, fullgraph=True, backend="aot_eager")
            for mine, eager in zip(outcome(compiled, inputs), outcome(lift, inputs), strict=True):
                torch.testing.assert_close(mine, eager)


def test_double_backward_is_refused(device: torch.device) -> None:
    x = points(3, 8, 1.0).to(device).requires_grad_()
    with ops.use_backend("triton"):
        first = torch.autograd.grad(ops.exp_map0(x).sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"no double backward.*meru_fast.lorentz"):
            torch.autograd.grad(first.sum(), x)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x = points(3, 8, 1.0).to(device)
    with ops.use_backend("triton"):
        expected = ops.exp_map0(x, 0.5)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(ops.exp_map0(x, 0.5), expected)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.ones(2, 3).int(),), {}, TypeError, "floating.*int32"),
        ((torch.ones(2, 3), 0.0), {}, ValueError, "curv must be positive, got 0.0"),
        ((torch.ones(2, 3), 1.0), {"scale": -2.0}, ValueError, "scale must be positive, got -2.0"),
        ((torch.ones(2, 3), torch.ones(3)), {}, ValueError, r"curv must be one number, got a tensor of shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.exp_map0(*arguments, **keywords)
