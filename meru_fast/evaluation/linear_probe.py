"""Linear probe: logistic regression on the features of the image encoder (MERU, arXiv 2304.09172, section 4.1).

The features are those before the projection layer, as they are (not normalised). The cost is found on the validation
part: a sweep over seven powers of 100, then four rounds that try a neighbour on either side, each time at half the
distance (in decades). The best cost is fitted again on training and validation part together: 16 fits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meru_fast.evaluation.evaluator import Evaluator
from meru_fast.evaluation.features import Labelled, cached, fingerprint, image_features
from meru_fast.evaluation.logistic import LogisticProblem, Solution
from meru_fast.evaluation.output import COST, slug
from meru_fast.evaluation.ranking import accuracies
from meru_fast.evaluation.sources import LabelledImages
from meru_fast.progress import progress_bar

if TYPE_CHECKING:
    from meru_fast.models import CLIP

COSTS = tuple(10.0**exponent for exponent in (-6, -4, -2, 0, 2, 4, 6))
FIRST_FACTOR = 10.0
ROUNDS = 4
FITS = len(COSTS) + 2 * ROUNDS + 1

Predict = Callable[[Tensor], Tensor]


@dataclass
class Fitted:
    """One solved cost: `predict` maps features [N, D] to ranked classes [N, k]; a next fit can start from `handle`."""

    predict: Predict
    handle: Any = None


class BatchedSolver:
    """Our L-BFGS: all costs of a round at once, on the device of the features."""

    name = "batched"
    search_tolerance = 1e-4  # scikit-learn's default, here of a norm and so a little tighter
    final_tolerance = 3e-6  # the solution, to one label in 1,000

    def __init__(self, train: Labelled, num_classes: int, max_iterations: int):
        self.problem = LogisticProblem(train.features, train.labels, num_classes)
        self.max_iterations = max_iterations

    def fit(self, costs: Sequence[float], start: Fitted | None = None, final: bool = False) -> list[Fitted]:
        tolerance = self.final_tolerance if final else self.search_tolerance
        solution = self.problem.fit(costs, self.max_iterations, tolerance, start=start.handle if start else None)
        return [self._fitted(solution[index]) for index in range(len(costs))]

    @staticmethod
    def _fitted(solution: Solution) -> Fitted:
        weight, bias = solution.weight[0], solution.bias[0]
        return Fitted(lambda features: ranked(torch.addmm(bias, features, weight.T)), solution)


class SklearnSolver:
    """The reference: scikit-learn's LogisticRegression, one cost after the other, on the CPU."""

    name = "sklearn"

    def __init__(self, train: Labelled, num_classes: int, max_iterations: int):
        self.features, self.labels = train.features.cpu().numpy(), train.labels.cpu().numpy()
        self.max_iterations = max_iterations

    def fit(self, costs: Sequence[float], start: Fitted | None = None, final: bool = False) -> list[Fitted]:
        return [self._fitted(cost) for cost in costs]

    def _fitted(self, cost: float) -> Fitted:
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol stops there, converged or not
            model = LogisticRegression(C=cost, max_iter=self.max_iterations, random_state=0)
            model.fit(self.features, self.labels)
        classes = torch.from_numpy(model.classes_)

        def predict(features: Tensor) -> Tensor:
            scores = torch.from_numpy(model.decision_function(features.cpu().numpy()))
            if scores.ndim == 1:  # two classes: one score, of the second
                scores = torch.stack([-scores, scores], dim=1)
            return classes[ranked(scores)].to(features.device)

        return Fitted(predict)


SOLVERS = {solver.name: solver for solver in (BatchedSolver, SklearnSolver)}


def ranked(scores: Tensor) -> Tensor:
    """The five best columns (or all, if fewer) of scores [N, K]."""
    return scores.topk(min(5, scores.shape[1]), dim=1).indices


