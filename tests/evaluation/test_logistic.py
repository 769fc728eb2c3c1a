"""The batched L-BFGS solves scikit-learn's objective, for all costs at once."""

import pytest
import torch
from eval_models import overlapping
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from meru_fast.evaluation.linear_probe import COSTS
from meru_fast.evaluation.logistic import LogisticProblem


def digits():
    """Scikit-learn's handwritten digits, as pixels in [0, 1]."""
    data = load_digits()
    return torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()


DATA = {
    "overlapping": lambda: overlapping(3000, 32, 8, 2.0),
    "two classes": lambda: overlapping(2000, 16, 2, 1.5),
    "digits": digits,
}


def objective(features, labels, weight, bias, cost):
    """The value to be minimised, in float64, as scikit-learn documents it (divided by C N)."""
    logits = features.double() @ weight.double().T + bias.double()
    entropy = torch.nn.functional.cross_entropy(logits, labels)
    return entropy + weight.double().square().sum() / (2 * cost * len(features))


@pytest.mark.parametrize("name", DATA)
def test_agrees_with_scikit_learn(name, device):
    """Trained on one half, asked about the other: >= 99.9 % equal labels, accuracy within 0.1 points.

    Scikit-learn runs to convergence here; with its default tolerance its own labels are up to 0.5 % away from that.
    """
    features, labels = DATA[name]()
    half = len(features) // 2
    costs = [1e-4, 1e-2, 1.0, 1e2]
    problem = LogisticProblem(features[:half].to(device), labels[:half].to(device), int(labels.max()) + 1)
    solution = problem.fit(costs)
    assert solution.converged.all()
    predicted = solution.predict(features[half:].to(device)).cpu()
    for position, cost in enumerate(costs):
        reference = LogisticRegression(C=cost, tol=1e-8, max_iter=20_000)
        reference.fit(features[:half].double().numpy(), labels[:half].numpy())
        expected = torch.from_numpy(reference.predict(features[half:].double().numpy()))
        assert (predicted[position] == expected).float().mean() >= 0.999, cost
        ours, theirs = ((guess == labels[half:]).double().mean() for guess in (predicted[position], expected))
        assert abs(ours - theirs) <= 0.001, cost


def test_value_and_gradient_against_autograd():
    features, labels = overlapping(500, 12, 5, 1.0)
    problem = LogisticProblem(features.double(), labels, 5)
    theta = torch.randn(3, 5, 13, dtype=torch.float64, requires_grad=True)
    penalty = torch.tensor([1e-3, 1.0, 10.0], dtype=torch.float64)
    value, gradient = problem._objective(theta.detach(), penalty)
    logits = torch.einsum("nd,skd->snk", problem.inputs, theta)
    entropy = torch.nn.functional.cross_entropy(logits.movedim(2, 1), labels.expand(3, -1), reduction="none").mean(
        dim=1
    )
    expected = entropy + 0.5 * penalty * theta[..., :-1].square().sum(dim=(1, 2))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), theta)[0], rtol=1e-10, atol=1e-12)


def test_rotation_and_centring_do_not_show():
    """Weights come back in the coordinates of the features, where the documented objective is minimal."""
    features, labels = overlapping(800, 10, 4, 1.5)
    solution = LogisticProblem(features.double(), labels, 4).fit([0.1], tolerance=1e-10)
    weight, bias = solution.weight[0], solution.bias[0]
    lowest = objective(features, labels, weight, bias, 0.1)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-2):
        for _ in range(5):
            step = scale * torch.randn(4, 11, generator=generator, dtype=torch.float64)
            assert objective(features, labels, weight + step[:, :-1], bias + step[:, -1], 0.1) > lowest


def test_batch_equals_single_costs():
    features, labels = overlapping(1500, 24, 6, 2.0)
    problem = LogisticProblem(features, labels, 6)
    together = problem.fit(COSTS)
    asked = overlapping(1500, 24, 6, 2.0, seed=1)[0]
    for position, cost in enumerate(COSTS):
        alone = problem.fit([cost])
        agreement = (alone.predict(asked)[0] == together[position].predict(asked)[0]).float().mean()
        assert agreement >= 0.998, cost


def test_start_changes_the_way_and_not_the_end():
    features, labels = overlapping(1500, 24, 6, 2.0)
    problem = LogisticProblem(features.double(), labels, 6)
    near = problem.fit([1.0])
    cold, warm = problem.fit([2.0], tolerance=1e-9), problem.fit([2.0], tolerance=1e-9, start=near)
    torch.testing.assert_close(cold.weight, warm.weight, rtol=1e-5, atol=1e-6)
    assert warm.iterations < cold.iterations


def test_iterations_are_bounded_and_reported():
    features, labels = overlapping(500, 12, 5, 1.0)
    solution = LogisticProblem(features, labels, 5).fit([1e-8, 1e4], max_iterations=5)
    assert solution.converged.tolist() == [True, False]
    assert solution.iterations[1] == 5
    assert torch.isfinite(solution.weight).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_weak_penalties_on_separated_classes_stay_near_the_minimum():
    """Every separating solution has a vanishing gradient there; the one found is nearly that of the objective."""
    features, labels = overlapping(3000, 96, 8, 3.0)
    problem = LogisticProblem(features[:1000], labels[:1000], 8)
    found = problem.fit(COSTS)
    assert (found[5].predict(features[:1000])[0] == labels[:1000]).all()  # separated at 1e4
    reference = LogisticRegression(C=1e4, tol=1e-9, max_iter=4000)
    reference.fit(features[:1000].double().numpy(), labels[:1000].numpy())
    expected = torch.from_numpy(reference.predict(features[1000:].double().numpy()))
    assert (found[5].predict(features[1000:])[0] == expected).float().mean() >= 0.9
    scores = [(found[at].predict(features[1000:])[0] == labels[1000:]).float().mean() for at in (4, 5, 6)]
    assert abs(scores[1] - (expected == labels[1000:]).float().mean()) <= 0.02
    assert max(scores) - min(scores) <= 0.03


def test_a_class_without_samples_and_constant_features():
    features, labels = overlapping(400, 6, 3, 1.0)
    features[:, 2] = 7.0
    solution = LogisticProblem(features, labels, 5).fit(COSTS)
    assert torch.isfinite(solution.weight).all()
    assert set(solution.predict(features).unique().tolist()) <= {0, 1, 2}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="3 features and 2 labels"):
        LogisticProblem(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), 2)
