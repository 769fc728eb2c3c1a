"""Frozen launch configurations, one table; measured tuning only when asked for.

The table says for each architecture how large the tiles of the contrastive kernels are. Its entries come from offline
compiles (``python -m meru_fast.kernels.resources``): no spills, an asynchronous pipeline, and two programs on an SM where
that is possible, so that one multiplies while the other takes logarithms. ``MERU_FAST_AUTOTUNE=1`` times the candidates
on the device at the first call of each shape instead and keeps the fastest for the life of the process.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

AUTOTUNE = os.environ.get("MERU_FAST_AUTOTUNE") == "1"


@dataclass(frozen=True)
class Tiles:
    """Launch configuration of a kernel that walks tiles of logits.

    Attributes:
        rows, cols: logits of a tile; divisors of 128.
        inner: components of a step of the matrix product; a divisor of 64.
        warps, stages: of a program; depth of its pipeline.
        tma: load tiles through tensor descriptors (sm_90 and later) instead of pointers.
        per_sm: programs that share an SM.
    """

    rows: int = 128
    cols: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 3
    tma: bool = True
    per_sm: int = 2


# (kernel, compute capability major) -> configuration. D does not matter to the footprint: the product walks it in steps.
TABLE: dict[tuple[str, int], Tiles] = {
    ("forward", 8): Tiles(rows=64, cols=128, inner=64, warps=4, stages=3, tma=False, per_sm=2),
    ("weights", 8): Tiles(rows=64, cols=64, inner=64, warps=4, stages=3, tma=False, per_sm=2),
    ("forward", 9): Tiles(),
    ("weights", 9): Tiles(),
    ("forward", 10): Tiles(),
    ("weights", 10): Tiles(),
}
CANDIDATES: dict[int, tuple[Tiles, ...]] = {
    8: (Tiles(64, 128, 64, 4, 3, False), Tiles(64, 64, 64, 4, 3, False), Tiles(128, 64, 64, 4, 3, False)),
    9: (Tiles(), Tiles(128, 64, 64, 4, 4, per_sm=3), Tiles(128, 128, 64, 8, 4, per_sm=1)),
    10: (Tiles(), Tiles(128, 64, 64, 4, 4, per_sm=3), Tiles(128, 128, 64, 8, 4, per_sm=1)),
}
INTERPRETER = Tiles(rows=64, cols=64, inner=64, warps=4, stages=1, tma=False, per_sm=1)


def tiles_for(kernel: str, device: torch.device) -> Tiles:
    """The frozen configuration of ``"forward"`` or ``"weights"`` on a device."""
    if device.type != "cuda":
        return INTERPRETER
    major = torch.cuda.get_device_capability(device)[0]
    return TABLE[kernel, major if (kernel, major) in TABLE else 8]  # sm_120 has the shared memory of sm_80


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 in the interpreter, so that work is split there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
