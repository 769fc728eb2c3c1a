"""One optimiser step: DeepSpeed around the model, the whole batch under accumulation, the finite-value guard.

Everything that touches the inside of DeepSpeed is in this file.
"""

import datetime
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meru_fast.distributed import get_rank, get_world_size
from meru_fast.tokenizer import PackedTokens
from meru_fast.training.deepspeed_config import offloads, precision, zero_stage

log = logging.getLogger(__name__)

#: What the guard looks at, in the order of ``StepResult.finite``.
GUARDED = ("loss", "image features", "text features")


@dataclass
class StepResult:
    """What one step did. Tensors stay on the device, so that reading them is the reader's decision."""

    loss: Tensor
    logging: dict[str, Tensor]
    #: Float [3], 1 where all ranks' values of ``GUARDED`` were finite.
    finite: Tensor
    #: Global L2 norm before clipping, 0-dim; not finite if the step was discarded.
    grad_norm: Tensor
    #: False if the optimiser was not run: something was not finite on some rank. The same on all ranks.
    applied: bool
    seconds: dict[str, float] = field(default_factory=dict)


def init_distributed(on_gpu: bool, timeout_seconds: float) -> None:
    """Process group for DeepSpeed from the usual environment variables; gloo on a CPU."""
    import deepspeed

    deepspeed.logger.setLevel(logging.WARNING)
    if not on_gpu:
        # An optional shared-memory collective: its build takes half a minute and a compiler, its results are the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )


