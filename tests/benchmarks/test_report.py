"""Tables and plots come from the CSV alone, and what was not measured says so."""

import pytest

from benchmarks import report, results, run

PAGE = (
    "# B\n<!-- targets:begin -->old<!-- targets:end -->\n## M\n<!-- results:begin -->\nold\n<!-- results:end -->\nend\n"
)


def row(**changes: object) -> dict:
    figures = {"p20_ms": 1, "p50_ms": 2, "p80_ms": 3, "samples": 5, "tflop_per_s": 4, "extra_bytes": 5_000_000}
    place = {
        "clocks": "load 1.5",
        "device": "EPYC (2 cores)",
        "threads": 2,
        "torch": "2.15",
        "commit": "abc",
        "date": "2026-01-02T03:04:05Z",
    }
    case = {"op": "contrastive_lorentz", "variant": "eager", "mode": "full", "rows": 4096, "columns": 4096, "dim": 512}
    return {**case, "dtype": "float32", "data": "clusters", "status": "ok", **figures, **place} | changes


def write(tmp_path, *rows: dict) -> tuple[str, list[str]]:
    """The filled page and the names of the plots."""
    page, csv = tmp_path / "page.md", tmp_path / "r.csv"
    page.write_text(PAGE)
    results.append(csv, rows)
    report.main(["--csv", str(csv), "--page", str(page), "--plots", str(tmp_path / "plots")])
    return page.read_text(), [path.name for path in (tmp_path / "plots").glob("*.png")]


def test_without_rows_every_cell_is_empty(tmp_path):
    page, plots = write(tmp_path)
    targets = [line for line in page.splitlines() if line.startswith("|")][2:]
    assert len(targets) == len(report.TARGETS)
    assert all(line.endswith(f"| {report.UNMEASURED} |") for line in targets)
    assert plots == []
    assert page.endswith("end\n")
    assert "old" not in page


def test_cpu_rows_fill_the_cpu_targets_only(tmp_path):
    page, _ = write(tmp_path, row(p50_ms=3), row(variant="meru_fast high", p50_ms=2))
    filled = [line for line in page.splitlines() if "CPU: " in line or "B = 65,536" in line]
    assert "| 1.50x |" in next(line for line in filled if "B = 4,096" in line)
    assert all(report.UNMEASURED in line for line in filled if "B = 4,096" not in line)


@pytest.mark.parametrize(("device", "measured"), [("NVIDIA A100-SXM4-80GB", False), ("NVIDIA H200", True)])
def test_gpu_targets_need_an_h200(tmp_path, device, measured):
    case = {"variant": "meru_fast medium", "rows": 65_536, "columns": 65_536}
    page, _ = write(tmp_path, row(**case, device=device, p50_ms=38.5, tflop_per_s=457))
    assert ("| 38.5 ms, 457 TFLOP/s |" in page) is measured


def test_out_of_memory_and_hardware_are_shown(tmp_path):
    dead = row(status="out of memory", p20_ms="", p50_ms="", p80_ms="", tflop_per_s="", extra_bytes="")
    page, _ = write(tmp_path, dead, row(variant="chunked"))
    assert "| eager |  |  | out of memory |" in page
    assert "2026-01-02; EPYC (2 cores), threads used 2; torch 2.15" in page


def test_a_plot_needs_two_sizes(tmp_path):
    small = [row(rows=n, columns=n, variant=v) for n in (1024, 4096) for v in ("eager", "chunked")]
    page, plots = write(tmp_path, *small, row(op="meru_loss"))
    assert plots == ["contrastive_lorentz_epyc_2_cores.png"]
    assert "assets/benchmarks/contrastive_lorentz_epyc_2_cores.png" in page


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="results:begin"):
        report.fill("# no marks", "results", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [("0", "0"), ("0.01234", "0.0123"), ("123456", "123,456"), ("2e-8", "2.0e-08"), ("5e7", "5.0e+07")],
)
def test_numbers(value, text):
    assert report.number(value) == text


def test_rows_of_another_machine_are_added(tmp_path):
    write(tmp_path, row(commit="here"))
    other = tmp_path / "other.csv"
    results.append(other, [row(device="NVIDIA H200", commit="there")])
    places = {"--csv": tmp_path / "r.csv", "--add": other, "--page": tmp_path / "page.md", "--plots": tmp_path}
    report.main([str(word) for pair in places.items() for word in pair])
    assert [r["commit"] for r in results.read(tmp_path / "r.csv")] == ["here", "there"]
    assert "### NVIDIA H200" in (tmp_path / "page.md").read_text()


def test_run_leaves_everything_in_the_folder_that_was_named(tmp_path, capfd):
    before = report.PAGE.read_text()
    arguments = ["--no-check", "--only", "exp_map", "--output-dir", str(tmp_path / "out"), "--", "--smoke"]
    assert run.main(arguments) == 0
    assert "Measuring: passed" in capfd.readouterr().out
    assert "<!-- targets:begin -->" in (tmp_path / "out" / "benchmarks.md").read_text()
    assert report.PAGE.read_text() == before


def test_run_names_what_there_is_when_nothing_matches():
    with pytest.raises(SystemExit, match=r"no benchmark matches nothing; there are contrastive, .*topk"):
        run.files(["nothing"])
    assert [path.endswith("bench_topk.py") for path in run.files(["topk"])] == [True]
