"""Patching a code base laid out like MERU and HyCoCLIP changes its speed, not its numbers."""

import inspect
import sys
import types

import pytest
import torch
from hyperbolic_stand_in import lorentz, models
from published_formulas import exp_map0 as lift

from meru_fast import ops, patch

PACKAGE = "hyperbolic_stand_in"
BATCH = 9


def inputs(kind: str) -> tuple:
    generator = torch.Generator().manual_seed(1)
    images = [3 * torch.randn(BATCH, 3, 2, 2, generator=generator) for _ in range(2)]
    tokens = [[torch.randint(0, 50, (4,), generator=generator) for _ in range(BATCH)] for _ in range(2)]
    return (images[0], images[1], tokens[0], tokens[1]) if kind == "HyCoCLIP" else (images[0], tokens[0])


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(models, kind)().double()
    if kind != "CLIPBaseline":
        for parameter, value in ((model.curv, 0.4), (model.visual_alpha, -1.0), (model.textual_alpha, -0.7)):
            parameter.data.fill_(value)
    return model


def results(model: torch.nn.Module, kind: str) -> tuple[dict, dict]:
    output = model(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs(kind)))
    model.zero_grad()
    output["loss"].backward()
    values = {"loss": output["loss"].detach()} | {k: v.detach() for k, v in output["logging"].items()}
    return values, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["CLIPBaseline", "MERU", "HyCoCLIP"])
def test_losses_and_gradients_stay_what_they_were(kind):
    model = build(kind)
    expected = results(model, kind)
    with (patch.hycoclip if kind == "HyCoCLIP" else patch.meru)(PACKAGE):
        found = results(model, kind)
    assert found[0].keys() == expected[0].keys()
    if kind != "CLIPBaseline":
        assert expected[0]["entailment_loss"] > 0.01
    for part in (0, 1):
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_scalars_are_clamped_as_published():
    model = build("MERU")
    for parameter in (model.curv, model.visual_alpha, model.textual_alpha, model.logit_scale):
        parameter.data.fill_(9.0)
    with patch.meru(PACKAGE):
        model(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs("MERU")))
    found = [model.curv.item(), model.visual_alpha.item(), model.textual_alpha.item(), model.logit_scale.item()]
    assert found == pytest.approx([2.302585, 0.0, 0.0, 4.6052])


def test_everything_is_replaced_and_put_back():
    before = dict(vars(lorentz)), dict(vars(models)), models.MERU.forward
    with patch.hycoclip(PACKAGE) as patched:
        assert lorentz.pairwise_dist is ops.pairwise_dist
        assert models.exp_map0 is ops.exp_map0  # imported by name there
        assert f"{PACKAGE}.lorentz.oxy_angle_eval" in patched.replaced
        assert f"{PACKAGE}.models.HyCoCLIP.forward" in patched.replaced
        assert len(patched.replaced) == len(patch.GEOMETRY) + 4
        again = patch.meru(PACKAGE)  # twice is harmless
        assert not any(".lorentz." in name for name in again.replaced)
        again.undo()
        assert lorentz.pairwise_dist is ops.pairwise_dist
    assert (dict(vars(lorentz)), dict(vars(models)), models.MERU.forward) == before


def test_no_pairwise_matrix_is_kept():
    """The published forward passes keep a dozen B x B tensors for the backward pass, the patched ones none."""

    def matrices_kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            results(build("HyCoCLIP"), "HyCoCLIP")
        return sizes.count((BATCH, BATCH))

    assert matrices_kept() > 12
    with patch.hycoclip(PACKAGE):
        assert matrices_kept() == 0


def points(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(patch.GEOMETRY))
def test_functions_agree(name):
    """Every function against the plain one of that name: shape, values, gradients."""
    original, fused = getattr(lorentz, name), patch.GEOMETRY[name]
    assert list(inspect.signature(fused).parameters)[:2] == list(inspect.signature(original).parameters)[:2]
    takes = [p for p in inspect.signature(original).parameters if p in ("x", "y", "curv")]
    batch = name.endswith("_batch") or name.startswith("get_")
    curv = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if batch else torch.tensor(0.7, dtype=torch.float64)
    same_rows = name in ("oxy_angle", "oxy_angle_batch", "elementwise_inner", "elementwise_dist")
    x = points(5, 3, 4) if batch else points(5, 4)
    y = points(5 if same_rows else 6, *x.shape[1:]) + 0.3
    arguments = {"x": lift(x, torch.tensor(1.0)), "y": lift(y, torch.tensor(1.0)), "curv": curv}
    leaves = [arguments[key].detach().requires_grad_() for key in takes]
    expected, found = original(*leaves), fused(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    given = torch.autograd.grad((found * weights).sum(), leaves)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)


def test_a_package_of_another_layout_is_named():
    with pytest.raises(ImportError, match=r"cannot patch 'no_such_package' .* install that code base, or pass"):
        patch.meru("no_such_package")
    package = types.ModuleType("half_a_package")
    package.__path__ = []
    sys.modules["half_a_package"] = package
    with pytest.raises(ImportError, match=r"half_a_package.lorentz"):
        patch.hycoclip("half_a_package")


def test_a_package_without_a_model_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(models, "HyCoCLIP")
    before = dict(vars(lorentz)), models.MERU.forward
    with pytest.raises(AttributeError, match=r"hyperbolic_stand_in.models has no HyCoCLIP"):
        patch.hycoclip(PACKAGE)
    assert (dict(vars(lorentz)), models.MERU.forward) == before


def test_factors_and_curvatures_must_match():
    with pytest.raises(ValueError, match=r"curv \[N\], got \[5, 3, 4\] and \[2\]"):
        patch.exp_map0_batch(points(5, 3, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"got \[5, 4\], \[5, 3, 4\] and \[3\]"):
        patch.pairwise_dist_batch(points(5, 4), points(5, 3, 4), torch.ones(3))