def probe(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    num_classes: int,
    solver: str = "batched",
    max_iterations: int = 1000,
    advance: Callable[[int], None] = lambda fits: None,
) -> tuple[dict[str, float], float]:
    """Sweep the cost, refit, and score the test part.

    Args:
        solver: "batched" or "sklearn".
        advance: called with the number of fits that were just done, `FITS` in all.

    Returns:
        ``lp_acc1``, ``lp_acc5``, ``lp_mean_per_class_recall``, and the cost that was chosen.
    """
    on_train = SOLVERS[solver](train, num_classes, max_iterations)

    def quality(fitted: Fitted) -> float:
        return accuracies(fitted.predict(val.features), val.labels, num_classes)["mean_per_class_recall"]

    best_cost, best_quality, best = 0.0, -1.0, None

    def try_costs(costs: Sequence[float]) -> None:
        nonlocal best_cost, best_quality, best
        for cost, fitted in zip(costs, on_train.fit(costs, best), strict=True):
            reached = quality(fitted)
            if reached > best_quality:
                best_cost, best_quality, best = cost, reached, fitted
        advance(len(costs))

    try_costs(COSTS)
    factor = FIRST_FACTOR
    for _ in range(ROUNDS):
        try_costs([best_cost / factor, best_cost * factor])
        factor **= 0.5
    both = Labelled(torch.cat([train.features, val.features]), torch.cat([train.labels, val.labels]))
    final = SOLVERS[solver](both, num_classes, max_iterations).fit([best_cost], best, final=True)[0]
    advance(1)
    return accuracies(final.predict(test.features), test.labels, num_classes, prefix="lp_"), best_cost


class LinearProbe(Evaluator):
    """Linear probe on the training, validation and test parts of each dataset.

    Args:
        solver: "batched" (our L-BFGS, CPU or GPU) or "sklearn" (the published one, CPU).
        max_iterations: of each fit; 1000 as published.
        cache_dir: where features are kept, keyed by weights, dataset and pixels; None to keep none.
        **kwargs: the other arguments of ``Evaluator``.

    Raises:
        ValueError: no such solver, or no iterations. Others as ``Evaluator``.
    """

    task = "linear_probe"

    def __init__(
        self,
        datasets: Sequence[str | Mapping[str, Any]],
        solver: str = "batched",
        max_iterations: int = 1000,
        cache_dir: str | None = "output/features",
        **kwargs: Any,
    ):
        super().__init__(datasets, **kwargs)
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        self.solver = solver
        self.max_iterations = max_iterations
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None

    @property
    def settings(self) -> str:
        return f"{super().settings}, {self.solver}, {self.max_iterations} iterations"

    def evaluate(self, model: "CLIP", name: str) -> dict[str, float]:
        opened = {part: self.open_labelled(name, part) for part in ("train", "val", "test")}
        weights = fingerprint(model) if self.cache_dir else ""
        parts = {part: self._features(model, weights, dataset, part) for part, dataset in opened.items()}
        with progress_bar(f"{name}: probe", FITS, "fits") as advance:
            scores, cost = probe(
                **parts,
                num_classes=len(opened["test"].class_names),
                solver=self.solver,
                max_iterations=self.max_iterations,
                advance=advance,
            )
        return scores | {COST: cost}

    def _features(self, model: "CLIP", weights: str, dataset: LabelledImages, part: str) -> Labelled:
        transform = self.transform(model)
        # Number of samples and provenance tell apart two versions of a dataset under the same name.
        data = f"{dataset.name}_{part}_{len(dataset.samples)}_{transform!r}_{dataset.provenance}"
        path = self.cache_dir / weights / f"{slug(data)}.safetensors" if self.cache_dir else None
        title = f"{dataset.name}: {part}"
        found = cached(
            path, lambda: image_features(model, dataset.samples, transform, self.loading, title, project=False)
        )
        return Labelled(*(value.to(model.device) for value in found))
