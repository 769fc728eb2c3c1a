"""Choice of the implementation: automatic, forced, reported, refused."""

import os
import subprocess
import sys

import pytest
import torch

from meru_fast import ops
from meru_fast.ops.backend import requested_backend


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MERU_FAST_BACKEND")
    } | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def test_automatic_choice(device: torch.device) -> None:
    expected = "triton" if device.type == "cuda" else "torch"
    assert ops.active_backend(torch.zeros(2, 3, device=device)) == expected
    assert ops.active_backend(torch.zeros(2, 3, device=device, dtype=torch.float64)) == "torch"
    assert ops.active_backend(torch.zeros(2, 2000, device=device), max_width=1024) == "torch"


def test_forcing_and_restoring(device: torch.device) -> None:
    x = torch.zeros(2, 3, device=device)
    before = requested_backend()
    with ops.use_backend("torch"):
        assert ops.active_backend(x) == "torch"
        with ops.use_backend("triton"):
            assert ops.active_backend(x) == "triton"
        assert ops.active_backend(x) == "torch"
    assert requested_backend() == before


def test_restored_after_an_error() -> None:
    before = requested_backend()
    with pytest.raises(ZeroDivisionError), ops.use_backend("torch"):
        raise ZeroDivisionError
    assert requested_backend() == before


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "not torch.float64"),
        (torch.zeros(2, 2000), "2000 components, the kernels take at most 1024"),
        (torch.zeros(2, 3, device="meta"), "no kernels for meta tensors"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(tensor: torch.Tensor, reason: str) -> None:
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match=reason):
        ops.active_backend(tensor, max_width=1024)


def test_unknown_name() -> None:
    with pytest.raises(ops.BackendError, match="'cuda', expected one of auto, triton, torch"):
        ops.set_backend("cuda")


def test_report_names_every_device_with_a_reason() -> None:
    report = ops.backend_report()
    assert set(report) == {"requested", "cuda", "cpu"}
    assert report["cpu"].startswith("torch")
    if not torch.cuda.is_available():
        assert report["cuda"] == "torch: no CUDA device"
    with ops.use_backend("torch"):
        assert ops.backend_report()["cuda"] == "torch: forced"


def test_environment_variable() -> None:
    show = "from meru_fast import ops; print(ops.backend_report()['requested'])"
    assert python(show, MERU_FAST_BACKEND="torch").stdout.strip() == "torch"
    assert python(show).stdout.strip() == "auto"
    wrong = python(show, MERU_FAST_BACKEND="fast")
    assert wrong.returncode != 0
    assert "environment variable MERU_FAST_BACKEND is 'fast', expected one of auto, triton, torch" in wrong.stderr


def test_cpu_tensors_need_the_interpreter() -> None:
    code = (
        "import torch; from meru_fast import ops\n"
        "try:\n    ops.set_backend('triton'); ops.exp_map0(torch.zeros(2, 3))\n"
        "except ops.BackendError as error:\n    print(error)"
    )
    message = python(code, CUDA_VISIBLE_DEVICES="").stdout
    assert "backend 'triton' cannot run here: no CUDA device" in message


def test_importing_the_ops_needs_torch_and_triton_only() -> None:
    code = (
        "import sys; import meru_fast.ops\n"
        "heavy = {'timm', 'torchvision', 'deepspeed', 'omegaconf', 'sklearn', 'matplotlib', 'webdataset', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr
