"""The ``train`` part of a config: every switch of the trainer, with its default. Light to import, so configs may."""

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

from meru_fast.config import ConfigError

POLICIES = ("raise", "skip", "rollback")
AMP_DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass
class TrainSettings:
    """Defaults are the published recipe where it has one."""

    seed: int = 0
    #: Image-text pairs per optimiser step, over all processes and accumulation steps: the contrastive batch.
    total_batch_size: int = 2048
    num_iterations: int = 120_000
    #: Mixed precision on a GPU: autocast with fp32 weights ("bfloat16"), or DeepSpeed's fp16 mode with a loss scaler
    #: ("float16"). A CPU trains in fp32.
    amp: bool = True
    amp_dtype: str = "bfloat16"
    #: Micro-batches per step. The loss still sees the whole batch (features are cached, towers run twice).
    accumulation_steps: int = 1
    #: Largest global gradient norm; 0 switches clipping off.
    gradient_clipping: float = 0.0
    #: ZeRO stage, where no DeepSpeed config says otherwise.
    zero_stage: int = 1
    #: torch.compile of the image tower (fixed shapes).
    compile: bool = False
    #: Decoding threads or processes of each rank's loader.
    num_workers: int = 4
    cudnn_benchmark: bool = True
    #: Only deterministic torch kernels (slower on a GPU; the CPU is deterministic as it is).
    deterministic: bool = False

    #: Weights to start from: anything `meru_fast.checkpoint.load_weights` reads.
    init_from: str | None = None
    #: Shell patterns over parameter names that stay as they are, such as "visual.*".
    freeze: list[str] = dataclasses.field(default_factory=list)
    #: Decay of an exponential moving average of the weights, saved beside them; 0 switches it off.
    ema_decay: float = 0.0

    log_period: int = 20
    #: Project name on Weights & Biases (needs the wandb package), or None.
    wandb: str | None = None

    #: A checkpoint every so many steps, and (where not 0) every so many minutes; one at the end always.
    checkpoint_period: int = 5000
    checkpoint_minutes: float = 0.0
    #: Newest checkpoints to keep; 0 keeps all.
    keep_checkpoints: int = 3
    #: Checkpoints at multiples of this step are never removed; 0 protects none.
    keep_period: int = 0
    #: Write checkpoints from a copy, while training goes on (costs that copy in host memory).
    checkpoint_async: bool = True

    #: On a loss, gradient or embedding that is not finite: stop ("raise"), pass over the batch ("skip"), or go back to
    #: the last checkpoint and pass over it ("rollback"). The latter two at most `nonfinite_budget` times.
    nonfinite: str = "raise"
    nonfinite_budget: int = 10
    #: Seconds without a finished step after which a process prints all its stacks and dies; 0 waits for ever.
    watchdog_seconds: float = 1800.0

    #: An evaluation config, run every `eval_period` steps on the model in training, and key=value changes to it.
    eval_config: str | None = None
    eval_overrides: list[str] = dataclasses.field(default_factory=list)
    eval_period: int = 0

    def __post_init__(self) -> None:
        for name in ("total_batch_size", "num_iterations", "accumulation_steps", "log_period", "checkpoint_period"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be at least 1")
        for name in (
            *("gradient_clipping", "num_workers", "checkpoint_minutes", "keep_checkpoints", "keep_period"),
            *("nonfinite_budget", "watchdog_seconds", "eval_period"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must not be negative")
        if self.amp_dtype not in AMP_DTYPES:
            raise ConfigError(f"train.amp_dtype={self.amp_dtype}: choose one of {', '.join(AMP_DTYPES)}")
        if self.nonfinite not in POLICIES:
            raise ConfigError(f"train.nonfinite={self.nonfinite}: choose one of {', '.join(POLICIES)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"train.zero_stage={self.zero_stage}: ZeRO has the stages 0, 1, 2 and 3")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay={self.ema_decay}: must be in [0, 1)")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError(f"train.wandb={self.wandb}: the wandb package is not installed (pip install wandb)")
        if self.eval_period and not self.eval_config:
            raise ConfigError(f"train.eval_period={self.eval_period}: train.eval_config names no evaluation config")

    @classmethod
    def from_config(cls, node: Mapping[str, Any]) -> "TrainSettings":
        """From ``config.train``. Raises ConfigError for a key that is none of the fields above."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in node:
            if key not in names:
                close = difflib.get_close_matches(str(key), names, n=1)
                raise ConfigError(
                    f"unknown config key train.{key}" + (f"; did you mean train.{close[0]}?" if close else "")
                )
        return cls(**node)


def train_settings(**values: Any) -> dict[str, Any]:
    """All fields as a dictionary, for a config file: ``train = train_settings(total_batch_size=256)``."""
    return dataclasses.asdict(TrainSettings.from_config(values))
