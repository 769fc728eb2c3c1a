"""``meru-fast info``: what is installed, which backends run, and why the others do not."""

import argparse
import importlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from meru_fast.versions import installed

PACKAGES = (
    "meru_fast", "torch", "torchvision", "triton", "deepspeed", "nvidia-dali-cuda130", "xformers", "timm", "omegaconf",
    "tokenizers", "webdataset", "safetensors", "scikit-learn", "numpy", "pillow",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; always succeeds, since a missing part is what it is there to tell."""
    parser = argparse.ArgumentParser(
        prog="meru-fast info",
        description="Versions, GPUs, which backends are active and why not, disk. Send it with a bug report.",
        epilog="examples:\n"
        "  meru-fast info                          for a reader\n"
        "  meru-fast info --json | jq .backends    for a program\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # some packages log on import what this report says better
    try:
        report = collect()
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for title, rows in report.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<20} {value}")
    return 0


def collect() -> dict[str, dict[str, str]]:
    """Section to name to a line of text."""
    return {
        "system": _system(),
        "packages": {name: installed(name) for name in PACKAGES},
        "gpu": _gpus(),
        "ops (meru_fast.ops)": _asked("meru_fast.ops", lambda ops: ops.backend_report()),
        "backends": _backends(),
        "disk": _disk(),
    }


def _system() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{len(os.sched_getaffinity(0))} cores usable, {memory:.0f} GiB memory",
    }


def _gpus() -> dict[str, str]:
    def describe(torch) -> dict[str, str]:
        if not torch.cuda.is_available():
            built = (
                f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
            )
            return {"none": f"{built}, but no GPU and driver can be used; everything runs on the CPU"}
        found = {}
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        return found | {"cuda": f"{torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"}

    return _asked("torch", describe)


def _backends() -> dict[str, str]:
    """Optional packages that speed things up: whether each is used here, and why not."""
    return {
        "text attention": _line("meru_fast.models.attention", _attention),
        "xformers": _line("meru_fast.models.attention", _xformers),
        "data decoding": _line("nvidia.dali", _decoding),
        "training": _line("deepspeed.accelerator", _accelerator),
    }


def _attention(attention) -> str:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{attention.packed_implementation(device, torch.bfloat16, 64)} over packed captions"


def _xformers(attention) -> str:
    import torch

    if installed("xformers") == "not installed":
        return "not installed"
    if not torch.cuda.is_available():
        return "installed, not used: its kernels run on GPUs only"
    reason = attention.unusable_because("xformers", torch.device("cuda"), torch.bfloat16, 64)
    return f"installed, not used: {reason}" if reason else "used for packed captions"


def _decoding(dali) -> str:
    import torch

    used = "used" if torch.cuda.is_available() else "on a CPU only with dataset.decoder=dali, else Pillow"
    return f"DALI {dali.__version__}, {used}"


def _accelerator(accelerator) -> str:
    found = accelerator.get_accelerator()
    return f"DeepSpeed on {found.device_name()}, communication by {found.communication_backend_name()}"


def _disk() -> dict[str, str]:
    places = {
        "here": Path.cwd(),
        "temporary files": Path(os.environ.get("TMPDIR", "/tmp")),
        "triton cache": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton")),
        "torch extensions": Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")),
    }
    found = {}
    for name, path in places.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        found[name] = f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free ({path})"
    return found


def _line(module: str, ask: Callable) -> str:
    """One line about a module, or why it cannot be used."""
    try:
        return str(ask(importlib.import_module(module)))
    except Exception as error:  # whatever a broken installation raises is the answer
        return f"not usable: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _asked(module: str, ask: Callable) -> dict[str, str]:
    """Rows about a module, or one that says why there are none."""
    try:
        return ask(importlib.import_module(module))
    except Exception as error:
        return {"not usable": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
