"""Multinomial logistic regression for many costs at once, by batched L-BFGS on CPU or GPU.

The objective is that of ``sklearn.linear_model.LogisticRegression(C)``: for weights W [K, D] and intercepts b [K],

    mean over samples of cross_entropy(W x + b, y)  +  |W|^2 / (2 C N)

With two classes scikit-learn penalises the one difference w = W_1 - W_0 instead; as W_1 = -W_0 there, |w|^2 = 2 |W|^2.
It is strictly convex in W, so both find the same solution. Three things make it fast here:

* all costs share one pass over the features: their weights are stacked, so that a step is one large matrix product;
* features are centred (the intercept absorbs that) and rotated to their principal axes (a rotation leaves |W| as it
  is). There the Hessian at W = 0, covariance / K plus the penalty, is diagonal and preconditions L-BFGS;
* a cost whose gradient is small enough leaves the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 10
ARMIJO = 1e-4
MAX_HALVINGS = 20
SEPARATED = 0.01  # cross entropy (nats) of a training set that the weights tell apart
BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}  # of logits in one block of samples: the cache, or some memory


@dataclass(frozen=True)
class Solution:
    """Fitted weights for S costs.

    Attributes:
        weight: [S, K, D].
        bias: [S, K].
        iterations: [S], of L-BFGS.
        converged: [S], False where the iterations ran out.
    """

    weight: Tensor
    bias: Tensor
    iterations: Tensor
    converged: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Classes [S, N] of features [N, D]."""
        return torch.stack([(features @ w.T + b).argmax(dim=1) for w, b in zip(self.weight, self.bias, strict=True)])

    def __getitem__(self, index: int) -> "Solution":
        """The solution of one cost, as a batch of one."""
        return Solution(*(value[index : index + 1] for value in vars(self).values()))


