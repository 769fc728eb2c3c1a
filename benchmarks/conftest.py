"""Options of `pytest benchmarks/`, and the fixtures that measure a case once and record its rows."""

import sys
from pathlib import Path

import pytest

# `benchmarks` is a folder of the checkout, not an installed package; last, so that an installed meru_fast is measured.
sys.path.append(str(Path(__file__).parents[1]))

import torch

from benchmarks import harness, results

ABSENT = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("meru_fast benchmarks")
    group.addoption("--csv", type=Path, default=results.DEFAULT, help="append rows to this file")
    group.addoption("--smoke", action="store_true", help="tiny sizes, one round, nothing recorded")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ABSENT] = set()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect bench_<op>.py like test modules; pytest itself takes the files named on the command line."""
    named = parent.session.isinitpath(file_path)
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def profile(config: pytest.Config) -> tuple[str, torch.device, harness.Effort]:
    """(which sizes, device, effort) of this run."""
    if config.getoption("--smoke"):
        return "smoke", torch.device("cpu"), harness.SMOKE
    if torch.cuda.is_available():
        return "gpu", torch.device("cuda", torch.cuda.current_device()), harness.GPU
    return "cpu", torch.device("cpu"), harness.CPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.function, "op", None)
    if op is None:
        return
    sizes, device, effort = profile(metafunc.config)
    metafunc.config.stash[ABSENT] |= {reason for v in op.variants if (reason := v.absence(device))}
    wanted = [
        pytest.param((op, case, variant.name), mode, id=f"{case}-{variant.name}-{mode}")
        for case in op.cases[sizes]
        for variant in op.present(case, device, compiled=effort.compiled)
        for mode in op.modes
    ]
    metafunc.parametrize(("measured", "mode"), wanted, indirect=["measured"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # the first test of a case measures all its variants


@pytest.fixture(scope="session")
def _cases(request: pytest.FixtureRequest) -> dict:
    """Measured cases of this session, the newest only: inputs of a million rows are not kept."""
    return {}


@pytest.fixture
def measured(request: pytest.FixtureRequest, _cases: dict) -> harness.Measurement:
    """The measurement of this test's variant; the first test of a case measures it and appends its rows to the CSV."""
    op, case, variant = request.param
    sizes, device, effort = profile(request.config)
    if (op.name, case) not in _cases:
        _cases.clear()
        chosen = harness.measure(op, case, device, effort)
        _cases[op.name, case] = chosen
        if sizes != "smoke":
            rows = [measurement.row(mode) for measurement in chosen.values() for mode in op.modes]
            results.append(request.config.getoption("--csv"), rows)
    return _cases[op.name, case][variant]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason in sorted(config.stash[ABSENT]):
        terminalreporter.write_line(reason)
    if not config.getoption("--smoke"):
        terminalreporter.write_line(f"rows: {config.getoption('--csv')}; tables: python -m benchmarks.report")
