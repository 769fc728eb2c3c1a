"""The pairwise sigmoid and the one-way softmax against their definitions; schedules of the model."""

import math

import published_formulas as published
import pytest
import small_models
import torch
import torch.nn.functional as F

from meru_fast import checkpoint, config
from meru_fast.models import losses


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_of(image, text, curv, scale, bias, geometry):
    similarity = image @ text.T if geometry == "cosine" else -published.pairwise_dist(image, text, curv)
    return scale * similarity + bias


@pytest.mark.parametrize("geometry", ["lorentz", "cosine"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_against_the_definitions(geometry, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    scalars = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.8, 3.0, -2.0)]
    leaves = [features(7, 0).requires_grad_(), features(7, 1).requires_grad_(), *scalars]
    image, text, curv, scale, bias = leaves
    signs = 2 * torch.eye(7) - 1
    logits = logits_of(*leaves, geometry)
    pairs = [
        (
            losses.sigmoid_loss(image, text, curv, scale, bias, geometry=geometry),
            -F.logsigmoid(signs * logits).sum() / 7,
        ),
        (
            losses.one_way_contrastive_loss(image, text, curv, scale, geometry=geometry),
            F.cross_entropy(logits, torch.arange(7)),
        ),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        wanted = torch.autograd.grad(expected, leaves, retain_graph=True, materialize_grads=True)
        given = torch.autograd.grad(found, leaves, materialize_grads=True)
        torch.testing.assert_close(given, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", ["meru", "clip"])
def test_sigmoid_models(kind, tmp_path):
    model = getattr(small_models, kind)(pair_loss="sigmoid")
    images, tokens = small_models.images(5), small_models.captions(5)
    result = model(images, tokens)
    result["loss"].backward()
    assert model.logit_bias.grad.abs() > 0
    assert result["logging"]["logit_bias"].item() == model.logit_bias.item()
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(tokens)
        curv = model.scalar("curv") if kind == "meru" else 1.0
        logits = logits_of(image, text, curv, model.scalar("logit_scale"), model.logit_bias, model.geometry)
        expected = -F.logsigmoid((2 * torch.eye(5) - 1) * logits).sum() / 5
    assert result["logging"]["contrastive_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert model.state_dict()["logit_bias"].shape == ()
    model.save_pretrained(tmp_path)
    assert checkpoint.load_model(tmp_path)[0].pair_loss == "sigmoid"
    rebuilt = config.instantiate(checkpoint.guess_model(model.state_dict()))
    checkpoint.fit_state(rebuilt, model.state_dict(), "here")


@pytest.mark.parametrize("curv", [0.5, 1.0, 2.0])
def test_sigmoid_starts_where_siglip_starts(curv):
    """Orthogonal features of radius 1, as at initialisation, have logits of -10."""
    model = small_models.meru(pair_loss="sigmoid", curv_init=curv)
    x, y = torch.eye(32)[:1], torch.eye(32)[1:2]
    distance = published.pairwise_dist(*(published.exp_map0(z, torch.tensor(curv)) for z in (x, y)), torch.tensor(curv))
    logit = model.logit_bias - model.scalar("logit_scale") * distance
    assert logit.item() == pytest.approx(-10, abs=1e-4)
    assert small_models.clip(pair_loss="sigmoid").logit_bias.item() == -10


def test_unknown_pair_loss():
    with pytest.raises(ValueError, match="pair_loss is one of softmax, sigmoid, got 'siglip'"):
        small_models.clip(pair_loss="siglip")


def test_schedules():
    model = small_models.meru(learn_curv=False, curv_init=4.0, final_curv=0.01, min_radius=0.1, final_min_radius=0.3)
    assert "curv" not in dict(model.named_parameters())
    assert model.state_dict()["curv"].shape == ()
    for fraction, curv, radius in ((0.0, 4.0, 0.1), (0.5, 0.2, 0.2), (1.0, 0.01, 0.3)):
        model.set_progress(fraction)
        logging = model(small_models.images(2), small_models.captions(2))["logging"]  # the bounds do not cut it off
        assert logging["curv"].item() == pytest.approx(curv, rel=1e-5)
        assert model.state_dict()["curv"].item() == pytest.approx(math.log(curv), rel=1e-5)
        assert model.min_radius == pytest.approx(radius)
    with pytest.raises(ValueError, match="it needs learn_curv=False"):
        small_models.meru(final_curv=0.1)


def test_nothing_is_scheduled_by_default():
    model = small_models.meru()
    with torch.no_grad():
        model.curv.fill_(0.3)
    model.set_progress(0.7)
    assert model.curv.item() == pytest.approx(0.3)
    assert model.min_radius == 0.1