class Engine:
    """A model under DeepSpeed.

    Args:
        model: CLIP, MERU or a model with their interface, on its device.
        optimizer: over the model's trainable parameters; left to DeepSpeed if the JSON has an "optimizer" block.
        scheduler: makes the schedule of an optimiser (which need not be `optimizer`), to be stepped once per optimiser
            step; left to DeepSpeed if the JSON has a "scheduler" block.
        config: what ``deepspeed_config.resolve`` returned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Callable[[torch.optim.Optimizer], Any],
        config: dict[str, Any],
    ):
        import deepspeed
        from deepspeed.checkpoint.constants import (
            UNIVERSAL_CHECKPOINT_INFO,
            UNIVERSAL_CHECKPOINT_VERSION_KEY,
            UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        )

        self.model: Any = model
        self.config = config
        self.stage = zero_stage(config)
        self.precision = precision(config)
        self.accumulation = config["gradient_accumulation_steps"]
        # Without it a ZeRO checkpoint cannot be converted for another number of processes.
        setattr(
            model, UNIVERSAL_CHECKPOINT_INFO, {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        )
        # ZeRO stage 3 fetches parameters in hooks around the root module's forward, and releases them after it.
        # So every part of a step has to run inside one: self.deepspeed(part, *inputs).
        model.forward = lambda part, *inputs: part(*inputs)
        own_optimizer = None if "optimizer" in config else _host_optimizer(optimizer, config)
        self.deepspeed, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=model,
            model_parameters=optimizer.param_groups if own_optimizer is None else None,
            optimizer=own_optimizer,
            lr_scheduler=None if "scheduler" in config else scheduler,
            config=config,
        )
        if self.stage == 0 and get_world_size() == 1:
            # Alone, DeepSpeed still copies all gradients into one buffer and back.
            self.deepspeed.enable_backward_allreduce = False
        _zero_padding(self.model)
        self.clamp_scalars()

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    @property
    def learning_rate(self) -> float:
        return float(self.param_groups[0]["lr"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimiser that DeepSpeed wraps (its hyper-parameters; stage 3 keeps the parameters elsewhere)."""
        return self.deepspeed.optimizer.param_groups

    def optimizer_state(self) -> dict[Tensor, dict[str, Any]]:
        """State of the optimiser that DeepSpeed wraps, by (flat) parameter of this rank."""
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer).state

    @property
    def skipped_steps(self) -> int:
        return self.deepspeed.skipped_steps

    def step(self, images: Tensor, tokens: PackedTokens) -> StepResult:
        """Forward, backward, update, on this rank's share of the batch.

        Args:
            images: [b, 3, H, W] uint8, or float in [0, 1], on the device.
            tokens: the b captions.

        Returns:
            The loss of the *whole* batch over all ranks and micro-batches. If the loss or an embedding is not finite
            anywhere, the gradients of all ranks become NaN, so that all of them discard the step together, by the very
            check DeepSpeed makes on the gradient norm before an update; weights and optimiser stay untouched.
        """
        output, finite = self.backward(images, tokens)
        norm, applied = self.update()
        return StepResult(output["loss"].detach(), output["logging"], finite, norm, applied)

    def backward(self, images: Tensor, tokens: PackedTokens) -> tuple[dict[str, Any], Tensor]:
        """Gradients of the whole batch's loss, averaged over ranks; returns the model's output and the finite flags."""
        self.model.train()
        if self.accumulation > 1:
            return self._accumulated_backward(images, tokens)
        output, features = self.deepspeed(self._whole, images, tokens)
        finite = _all_finite(output["loss"], *features)
        self.deepspeed.backward(output["loss"] * _poison(finite))
        return output, finite

    def _accumulated_backward(self, images: Tensor, tokens: PackedTokens) -> tuple[dict[str, Any], Tensor]:
        """The gradient of the full batch with the activations of one micro-batch (the cache of GradCache).

        First all features without a graph, then the loss and its gradient at the features, then each micro-batch once
        more with a graph, whose surrogate loss ``<features, cached gradient>`` has the gradient sought.
        Luyu Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021).
        """
        size = -(-len(images) // self.accumulation)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        random_states, cached = [], []
        with torch.no_grad():
            for part in parts:
                random_states.append(_random_state())
                cached.append(self.deepspeed(self._encode, images[part], tokens[part]))
            features = [torch.cat(side) for side in zip(*cached, strict=True)]
            output, finite, feature_gradients, scalar_gradients = self.deepspeed(self._cached_gradients, *features)
        after = _random_state()
        for index, part in enumerate(parts):
            _set_random_state(random_states[index])
            last = index == len(parts) - 1
            # Every backward pass reaches every parameter; the scalars' gradient counts in the last one only.
            scalars = scalar_gradients if last else [torch.zeros_like(g) for g in scalar_gradients]
            gradients = [g[part] for g in feature_gradients]
            surrogate = self.deepspeed(self._surrogate, images[part], tokens[part], gradients, scalars)
            self.deepspeed.backward(surrogate * _poison(finite), scale_wrt_gas=False)
            if not last:
                self.deepspeed.step()  # counts the micro-batch, updates nothing
        _set_random_state(after)
        return output, finite

    def _encode(self, images: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        return self.model.encode_image(images, project=False), self.model.encode_text(tokens, project=False)

    def _whole(self, images: Tensor, tokens: PackedTokens) -> tuple[dict[str, Any], list[Tensor]]:
        features = self._encode(images, tokens)
        return self.model.loss(*features), [x.detach() for x in features]

    def _cached_gradients(self, *features: Tensor) -> tuple[dict[str, Any], Tensor, list[Tensor], list[Tensor]]:
        """Loss of the whole batch, finite flags, and the loss's gradients at the features and the scalars."""
        scalars = self._scalars()
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in features]
            output = self.model.loss(*leaves)
            finite = _all_finite(output["loss"], *leaves)
            gradients = torch.autograd.grad(output["loss"], [*leaves, *scalars], materialize_grads=True)
        output["loss"] = output["loss"].detach()
        return output, finite, list(gradients[: len(leaves)]), list(gradients[len(leaves) :])

    def _surrogate(
        self, images: Tensor, tokens: PackedTokens, feature_gradients: list[Tensor], scalar_gradients: list[Tensor]
    ) -> Tensor:
        """A loss whose gradient at the towers is what the cached gradients at their features imply."""
        left = [*(x.float() for x in self._encode(images, tokens)), *self._scalars()]
        right = [*feature_gradients, *scalar_gradients]
        return torch.stack([(x * g).sum() for x, g in zip(left, right, strict=True)]).sum()

    def _scalars(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters(recurse=False) if p.requires_grad]

    def update(self) -> tuple[Tensor, bool]:
        """Run the optimiser unless the gradient is not finite; returns (gradient norm, whether it ran).

        Whether to run it is the one thing of a step that the host waits for.
        """
        norm, applied = self._update()
        if applied:
            self.clamp_scalars()
        return norm, applied

    def _update(self) -> tuple[Tensor, bool]:
        if hasattr(self.deepspeed.optimizer, "overflow"):  # ZeRO and fp16 optimisers check for themselves
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()
            return torch.as_tensor(norm if norm is not None else torch.nan), self.deepspeed.was_step_applied()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            self.deepspeed.step()
            return norm, True
        # What DeepSpeed's other optimisers do with such a step.
        self.deepspeed.zero_grad()
        self.deepspeed.micro_steps += 1
        self.deepspeed.global_steps += 1
        self.deepspeed.skipped_steps += 1
        return norm, False

    @torch.no_grad()
    def clamp_scalars(self) -> None:
        """The model's bounds on its learnable scalars, on its parameters and on the copies that ZeRO updates.

        Without the latter an optimiser's copy would wander beyond the bound, and take as long to come back.
        """
        for name, (low, high) in getattr(self.model, "scalar_bounds", {}).items():
            parameter = getattr(self.model, name)
            for tensor in (parameter.data, *_zero_copies(parameter)):
                tensor.clamp_(low, high)

    def scalars_at_bound(self, tolerance: float = 1e-3) -> dict[str, float]:
        """Learnable scalars (logarithms) that sit on a finite bound, with that bound. Waits for the device."""
        found = {}
        for name, bounds in getattr(self.model, "scalar_bounds", {}).items():
            parameter = getattr(self.model, name)
            if not parameter.requires_grad or parameter.numel() != 1:
                continue
            for bound in bounds:
                if abs(float(parameter.detach()) - bound) < tolerance:
                    found[name] = bound
        return found

    def full_gradients(self) -> dict[str, Tensor]:
        """Gradient of every trainable parameter, gathered from all ranks; for the time between backward and update."""
        from deepspeed.utils import safe_get_full_grad

        gradients = {name: safe_get_full_grad(p) for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: gradient.detach().clone().float() for name, gradient in gradients.items() if gradient is not None}

    def full_parameters(self) -> dict[str, Tensor]:
        """fp32 weights, gathered from all ranks and cloned; every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self.model.named_parameters():
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad and self.stage else None
            if full is None:
                full = _gathered(parameter)
            found[name] = full.detach().clone().float().reshape(getattr(parameter, "ds_shape", parameter.shape))
        return found

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.model.named_parameters()}

    def readable_scalars(self) -> AbstractContextManager:
        """While the model's methods are called directly. ZeRO 3 fetches what lies in child modules by itself, but the
        scalars of the model itself only around its forward."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters(recurse=False)))

    def save_through(self, writer: Any) -> None:
        """Let DeepSpeed save through `writer`, a checkpoint engine that keeps its failures in ``error``.

        So it does with those of the scripts that DeepSpeed copies into a checkpoint by itself: raised on one rank, they
        would leave the others waiting.
        """
        copy_scripts = self.deepspeed._copy_recovery_script

        def copy_if_possible(folder: str) -> None:
            try:
                copy_scripts(folder)
            except OSError as error:
                writer.error = writer.error or str(error)

        self.deepspeed.checkpoint_engine = writer
        self.deepspeed._copy_recovery_script = copy_if_possible

    @contextmanager
    def loading_universal(self) -> Iterator[None]:
        """While ``load_checkpoint`` of DeepSpeed gets a universal checkpoint."""
        with _empty_fragments(self.deepspeed.optimizer):
            self.deepspeed._config.load_universal_checkpoint = True
            try:
                yield
            finally:
                self.deepspeed._config.load_universal_checkpoint = False

    def close(self) -> None:
        self.deepspeed.destroy()


def _gathered(parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _host_optimizer(optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's vectorised AdamW where the states live in host memory of a GPU machine (built on first use)."""
    if not (offloads(config, "optimizer") and torch.cuda.is_available() and isinstance(optimizer, torch.optim.AdamW)):
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(optimizer.param_groups, **{key: optimizer.defaults[key] for key in ("lr", "betas", "eps")})


def _zero_copies(parameter: Any) -> Sequence[Tensor]:
    """This rank's copies of `parameter` beside the one in the model."""
    if hasattr(parameter, "ds_id"):  # stage 3: the partition and its fp32 master
        if not parameter.requires_grad:
            return [parameter.ds_tensor.data]
        master, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
        return [parameter.ds_tensor.data, master]
    mapping = getattr(parameter, "_hp_mapping", None)  # stages 1 and 2: on the rank that updates it
    return [mapping.get_hp_fragment()] if mapping is not None else []


@contextmanager
def _empty_fragments(optimizer: Any) -> Iterator[None]:
    """ZeRO 1 and 2: a fragment of no elements for each group of which this rank holds nothing but padding.

    Of four scalars shared by three ranks the last one has none; DeepSpeed takes the group's step counter from the first
    parameter with a fragment, and fails where there is none (0.19.8, load_hp_checkpoint_state_from_checkpoint_dir).
    """
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    helped = []
    for index, group in enumerate(getattr(optimizer, "bit16_groups", [])):
        if all(parameter._hp_mapping is None for parameter in group):
            nothing, nowhere = optimizer.single_partition_of_fp32_groups[index][:0], fragment_address(0, 0)
            group[0]._hp_mapping = tensor_fragment(nothing, nowhere, nothing, nowhere, {}, {}, False, index)
            helped.append(group[0])
    try:
        yield
    finally:
        for parameter in helped:
            parameter._hp_mapping = None


@torch.no_grad()
def _zero_padding(model: nn.Module) -> None:
    """ZeRO 3 leaves the elements beyond a parameter's end, in the last rank's partition, to whatever memory held."""
    parameter: Any
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            real = parameter.ds_numel - get_rank() * parameter.partition_numel()
            for tensor in _zero_copies(parameter):
                tensor[max(real, 0) :].zero_()


def _all_finite(*tensors: Tensor) -> Tensor:
    """Float [len(tensors)]: 1 where the tensor is finite on every rank."""
    flags = torch.stack([torch.isfinite(x.detach()).all() for x in tensors]).float()
    if get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    return flags


def _poison(finite: Tensor) -> Tensor:
    """1, or NaN if any flag is 0: a factor, so that the host need not look."""
    return torch.where(finite.min() > 0, 1.0, float("nan"))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
