"""Exponential moving average of the weights, in fp32, on rank 0."""

from pathlib import Path

import torch
from torch import Tensor

from meru_fast.distributed import is_main_process
from meru_fast.training.engine import Engine

EMA_FILE = "ema.pt"


class WeightAverage:
    """``average = decay * average + (1 - decay) * weights`` after every step, with a decay that grows into its value.

    Args:
        engine: whose model is averaged. Every rank makes one of these and calls it, since ZeRO stage 3 must gather the
            weights; only rank 0 keeps the average.
        decay: in (0, 1). Step n uses ``min(decay, (1 + n) / (10 + n))``, so that the start is forgotten soon.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self._start()

    def _start(self) -> None:
        self.updates = 0
        weights = self._weights()
        self.average = {name: value.clone() for name, value in weights.items()} if is_main_process() else {}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = self._weights()
        if is_main_process():
            for name, value in self.average.items():
                value.lerp_(weights[name].to(value), 1 - decay)

    def state_dict(self) -> dict:
        """For a checkpoint: ``{"model": a state dict that load_weights reads, "updates": n}``."""
        model = self.engine.model
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for name, value in self.average.items():
            state[name] = value.reshape(state[name].shape) if state[name].numel() == value.numel() else value
        return {"model": state, "updates": self.updates}

    def load(self, folder: Path) -> None:
        """From a checkpoint that has one; else the average starts from the weights now."""
        path = folder / EMA_FILE
        if not path.is_file():
            self._start()
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.updates = saved["updates"]
        for name, value in self.average.items():
            value.copy_(saved["model"][name].reshape(value.shape))

    def _weights(self) -> dict[str, Tensor]:
        if self.engine.stage == 3:
            return self.engine.full_parameters()
        return {name: value.detach().float() for name, value in self.engine.model.named_parameters()}
