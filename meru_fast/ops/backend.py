"""Which implementation an op runs: the Triton kernels or the PyTorch path.

``auto`` (default) takes Triton on GPUs wherever it runs and PyTorch elsewhere. A forced backend that cannot run is an
error, never a silent fallback. The choice is process-wide: ``set_backend``, ``use_backend`` or the environment variable
``MERU_FAST_BACKEND`` before the import.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = (8, 0)


class BackendError(RuntimeError):
    """The requested backend does not exist or cannot run on these tensors."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_requested: str = _checked(os.environ.get("MERU_FAST_BACKEND") or "auto", "environment variable MERU_FAST_BACKEND")


def set_backend(name: str) -> None:
    """Choose the backend of all ops of this process: "auto", "triton" or "torch".

    Raises:
        BackendError: unknown name, or "triton" where no tensor at all could run it.
    """
    global _requested
    _checked(name, "backend")
    if name == "triton" and (fault := _triton_fault("cuda")) and _triton_fault("cpu"):
        raise BackendError(f"backend 'triton' cannot run here: {fault}")
    _requested = name


def requested_backend() -> str:
    """The name last set, "auto" by default."""
    return _requested


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``set_backend`` for the duration of a ``with`` block.

    Raises:
        BackendError: as ``set_backend``.
    """
    before = requested_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def active_backend(*tensors: Tensor, max_width: int | None = None) -> str:
    """The backend an op takes for these tensors: "triton" or "torch".

    Args:
        tensors: the floating inputs of the op.
        max_width: longest last dimension the op's kernels handle, None for any.

    Raises:
        BackendError: Triton is forced and cannot run on these tensors; the message says why.
    """
    if _requested == "torch":
        return "torch"
    fault = _fault(tensors, max_width)
    if _requested == "triton":
        if fault:
            raise BackendError(f"backend 'triton' was requested but cannot run: {fault}")
        return "triton"
    return "triton" if not fault and tensors[0].is_cuda else "torch"


def backend_report() -> dict[str, str]:
    """For each device type, and for what was requested, a line saying which backend runs and why."""
    report = {"requested": _requested}
    for device in ("cuda", "cpu"):
        fault = _triton_fault(device)
        if _requested == "triton":
            report[device] = f"unavailable: {fault}" if fault else "triton: forced"
        elif _requested == "torch":
            report[device] = "torch: forced"
        elif device == "cpu" and not fault:
            report[device] = "torch: the interpreter runs only when backend 'triton' is forced"
        else:
            report[device] = f"torch: {fault}" if fault else "triton"
    return report


def _fault(tensors: tuple[Tensor, ...], max_width: int | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"the tensors are on different devices ({', '.join(sorted(map(str, devices)))})"
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the kernels take float32, float16 and bfloat16, not {tensor.dtype}"
        if max_width is not None and tensor.shape[-1] > max_width:
            return f"rows have {tensor.shape[-1]} components, the kernels take at most {max_width}"
    return _triton_fault(tensors[0].device.type)


def _triton_fault(device_type: str) -> str | None:
    """Why Triton cannot run on this kind of device, or None. A constant to torch.compile, which cannot see a cache."""
    return _look_for_fault(device_type)


@functools.cache
def _look_for_fault(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        if torch.cuda.get_device_capability() < MIN_CAPABILITY:
            return f"{torch.cuda.get_device_name()} is older than compute capability {MIN_CAPABILITY}"
        return None
    if device_type != "cpu":
        return f"no kernels for {device_type} tensors"
    from meru_fast.kernels.geometry import INTERPRET

    return None if INTERPRET else "on CPU tensors Triton runs only with TRITON_INTERPRET=1 set beforehand"


# All that torch.compiler.assume_constant_result does; that would import torch._dynamo, 2.8 s at every import of ops.
_triton_fault._dynamo_marked_constant = True  # type: ignore[attr-defined]