class LogisticProblem:
    """A training set, prepared once for any number of fits.

    Args:
        features: [N, D] float32 or float64; decides device and precision.
        labels: [N] int64 in [0, num_classes).
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int):
        if len(features) != len(labels) or len(features) == 0:
            raise ValueError(f"{len(features)} features and {len(labels)} labels: expected as many, and at least one")
        self.labels = labels
        self.num_classes = num_classes
        self.mean = features.double().mean(dim=0)
        centred = features - self.mean.to(features.dtype)
        spectrum, axes = torch.linalg.eigh((centred.T @ centred).double() / len(features))
        self.axes = axes
        ones = features.new_ones(len(features), 1)
        self.inputs = torch.cat([centred @ axes.to(features.dtype), ones], dim=1)  # [N, D + 1], the intercept last
        self.spectrum = torch.cat([spectrum.clamp(min=0), spectrum.new_ones(1)]).to(features.dtype)

    def fit(
        self, costs: Sequence[float], max_iterations: int = 1000, tolerance: float = 3e-6, start: Solution | None = None
    ) -> Solution:
        """Solve for all costs together.

        Args:
            costs: C of scikit-learn, inverse strength of the penalty.
            tolerance: on the norm of every class's gradient: stricter than scikit-learn, which asks 1e-4 of its largest
                entry, so that labels are those of the exact solution.
            start: the solution of one cost to start from; the default is zero weights.
        """
        penalty = 1 / (self.inputs.new_tensor(list(costs)) * len(self.inputs))  # [S]
        if self.num_classes == 2:
            penalty *= 2
        curvature = self.spectrum / self.num_classes  # Hessian of the cross entropy at 0, [D + 1]
        initial = self._rotated(start)
        found = self._solve(penalty, curvature, initial, max_iterations, tolerance)
        pull = penalty * found.parameters[..., :-1].norm(dim=2).amax(dim=1)
        open_ = (found.value < SEPARATED) & (pull <= tolerance)
        if open_.any():
            # The classes are separated and the penalty is too weak to be seen: any separation passes, and the
            # preconditioner leads to one that ignores the penalty. Plain steps from the nearest solution that the
            # penalty does decide stay near the minimum: their limit is the widest margin, as that of weak penalties.
            if (~open_).any():
                initial = found.parameters[torch.where(open_, -torch.inf, -penalty.log()).argmax()]
            plain = curvature.amax().expand_as(curvature)
            found.replace(open_, self._solve(penalty[open_], plain, initial, max_iterations, tolerance))
        weight = found.parameters[..., :-1].double() @ self.axes.T
        bias = found.parameters[..., -1].double() - weight @ self.mean
        dtype = self.inputs.dtype
        return Solution(weight.to(dtype), bias.to(dtype), found.iterations, found.converged)

    def _solve(
        self, penalty: Tensor, curvature: Tensor, initial: Tensor, max_iterations: int, tolerance: float
    ) -> "_LBFGS":
        """Minimise for penalties [S], from `initial` [K, D + 1], with the preconditioner `curvature` [D + 1]."""
        state = _LBFGS(
            lambda theta, chosen: self._objective(theta, penalty[chosen]),
            curvature + penalty[:, None] * self._penalised(),
            initial.expand(len(penalty), -1, -1).clone(),
        )
        state.run(max_iterations, tolerance)
        return state

    def _rotated(self, start: Solution | None) -> Tensor:
        """The parameters [K, D + 1] to start from: zeros, or a solution in the coordinates of `inputs`."""
        if start is None:
            return self.inputs.new_zeros(self.num_classes, self.inputs.shape[1])
        weight, bias = start.weight[0].double(), start.bias[0].double()
        rotated = torch.cat([weight @ self.axes, (bias + weight @ self.mean)[:, None]], dim=1)
        return rotated.to(self.inputs.dtype)

    def _penalised(self) -> Tensor:
        """1 for every input but the intercept."""
        mask = torch.ones_like(self.spectrum)
        mask[-1] = 0
        return mask

    def _objective(self, theta: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Values [S] (float64) and gradients [S, K, D + 1] at parameters [S, K, D + 1]."""
        count, classes, _ = theta.shape
        flat = theta.flatten(0, 1)
        gradient = torch.zeros_like(flat)
        value = torch.zeros(count, dtype=torch.float64, device=theta.device)
        rows = max(1, BLOCK_BYTES[theta.device.type] // (flat.shape[0] * theta.element_size()))
        for inputs, labels in zip(self.inputs.split(rows), self.labels.split(rows), strict=True):
            logits = (inputs @ flat.T).view(-1, count, classes)
            picked = labels[:, None, None].expand(-1, count, 1)
            peak = logits.amax(dim=-1, keepdim=True)
            logits -= peak
            value -= logits.gather(2, picked).sum(dim=(0, 2), dtype=torch.float64)
            total = logits.exp_().sum(dim=-1, keepdim=True)
            value += total.log().sum(dim=(0, 2), dtype=torch.float64)
            logits /= total
            logits.scatter_add_(2, picked, logits.new_full((), -1.0).expand(picked.shape))
            gradient.addmm_(logits.flatten(1).T, inputs)
        penalised = theta * self._penalised()
        value = value / len(self.inputs) + 0.5 * penalty * penalised.square().sum(dim=(1, 2), dtype=torch.float64)
        return value, gradient.view_as(theta) / len(self.inputs) + penalty[:, None, None] * penalised


class _LBFGS:
    """L-BFGS on S independent problems in lockstep; problems that are done leave."""

    def __init__(
        self, objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], curvature: Tensor, parameters: Tensor
    ):
        self.objective = objective
        self.curvature = curvature  # diagonal of the initial Hessian, [S, D + 1]
        self.parameters = parameters  # [S, K, D + 1]
        count = len(parameters)
        self.iterations = torch.zeros(count, dtype=torch.long, device=parameters.device)
        self.converged = torch.zeros(count, dtype=torch.bool, device=parameters.device)
        self.value = torch.zeros(count, dtype=torch.float64, device=parameters.device)

    def run(self, max_iterations: int, tolerance: float) -> None:
        active = torch.arange(len(self.parameters), device=self.parameters.device)
        theta = self.parameters
        value, gradient = self.objective(theta, active)
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        for iteration in range(max_iterations + 1):
            done = gradient.norm(dim=2).amax(dim=1) <= tolerance
            if iteration == max_iterations:
                self._leave(active, theta, value, iteration, done)
                return
            if done.any():
                self._leave(active[done], theta[done], value[done], iteration, done[done])
                keep = ~done
                active, theta, value, gradient = active[keep], theta[keep], value[keep], gradient[keep]
                history = [(step[keep], change[keep], rho[keep]) for step, change, rho in history]
            if len(active) == 0:
                return
            direction = -self._precondition(gradient, history, self.curvature[active])
            new_theta, new_value, new_gradient, moved = self._search(active, theta, value, gradient, direction)
            step, change = new_theta - theta, new_gradient - gradient
            inner = (step * change).sum(dim=(1, 2))
            rho = torch.where(inner > 0, 1 / inner, 0)  # a pair without curvature counts for nothing
            history = [*history[-HISTORY + 1 :], (step, change, rho)]
            theta, value, gradient = new_theta, new_value, new_gradient
            if not moved.all():  # no descent within rounding: as good as it gets in this precision
                stuck = ~moved
                self._leave(active[stuck], theta[stuck], value[stuck], iteration + 1, stuck[stuck])
                active, theta, value, gradient = active[moved], theta[moved], value[moved], gradient[moved]
                history = [(step[moved], change[moved], rho[moved]) for step, change, rho in history]

    def _leave(self, which: Tensor, theta: Tensor, value: Tensor, iteration: int, converged: Tensor) -> None:
        self.parameters[which] = theta
        self.value[which] = value
        self.iterations[which] = iteration
        self.converged[which] = converged

    def replace(self, which: Tensor, other: "_LBFGS") -> None:
        """Take the problems `which` (a mask) from `other`; iterations add up."""
        self.parameters[which] = other.parameters
        self.value[which] = other.value
        self.iterations[which] += other.iterations
        self.converged[which] = other.converged

    @staticmethod
    def _precondition(gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], curvature: Tensor) -> Tensor:
        """The inverse Hessian of the history times the gradient (two-loop recursion)."""
        result = gradient.clone()
        weights = []
        for step, change, rho in reversed(history):
            weight = rho * (step * result).sum(dim=(1, 2))
            result -= weight[:, None, None] * change
            weights.append(weight)
        result /= curvature[:, None]
        if history:
            _, change, rho = history[-1]
            scale = rho * (change.square() / curvature[:, None]).sum(dim=(1, 2))
            result /= torch.where(scale > 0, scale, 1)[:, None, None]
        for (step, change, rho), weight in zip(history, reversed(weights), strict=True):
            back = rho * (change * result).sum(dim=(1, 2))
            result += (weight - back)[:, None, None] * step
        return result

    def _search(
        self, active: Tensor, theta: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step along `direction` until the value falls enough (Armijo), halving from 1, which nearly always does."""
        slope = (gradient * direction).sum(dim=(1, 2), dtype=torch.float64)
        length = torch.ones_like(value)
        rounding = torch.finfo(theta.dtype).eps
        best, best_value, best_gradient = theta.clone(), value.clone(), gradient.clone()
        open_ = torch.arange(len(theta), device=theta.device)
        for _ in range(MAX_HALVINGS):
            trial = theta[open_] + length[open_].to(theta.dtype)[:, None, None] * direction[open_]
            trial_value, trial_gradient = self.objective(trial, active[open_])
            fine = trial_value <= value[open_] + ARMIJO * length[open_] * slope[open_]
            # Near the optimum the fall drowns in rounding; then the slope decides (Hager and Zhang's approximate rule).
            flatter = (trial_gradient * direction[open_]).sum(dim=(1, 2), dtype=torch.float64) <= -0.8 * slope[open_]
            fine |= flatter & (trial_value <= value[open_] + rounding * value[open_].abs())
            best[open_[fine]], best_value[open_[fine]] = trial[fine], trial_value[fine]
            best_gradient[open_[fine]] = trial_gradient[fine]
            open_ = open_[~fine]
            if len(open_) == 0:
                break
            length[open_] /= 2
        moved = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
        moved[open_] = False
        return best, best_value, best_gradient, moved
