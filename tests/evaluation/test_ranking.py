"""Accuracies and recalls against counting by hand; several true matches; merged captions."""

import pytest
import torch
import torch.nn.functional as F
from eval_models import tiny
from sklearn.metrics import recall_score

from meru_fast import lorentz
from meru_fast.evaluation import ranking
from meru_fast.evaluation.ranking import accuracies, nearest, recalls
from meru_fast.evaluation.retrieval import merged
from meru_fast.evaluation.sources import CaptionedImages


def test_accuracies_by_hand():
    ranked = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 1], [0, 1, 2, 3, 4]])
    labels = torch.tensor([0, 0, 0, 5])
    found = accuracies(ranked, labels, 7, prefix="lp_")
    # class 0: 1 of 3; class 5: 0 of 1, not among its first five; class 1: predicted, does not occur; others: neither
    assert found == pytest.approx({"lp_acc1": 0.25, "lp_acc5": 2 / 4, "lp_mean_per_class_recall": (1 / 3 + 0 + 0) / 3})
    assert set(accuracies(ranked[:, :2], labels, 7)) == {"acc1", "mean_per_class_recall"}


def test_macro_accuracy_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (300,), generator=generator)
    guesses = torch.randint(0, 12, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.6, labels, guesses)
    expected = recall_score(labels, predicted, average="macro", zero_division=0)
    assert accuracies(predicted[:, None], labels, 15)["mean_per_class_recall"] == pytest.approx(expected, abs=1e-12)


def test_recalls_by_hand_with_several_true_matches():
    ranked = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2]])
    pairs = torch.tensor([[4, 1], [4, 0], [7, 0], [9, 2]])  # (query, gallery)
    found = recalls(ranked, pairs, torch.tensor([4, 7, 9]), [1, 2, 3])
    assert found == pytest.approx({1: 0.0, 2: 1 / 3, 3: 1.0})


@pytest.mark.parametrize("kind", ["meru", "clip"])
def test_nearest_is_a_full_sort(kind, device, monkeypatch):
    """Also where the gallery comes in blocks."""
    monkeypatch.setattr(ranking, "GALLERY_CHUNK", 37)
    monkeypatch.setattr(ranking, "QUERY_CHUNK", 11)
    model = tiny(kind).to(device)
    features = torch.randn(150, 48, generator=torch.Generator().manual_seed(0)).to(device)
    if kind == "meru":
        curv = model.curv.exp().detach()
        features = lorentz.exp_map0(0.3 * features, curv)
        scores = lorentz.pairwise_inner(features[:50].double(), features[50:].double(), curv.double())
    else:
        features = F.normalize(features, dim=-1)
        scores = features[:50].double() @ features[50:].double().T
    order = scores.argsort(dim=1, descending=True)
    for k in (1, 10, 100):
        assert torch.equal(nearest(model, features[:50], features[50:], k), order[:, :k])


def test_equal_captions_become_one_with_several_images():
    dataset = CaptionedImages("own", [None] * 3, ["b", "a", "b", "c", "a"], [(0, 0), (0, 1), (1, 2), (2, 3), (2, 4)])
    captions, pairs = merged(dataset)
    assert captions == ["b", "a", "c"]
    assert pairs == [(0, 0), (0, 1), (1, 0), (2, 1), (2, 2)]
