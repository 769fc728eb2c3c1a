"""The training loop: data in, steps, metrics and checkpoints out."""

import fnmatch
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from meru_fast import config as configs
from meru_fast.checkpoint import load_weights
from meru_fast.config import ConfigError, instantiate
from meru_fast.distributed import barrier, get_rank, get_world_size, is_main_process
from meru_fast.training import deepspeed_config, report
from meru_fast.training.checkpoints import Checkpoints, find, rank_state, restore_rank_state
from meru_fast.training.ema import EMA_FILE, WeightAverage
from meru_fast.training.engine import Engine, StepResult, init_distributed
from meru_fast.training.guards import (
    EXIT_STOPPED,
    Agreement,
    Alarms,
    NonFiniteError,
    Requests,
    describe_fault,
    dump_fault,
    write_pid,
)
from meru_fast.training.metrics import Metrics, ProgressLine, close_logging, setup_logging
from meru_fast.training.settings import TrainSettings
from meru_fast.training.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(
    cfg: DictConfig,
    output_dir: str | os.PathLike,
    ds_config: Mapping[str, Any] | None = None,
    resume: str | None = None,
) -> int:
    """Train in this process, one of those that RANK and WORLD_SIZE in the environment tell of.

    Args:
        cfg: with `dataset`, `model`, `optim` and `train`, as ``meru_fast.config.load`` returns it.
        output_dir: run folder; see docs/training.md for what it will hold.
        ds_config: DeepSpeed JSON as a dictionary.
        resume: None, "latest", "auto" or the path of a checkpoint.

    Returns:
        Exit status: 0 after the last step, 143 if a signal asked to stop (everything is saved then).

    Raises:
        ConfigError: a config that cannot be trained. CheckpointError: nothing (good) to resume from.
        NonFiniteError: a value that is not finite, by the policy ``train.nonfinite``.
    """
    settings = TrainSettings.from_config(cfg.train)
    on_gpu = torch.cuda.is_available()
    resolved = deepspeed_config.resolve(
        dict(ds_config or {}), settings, int(os.environ["WORLD_SIZE"]), on_gpu, optim_values(cfg)
    )
    output_dir = Path(output_dir)
    try:
        setup_logging(output_dir, int(os.environ["RANK"]))
    except OSError as error:
        raise ConfigError(f"--output-dir {output_dir}: cannot be written to: {error}") from error
    try:
        device = prepare_process(settings, on_gpu)
        checkpoint = find(resume, output_dir)
        if is_main_process():
            configs.save(cfg, output_dir / "config.yaml")
            (output_dir / "environment.txt").write_text(report.environment(resolved), encoding="utf-8")
        run = Run(cfg, settings, resolved, output_dir, device)
        try:
            if checkpoint is not None:
                run.restore(checkpoint)
            status = run.train()
        finally:
            run.loader.close()
        run.engine.close()
        if get_world_size() > 1:  # alone, DeepSpeed's groups stay for the next run of this process
            dist.destroy_process_group()
        return status
    except Exception as error:
        log.debug("failed", exc_info=error)  # for the log file; the caller decides what the terminal sees
        raise
    finally:
        close_logging()


