"""The benchmark harness: what it measures is what it says, and every outcome becomes a row."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import devices, embeddings, harness, published, results
from benchmarks.harness import Case, Op, Variant, Work, grid

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def square_inputs(case: Case, device: torch.device, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(case.rows, case.dim, generator=generator, device=device, requires_grad=True)]


def make_op(*variants: Variant, **options) -> Op:
    defaults = {
        "inputs": square_inputs,
        "reference": lambda x: x**2,
        "work": lambda case: Work(forward_flop=1e6, backward_flop=2e6),
        "cases": {},
    }
    return Op(name="square", variants=variants, **(defaults | options))


def measure(op: Op, **options) -> dict[str, harness.Measurement]:
    return harness.measure(op, Case(rows=64, dim=8, **options), CPU, harness.SMOKE)


def test_three_modes_come_from_the_same_calls():
    (found,) = measure(make_op(Variant("good", lambda x: x**2))).values()
    assert found.status == "ok"
    forward, backward, full = (found.seconds[mode][0] for mode in harness.MODES)
    assert forward > 0
    assert backward > 0
    assert full == pytest.approx(forward + backward)
    row = found.row("full")
    assert float(row["tflop_per_s"]) == pytest.approx(3e6 / full / 1e12, rel=1e-3)
    assert set(row) <= set(results.COLUMNS)


def test_errors_against_fp64_are_measured_for_value_and_gradient():
    wrong = Variant("wrong", lambda x: 1.5 * x**2)
    found = measure(make_op(Variant("right", lambda x: x**2), wrong))
    assert found["right"].value_error < 1e-6
    assert found["right"].gradient_error < 1e-6
    assert found["wrong"].value_error == pytest.approx(0.5, rel=1e-5)
    assert found["wrong"].gradient_error == pytest.approx(0.5, rel=1e-5)


def test_extra_memory_leaves_out_inputs_and_gradients():
    floats = 64 * 8 * 4

    def with_scratch(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.empty(1 << 20, dtype=torch.uint8)
        return x * 2 + scratch[0] * 0

    found = measure(make_op(Variant("lean", lambda x: x * 2), Variant("fat", with_scratch), reference=None))
    assert found["lean"].extra_bytes <= 3 * floats  # the output and its upstream gradient
    assert 1 << 20 <= found["fat"].extra_bytes <= (1 << 20) + 6 * floats


def test_out_of_memory_is_a_row_and_spares_the_others():
    greedy = Variant("greedy", lambda x: x[:1] * torch.zeros(1 << 56))
    found = measure(make_op(greedy, Variant("good", lambda x: x**2)))
    assert found["greedy"].status == "out of memory"
    assert "p50_ms" not in found["greedy"].row("full")
    assert found["good"].status == "ok"


def test_memory_is_bounded_on_a_cpu():
    with harness.bounded_memory(CPU, share=0.01), pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.zeros(1 << 34, dtype=torch.uint8)
    torch.zeros(1 << 20)


def test_a_failing_variant_is_recorded_with_its_message():
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shape mismatch\nand more")

    (found,) = measure(make_op(Variant("broken", broken))).values()
    assert found.status == "failed: RuntimeError: shape mismatch"


def test_an_absent_package_is_one_line():
    reason = Variant("peer", torch.sin, package="no-such-distribution").absence(CPU)
    assert reason == "peer: not measured, no-such-distribution is not installed (pip install no-such-distribution)"
    assert "CUDA" in Variant("gpu only", torch.sin, needs_cuda=True).absence(CPU)
    assert Variant("here", torch.sin).absence(CPU) is None


def test_work_of_modes():
    work = Work(forward_flop=1, backward_flop=3, forward_bytes=5, backward_bytes=7)
    assert [work.of(mode) for mode in harness.MODES] == [(1, 5), (3, 7), (4, 12)]


def test_quantiles():
    assert harness.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert harness.quantiles([2.0]) == (2.0, 2.0, 2.0)


def test_cases_of_a_grid():
    cases = grid([2, 3], [4], data="noise")
    assert [(c.rows, c.columns, c.dim, c.data) for c in cases] == [(2, 2, 4, "noise"), (3, 3, 4, "noise")]
    assert Case(rows=2, columns=8, dim=4).columns == 8


def test_datasheet_picks_the_special_part_first():
    assert devices.datasheet("NVIDIA H200").bandwidth == 4800
    assert devices.datasheet("NVIDIA H100 PCIe").bf16 == 756
    assert devices.datasheet("NVIDIA A100-SXM4-40GB").bandwidth == 1555
    assert devices.datasheet("Some other card") is None


def test_clustered_pairs_are_neither_solved_nor_noise():
    """At the trained scale of 100 the loss is far from 0 and from log(B), so its gradients are those of training."""
    image, text = embeddings.pairs(1024, 512, "clusters", CPU, seed=0)
    loss = published.cosine_contrastive(image, text, torch.tensor(100.0)).item()
    assert 0.3 < loss < 2
    with pytest.raises(ValueError, match="'clusters' or 'noise'"):
        embeddings.pairs(4, 4, "nosie", CPU, seed=0)


def test_chunked_baseline_equals_the_eager_one():
    image, text = embeddings.tangent_pairs(1030, 16, "clusters", CPU, seed=0)
    arguments = (image.double(), text.double(), torch.tensor(1.0).double(), torch.tensor(20.0).double())
    whole = published.lorentz_contrastive(*arguments)
    torch.testing.assert_close(published.lorentz_contrastive_chunked(*arguments), whole, rtol=1e-12, atol=0)


def test_results_are_appended_and_the_newest_row_wins(tmp_path):
    path = tmp_path / "new folder" / "results.csv"
    row = {"device": "d", "op": "o", "variant": "v", "mode": "full", "rows": 4, "p50_ms": "1"}
    results.append(path, [row])
    results.append(path, [row | {"p50_ms": "2"}, row | {"rows": 8}])
    rows = results.read(path)
    assert [r["p50_ms"] for r in rows] == ["1", "2", "1"]
    assert [r["p50_ms"] for r in results.latest(rows)] == ["2", "1"]
    assert rows[0]["tflop_per_s"] == ""


def test_a_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has other columns"):
        results.append(path, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_every_op_of_the_suite_runs(tmp_path):
    """`pytest benchmarks/ --smoke` from another folder: each op, each variant that can run here, each mode."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "--smoke", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist"]  # beside which pytest-benchmark measures nothing
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    for op in ("exp_map0", "pairwise_dist", "contrastive_lorentz", "entailment_loss", "topk", "meru_loss"):
        assert f"test_{op}[" in run.stdout
    assert "inf-cl: not measured" in run.stdout or torch.cuda.is_available()
