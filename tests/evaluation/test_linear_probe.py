"""The linear probe: the published search, both solvers, and the features on disk."""

import pytest
import torch
from eval_models import noise, overlapping, tiny

from meru_fast.evaluation import linear_probe
from meru_fast.evaluation.features import Labelled
from meru_fast.evaluation.linear_probe import COSTS, FITS, SOLVERS, Fitted, LinearProbe, probe


def test_both_solvers_agree():
    """Each fit, by label, and the whole search, by accuracy. In fp64 scikit-learn gets near enough to the solution."""
    features, labels = overlapping(4000, 24, 6, 1.0)
    sizes = [1000, 1000, 2000]
    parts = [Labelled(*pair) for pair in zip(features.split(sizes), labels.split(sizes), strict=True)]
    exact = [Labelled(part.features.double(), part.labels) for part in parts]
    fits = {}
    for solver, (train, _, test) in (("batched", parts), ("sklearn", exact)):
        fitted = SOLVERS[solver](train, 6, 1000).fit([1e-4, 1e-2, 1.0], final=True)
        fits[solver] = [one.predict(test.features) for one in fitted]
    for ours, theirs in zip(fits["batched"], fits["sklearn"], strict=True):
        assert ours.shape == theirs.shape == (2000, 5)
        assert (ours[:, 0] == theirs[:, 0]).float().mean() >= 0.999
    ours, _ = probe(*parts, num_classes=6)
    theirs, _ = probe(*exact, num_classes=6, solver="sklearn")
    assert 0.5 < ours["lp_acc1"] < 0.99
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=0.001), name


class Recorder:
    """A solver that is right in proportion to how near the cost is to `target`, and writes down what it is asked."""

    name = "recorder"
    target = 30.0
    asked: list[list[float]] = []  # noqa: RUF012

    def __init__(self, train, num_classes, max_iterations):
        self.size = len(train.features)

    def fit(self, costs, start=None, final=False):
        self.asked.append([self.size, *costs])
        return [Fitted(lambda features, cost=cost: self.guess(features, cost)) for cost in costs]

    def guess(self, features, cost):
        distance = abs(torch.tensor(cost).log10() - torch.tensor(self.target).log10()).item()
        wrong = int(len(features) * min(1.0, distance / 8))
        return torch.cat(
            [torch.ones(wrong, 1, dtype=torch.long), torch.zeros(len(features) - wrong, 1, dtype=torch.long)]
        )


def test_search_is_the_published_one(monkeypatch):
    """Seven costs; then best / f and best * f for f = 10, 10^(1/2), 10^(1/4), 10^(1/8); then one fit on both parts."""
    monkeypatch.setitem(linear_probe.SOLVERS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "asked", [])
    train, val = (Labelled(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)) for n in (50, 100_000))
    done = []
    _, cost = probe(train, val, val, num_classes=2, solver="recorder", advance=done.append)
    expected, best, factor = [[50, *COSTS]], 100.0, 10.0  # 100 is nearest to 30 among the seven (in decades)
    for _ in range(4):
        tried = [best / factor, best * factor]
        expected.append([50, *tried])
        best = min([best, *tried], key=lambda value: abs(torch.tensor(value / 30.0).log10().item()))
        factor **= 0.5
    expected.append([100_050, best])
    assert [[len(row), *row] for row in Recorder.asked] == [pytest.approx([len(row), *row]) for row in expected]
    assert cost == pytest.approx(best)
    assert sum(done) == FITS == 16


@pytest.fixture
def data(tmp_path):
    """A set of two classes of noise in three parts; pixels decide the class."""
    for number, part in enumerate(("train", "val", "test")):
        for label in range(2):
            folder = tmp_path / "data" / part / f"c{label}"
            folder.mkdir(parents=True)
            for shot in range(12):
                picture = noise(1000 * number + 100 * label + shot).point(
                    lambda value, shift=60 * label: value // 2 + shift
                )
                picture.save(folder / f"{shot}.png")
    return {"name": "own", "kind": "folder", "root": f"{tmp_path}/data/{{part}}"}


def test_features_are_those_before_the_projection_and_are_kept(data, tmp_path, monkeypatch):
    model = tiny("meru")
    evaluator = LinearProbe([data], cache_dir=str(tmp_path / "cache"), batch_size=5)
    scores = evaluator(model)
    assert scores["own/lp_acc1"] > 0.9
    assert scores["own/lp_cost"] > 0
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 3

    from safetensors.torch import load_file

    kept = load_file(next(file for file in files if "_test_" in file.name))
    dataset = evaluator.open("own", "test")
    pixels = torch.stack([evaluator.transform(model)(dataset.samples[index][0]) for index in range(24)])
    with torch.no_grad():
        expected = model.visual((pixels.float() / 255 - model.pixel_mean) / model.pixel_std)
    torch.testing.assert_close(kept["features"], expected, rtol=1e-5, atol=1e-5)
    assert kept["labels"].tolist() == [0] * 12 + [1] * 12

    def refuse(*arguments, **options):
        raise AssertionError("encoded again")

    monkeypatch.setattr(linear_probe, "image_features", refuse)
    assert LinearProbe([data], cache_dir=str(tmp_path / "cache"))(model) == scores
    with pytest.raises(AssertionError, match="encoded again"):  # other weights
        LinearProbe([data], cache_dir=str(tmp_path / "cache"))(tiny("meru", seed=1))
    with pytest.raises(AssertionError, match="encoded again"):  # other pixels
        LinearProbe([data], cache_dir=str(tmp_path / "cache"), resize="squeeze")(model)


def test_solver_is_checked():
    with pytest.raises(ValueError, match="solver must be one of batched, sklearn, got 'cuml'"):
        LinearProbe([], solver="cuml")
