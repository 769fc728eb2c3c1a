"""Frozen launch configurations in one table; measured tuning only when asked for.

The entries come from offline compiles (``python -m meru_fast.kernels.resources``): nothing spills, the pipeline is
asynchronous, and where registers allow two programs share an SM, so that one multiplies while the other takes
logarithms. With ``MERU_FAST_AUTOTUNE=1`` the first call of each shape times the candidates on the device instead and
the fastest stays for the life of the process.
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
        warps, stages: of a program, and of its pipeline.
        tma: load tiles through tensor descriptors (sm_90 and later) instead of pointers.
        per_sm: programs that share an SM.
        halves: 2 to work through the columns of a finished tile in two halves, which takes fewer registers.
    """

    rows: int = 128
    cols: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 3
    tma: bool = True
    per_sm: int = 2
    halves: int = 1


# (kernel, compute capability) -> configurations, the default first, then the candidates of the tuner. D does not
# change the footprint: the product walks it in steps. The dtype changes only the number of steps.
TABLE: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("forward", 8): (
        Tiles(128, 64, 64, 4, 3, tma=False),
        Tiles(64, 64, 64, 4, 4, tma=False, per_sm=3),
        Tiles(128, 128, 32, 8, 4, tma=False, per_sm=1),
    ),
    ("weights", 8): (Tiles(64, 32, 64, 4, 3, tma=False), Tiles(64, 64, 64, 4, 3, tma=False)),
    ("forward", 9): (
        Tiles(),
        Tiles(128, 64, 64, 4, 4, per_sm=3),
        Tiles(128, 128, 64, 8, 4, per_sm=1),
    ),
    # with given pairs 128 x 128 needs 164 registers in cosine geometry: one program
    ("forward_cosine", 8): (Tiles(128, 64, 64, 4, 3, tma=False), Tiles(128, 128, 32, 8, 4, tma=False, per_sm=1)),
    ("forward_cosine", 9): (Tiles(128, 64, 64, 4, 3, per_sm=3), Tiles(per_sm=1)),
    ("forward_cosine", 10): (Tiles(128, 64, 64, 4, 4), Tiles(per_sm=1)),
    ("weights", 9): (
        Tiles(64, 64, 64, 4, 3, halves=2),
        Tiles(128, 64, 64, 8, 3, per_sm=1, halves=2),
        Tiles(128, 128, 64, 8, 3, per_sm=1, halves=2),
    ),
    ("weights_highest", 8): (Tiles(64, 32, 64, 4, 3, tma=False, per_sm=3),),
    ("weights_highest", 9): (Tiles(64, 64, 64, 4, 3, halves=2), Tiles(128, 64, 64, 8, 3, per_sm=1, halves=2)),
    ("weights_highest", 10): (Tiles(128, 32, 64, 8, 4, per_sm=1), Tiles(128, 64, 64, 8, 4, per_sm=1)),
    ("forward", 10): (Tiles(128, 64, 64, 8, 4), Tiles(per_sm=1)),
    ("weights", 10): (Tiles(128, 32, 64, 8, 4, per_sm=1), Tiles(128, 64, 64, 8, 4, per_sm=1)),
}
INTERPRETER = Tiles(64, 64, 64, 4, 1, tma=False, per_sm=1, halves=2)
_tuned: dict[tuple, Tiles] = {}


def candidates(kernel: str, device: torch.device) -> tuple[Tiles, ...]:
    """Configurations of a kernel of ``TABLE`` for a device, the default first."""
    if device.type != "cuda":
        return (INTERPRETER,)
    major = torch.cuda.get_device_capability(device)[0]
    return TABLE[kernel, major if (kernel, major) in TABLE else 8]  # sm_120 has the shared memory of sm_80


def tiles_for(kernel: str, device: torch.device, key: tuple, run: Callable[[Tiles], object]) -> Tiles:
    """The configuration to launch with: the frozen default, or the fastest one when tuning is asked for.

    Args:
        kernel: its name in ``TABLE``.
        device: where it runs.
        key: what else the speed depends on (shape, operands).
        run: launches the kernel with a configuration; called for timing only, its results are overwritten.
    """
    options = candidates(kernel, device)
    if not AUTOTUNE or len(options) == 1 or torch.cuda.is_current_stream_capturing():
        return _tuned.get((kernel, device, key), options[0])
    if (kernel, device, key) not in _tuned:
        import triton.testing

        times = {
            tiles: triton.testing.do_bench(lambda tiles=tiles: run(tiles), return_mode="median") for tiles in options
        }
        _tuned[kernel, device, key] = min(times, key=times.get)
    return _tuned[kernel, device, key]


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 in the interpreter, so that work is split there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
