"""What the machine can do at most: datasheet limits of known GPUs, measured limits of every device, description."""

import functools
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Limits:
    """Dense peak rates (no structured sparsity) in TFLOP/s, and memory bandwidth in GB/s."""

    bf16: float
    tf32: float
    fp32: float
    bandwidth: float


# Matched against torch.cuda.get_device_name(); the first hit wins, so special parts come before plain ones.
# NVIDIA prints rates "with sparsity" in most datasheets; the dense rate is half of that and is what stands here.
#   A100: "NVIDIA A100 Tensor Core GPU" datasheet (2021), SXM 80 GB, SXM 40 GB and PCIe 80 GB columns.
#   H100: "NVIDIA H100 Tensor Core GPU" datasheet (2023), SXM and PCIe columns; fp32 without tensor cores.
#   H200: "NVIDIA H200 Tensor Core GPU" datasheet (2024), SXM column: H100's compute, 4.8 TB/s.
#   B200: "NVIDIA HGX" platform page, HGX B200 divided by its 8 GPUs: 2,250 bf16, 1,125 tf32, 75 fp32, 8 TB/s.
#   L40S: "NVIDIA L40S" datasheet (2023).   L4: "NVIDIA L4" datasheet (2023).
#   RTX 4090: "NVIDIA Ada GPU Architecture" white paper, appendix A; tensor rates with fp32 accumulation.
DATASHEET = {
    "A100-SXM4-40GB": Limits(bf16=312, tf32=156, fp32=19.5, bandwidth=1555),
    "A100 80GB PCIe": Limits(bf16=312, tf32=156, fp32=19.5, bandwidth=1935),
    "A100": Limits(bf16=312, tf32=156, fp32=19.5, bandwidth=2039),
    "H200": Limits(bf16=989, tf32=494.5, fp32=67, bandwidth=4800),
    "H100 PCIe": Limits(bf16=756, tf32=378, fp32=51, bandwidth=2000),
    "H100": Limits(bf16=989, tf32=494.5, fp32=67, bandwidth=3350),
    "B200": Limits(bf16=2250, tf32=1125, fp32=75, bandwidth=8000),
    "L40S": Limits(bf16=362, tf32=183, fp32=91.6, bandwidth=864),
    "L4": Limits(bf16=121, tf32=60, fp32=30.3, bandwidth=300),
    "RTX 4090": Limits(bf16=165.2, tf32=82.6, fp32=82.6, bandwidth=1008),
}


def datasheet(name: str) -> Limits | None:
    """The datasheet's limits of a GPU by its CUDA name; None (and no percentage) for one that is not in the table."""
    return next((limits for part, limits in DATASHEET.items() if part in name), None)


def _best_seconds(step, device: torch.device, repeats: int = 12) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def measured_copy_gb_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written per second of the best large copy: the practical limit of every memory-bound op."""
    numel = (1 << 30 if device.type == "cuda" else 1 << 26) // 4
    source = torch.zeros(numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device) / 1e9


@functools.cache
def measured_fp32_tflop_per_s(device: torch.device) -> float:
    """Rate of the best large fp32 matrix product: the limit to compare with where no datasheet has one (CPUs)."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device, repeats=5) / 1e12


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, with '+' when a tracked Python file differs from it."""
    root = Path(__file__).parent
    name = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    changed = _output("git", "-C", str(root.parent), "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return name + ("+" if name and changed else "")


@functools.cache
def describe(device: torch.device) -> dict[str, str]:
    """The columns that say where a row was measured; they do not change during a run."""
    common = {
        "torch": torch.__version__,
        "triton": package_version("triton") or "",
        "python": platform.python_version(),
        "commit": commit(),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        return {"device": torch.cuda.get_device_name(device), "driver": driver, **common}
    return {"device": f"{cpu_name()} ({os.cpu_count()} cores)", "driver": "", **common}


def clocks(device: torch.device) -> str:
    """Clocks right now: SM and memory MHz and watts of the GPU, or the load of the CPU machine."""
    if device.type == "cuda":
        query = "--query-gpu=clocks.sm,clocks.mem,power.draw"
        return _output("nvidia-smi", query, "--format=csv,noheader").split("\n")[0].replace(",", ";")
    return f"load {os.getloadavg()[0]:.1f}"