def optim_values(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of optimiser and schedule, for "auto" values in the DeepSpeed JSON."""
    values: dict[str, Any] = {}
    for node in (cfg.optim.get("lr_scheduler"), cfg.optim.optimizer):
        if node is not None:
            values |= {key: node[key] for key in node if not isinstance(node[key], DictConfig)}
    return values


def prepare_process(settings: TrainSettings, on_gpu: bool) -> torch.device:
    """Device, threads, seeds and process group."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not search, nor warn that it found none
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
        torch.set_float32_matmul_precision("high")
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))))
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this only
    torch.use_deterministic_algorithms(settings.deterministic)
    # A collective that waits longer than the watchdog would be ended by it anyway.
    init_distributed(on_gpu, timeout_seconds=max(2 * settings.watchdog_seconds, 1800.0))
    seed(settings.seed)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def build_model(cfg: DictConfig, settings: TrainSettings, device: torch.device) -> nn.Module:
    """The model on its device, with the weights to start from and the frozen parameters of the config."""
    model = instantiate(cfg.model)
    if settings.init_from:
        info = load_weights(model, settings.init_from)
        log.info("weights from %s (%s)", settings.init_from, info)
    freeze(model, settings.freeze)
    model.to(device)
    if settings.compile:
        model.visual.compile()
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Switch off the gradients of parameters whose names match. Raises ConfigError for a pattern without a match."""
    for pattern in patterns:
        matching = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(f"train.freeze: no parameter matches {pattern!r}")
        for parameter in matching:
            parameter.requires_grad_(False)


@dataclass
class Window:
    """Time and work since the last logged step."""

    started: float
    steps: int = 0
    waited: float = 0.0

    @classmethod
    def open(cls) -> "Window":
        return cls(time.perf_counter())


class Run:
    """Model, data and writers of one training run, and the state that a checkpoint holds."""

    def __init__(
        self,
        cfg: DictConfig,
        settings: TrainSettings,
        ds_config: dict[str, Any],
        output_dir: Path,
        device: torch.device,
    ):
        self.cfg, self.settings, self.output_dir = cfg, settings, output_dir
        model = build_model(cfg, settings, device)
        optimizer = instantiate(cfg.optim.optimizer, model=model)
        self.loader = instantiate(
            cfg.dataset,
            batch_size=settings.total_batch_size,
            rank=get_rank(),
            world_size=get_world_size(),
            num_workers=settings.num_workers,
            seed=settings.seed,
            device=device,
        )
        self.engine = Engine(
            model, optimizer, lambda basic: instantiate(cfg.optim.lr_scheduler, optimizer=basic), ds_config
        )
        seed(settings.seed + 1 + get_rank())  # all ranks built the same model; from here on each draws its own
        self.average = WeightAverage(self.engine, settings.ema_decay) if settings.ema_decay else None
        self.checkpoints = Checkpoints(
            self.engine, output_dir, settings.keep_checkpoints, settings.keep_period, settings.checkpoint_async
        )
        self.step = 0
        self.discarded = 0
        self.alarms = Alarms()
        self.requests = Requests()
        self.agreement = Agreement()
        self.evaluator: Any = None
        if settings.eval_period and settings.eval_config:
            self.evaluator = instantiate(configs.load(settings.eval_config, settings.eval_overrides).evaluator)

    # --- state -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"random": rank_state(), "loader": self.loader.state_dict(), "discarded": self.discarded}

    def save(self) -> None:
        self.checkpoints.save(self.step, self.state(), self._extra_files())

    def _extra_files(self) -> dict[str, Any]:
        files: dict[str, Any] = {"config.yaml": OmegaConf.to_yaml(self.cfg)}
        if self.average is not None:
            files[EMA_FILE] = self.average.state_dict()
        return files

    def restore(self, folder: Path, with_data: bool = True) -> None:
        """Go on from the checkpoint `folder`; without its data position after a rollback."""
        self.step, state, same_ranks = self.checkpoints.load(folder)
        if with_data:
            self.loader.load_state_dict(state["loader"])
            self.discarded = state["discarded"]
        if same_ranks:
            restore_rank_state(state["random"])
        else:
            seed(self.settings.seed + 1 + get_rank() + 1000 * self.step)
        if self.average is not None:
            self.average.load(folder)
        self.checkpoints.last_saved = self.step
        log.info(
            "resumed from %s at step %d%s", folder, self.step, "" if same_ranks else " (other number of processes)"
        )

    # --- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> int:
        """All steps that are left. Returns the exit status."""
        if is_main_process():
            self.metrics = Metrics(self.output_dir, self.step, self.settings.wandb, self.cfg)
            self.progress = ProgressLine(self.settings.num_iterations, self.step)
            log.info("%s", report.summary(self.cfg, self.engine, self.loader))
        stacks = self.output_dir / "logs" / f"stacks_rank{get_rank()}.txt"
        self.watchdog = Watchdog(self.settings.watchdog_seconds, stacks)
        try:
            with self.requests.listening(), self.watchdog:
                if is_main_process():
                    write_pid(self.output_dir)
                return self._steps()
        finally:
            if is_main_process():
                self.progress.close()
                self.metrics.close()

    def _steps(self) -> int:
        self.last_save = time.monotonic()
        self.window = Window.open()
        batches = iter(self.loader)
        stop = False
        while self.step < self.settings.num_iterations and not stop:
            batch = self._next(batches)
            rate = self.engine.learning_rate
            result = self._step(batch)
            if not result.applied and self._discarded_step(result, batch):
                batches = iter(self.loader)  # back at a checkpoint, on with other data
                continue
            if self._logs_now():
                self._log(result, rate, batch)
            if is_main_process():
                self.progress.step(self.step)
            if self.settings.eval_period and self.step % self.settings.eval_period == 0:
                self._evaluate()
            stop = self._save_if_asked()
        self._save_at_the_end()
        if stop and self.step < self.settings.num_iterations:
            log.info("asked to stop: step %d is saved, --resume goes on from it", self.step)
            return EXIT_STOPPED
        return 0

    def _next(self, batches: Iterator[Any]) -> Any:
        self.watchdog.beat(f"waiting for the data of step {self.step + 1}")
        asked = time.perf_counter()
        batch = next(batches)
        self.window.waited += time.perf_counter() - asked
        return batch

    def _step(self, batch: Any) -> StepResult:
        self.watchdog.beat(f"in step {self.step + 1}")
        if hasattr(self.engine.model, "set_progress"):  # schedules of the model, such as MERU's curvature
            self.engine.model.set_progress(self.step / self.settings.num_iterations)
        result = self.engine.step(batch.images, batch.tokens)
        self.step += 1
        self.window.steps += 1
        if result.applied and self.average is not None:
            self.average.update()
        return result

    def _save_if_asked(self) -> bool:
        """Publish what has been written, save what is due or asked for; returns whether to stop. All ranks agree."""
        stop, save, due, writing = self.agreement.any(
            self.requests.stop, self.requests.save, self._save_is_due(), not self.checkpoints.written
        )
        if self.checkpoints.pending is not None and not writing:
            self.checkpoints.publish()
        if save or due or self.step % self.settings.checkpoint_period == 0:
            self.requests.save = False
            self.last_save = time.monotonic()
            with self.watchdog.paused(f"saving step {self.step}"):
                self.save()
        return stop

    def _save_at_the_end(self) -> None:
        with self.watchdog.paused("saving at the end"):
            self.checkpoints.finish()
            if self.checkpoints.last_saved != self.step:
                self.save()
                self.checkpoints.finish()

    def _logs_now(self) -> bool:
        return self.step % self.settings.log_period == 0 or self.step in (1, self.settings.num_iterations)

    def _save_is_due(self) -> bool:
        minutes = self.settings.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self.last_save > 60 * minutes

    def _log(self, result: StepResult, rate: float, batch: Any) -> None:
        row = self._row(result, rate, batch)
        if is_main_process():
            self.metrics.log_step(row)
            self.progress.step(self.step)
            self.progress.show(row)
            min_radius = getattr(self.engine.model, "min_radius", 0.1)
            self.alarms.check(self.step, row, self.engine.scalars_at_bound(), min_radius)
        self.window = Window.open()

    def _row(self, result: StepResult, rate: float, batch: Any) -> dict[str, Any]:
        """A row of metrics.csv. The model's numbers are this step's, averaged over ranks; speeds since the last row."""
        names = list(result.logging)
        values = torch.stack([result.logging[name].float() for name in names])
        if get_world_size() > 1:
            dist.all_reduce(values)
            values = values / get_world_size()
        seconds = time.perf_counter() - self.window.started
        memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else report.resident_gb()
        return {
            "step": self.step,
            "loss": float(result.loss),
            **dict(zip(names, values.tolist(), strict=True)),
            "lr": rate,
            "grad_norm": float(result.grad_norm),
            "img_per_s": self.settings.total_batch_size * self.window.steps / seconds,
            "data_wait": self.window.waited / seconds,
            "step_seconds": seconds / self.window.steps,
            "memory_gb": memory,
            "epoch": batch.epoch,
            "bad_samples": self.loader.report()["bad"],
        }

    def _discarded_step(self, result: StepResult, batch: Any) -> bool:
        """A step that was not applied; returns whether the run went back to a checkpoint."""
        fault = describe_fault(result)
        scaling = self.engine.precision == "fp16" and bool(result.finite.min() > 0)
        if scaling:  # the loss scaler probing its limit, as fp16 always does
            return False
        path = dump_fault(self.output_dir / "faults", self.step, fault, result, batch.keys, batch.images, batch.tokens)
        self.discarded += 1
        message = f"step {self.step}: not finite: {fault}; the optimiser was not run; see {path}"
        policy, budget = self.settings.nonfinite, self.settings.nonfinite_budget
        if policy == "raise":
            barrier()  # every rank writes its dump before the first one ends the run
            raise NonFiniteError(message + " (train.nonfinite=skip or rollback would go on)")
        if self.discarded > budget:
            barrier()
            raise NonFiniteError(f"{message}; {self.discarded} such steps, train.nonfinite_budget={budget}")
        log.warning("%s (%d of %d allowed)", message, self.discarded, budget)
        if policy == "skip":
            return False
        self.checkpoints.finish()
        folder = find("auto", self.output_dir)
        if folder is None:
            raise NonFiniteError(message + "; train.nonfinite=rollback, but there is no checkpoint yet")
        self.restore(folder, with_data=False)
        if is_main_process():
            self.metrics.rewind(self.step)
        return True

    def _evaluate(self) -> None:
        """The config's evaluator on the model in training: by rank 0, or by all where each holds a part of it.

        A failing evaluation (a data set that is not there) costs its numbers, not the run.
        """
        before = rank_state()
        with self.watchdog.paused(f"evaluating at step {self.step}"):
            if self.engine.stage == 3 or is_main_process():
                results = self._results()
                if is_main_process() and results:
                    self.metrics.log_evaluation(self.step, results)
                    scores = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
                    log.info("step %d: %s", self.step, scores)
            barrier()
        restore_rank_state(before)
        self.window = Window.open()

    def _results(self) -> dict[str, float]:
        self.engine.model.eval()
        try:
            with torch.no_grad(), self.engine.readable_scalars():
                return self.evaluator(self.engine.model)
        except Exception as error:
            log.warning("the evaluation at step %d failed, training goes on: %s", self.step, error, exc_info=error)
            return {}
