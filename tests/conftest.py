"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os
from collections.abc import Iterator

import pytest
import torch
from loopback_only import loopback_only

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported


os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes, which `no_network` does not reach


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Tests connect to this machine only."""
    with loopback_only():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here, so that nothing is reported as skipped."""
    unwanted = set()
    if not torch.cuda.is_available():
        unwanted |= {item for item in items if "gpu" in item.keywords}
    if not config.getoption("--slow"):
        unwanted |= {item for item in items if "slow" in item.keywords}
    if unwanted:
        config.hook.pytest_deselected(items=sorted(unwanted, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in unwanted]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is here: the same tests run on each."""
    return torch.device(request.param)
