"""Draw what was measured: plots, and the tables of docs/benchmarks.md, from the CSV alone.

python -m benchmarks.report                  redraw docs/benchmarks.md and docs/assets/benchmarks/*.png
python -m benchmarks.report --add other.csv  append the rows of another machine first
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "assets" / "benchmarks"
UNMEASURED = "*not measured yet*"

Row = dict[str, str]


def number(text: str | float) -> str:
    """Three significant digits, thousands separated, small and large ones in powers of ten."""
    value = float(text)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(row: Row) -> str:
    shape = f"{int(row['rows']):,}"
    if row["columns"] != row["rows"]:
        shape += f" x {int(row['columns']):,}"
    plain = row["dtype"] == "float32" and row["data"] == "clusters"
    return f"{shape}, D {row['dim']}" + ("" if plain else f", {row['dtype']}, {row['data']}")


class Table:
    """The newest rows, looked up by what they measure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = results.latest(rows)

    def find(self, op: str, variant: str, rows: int, mode: str = "full", device: str = "", **more: str) -> Row | None:
        """The one row of a case at D = 512, fp32 inputs, clustered data, unless told otherwise."""
        wanted = {"op": op, "variant": variant, "rows": str(rows), "mode": mode}
        wanted |= {"dim": "512", "dtype": "float32", "data": "clusters", **more}
        fitting = [r for r in self.rows if device in r["device"] and all(r[k] == v for k, v in wanted.items())]
        return fitting[-1] if fitting else None


# --- the targets -----------------------------------------------------------------------------------------------------
# Each cell is a function of the table that returns text, or None where a row that it needs was not measured.


def _speed(op: str, variant: str, rows: int) -> Callable[[Table], str | None]:
    def cell(table: Table) -> str | None:
        row = table.find(op, variant, rows, device="H200")
        return row and row["p50_ms"] and f"{number(row['p50_ms'])} ms, {number(row['tflop_per_s'])} TFLOP/s"

    return cell


def _ratio(ours: tuple[str, str], theirs: tuple[str, str], rows: int, device: str) -> Callable[[Table], str | None]:
    def cell(table: Table) -> str | None:
        left, right = (table.find(op, variant, rows, device=device) for op, variant in (ours, theirs))
        if not (left and right and left["p50_ms"] and right["p50_ms"]):
            return None
        return f"{float(right['p50_ms']) / float(left['p50_ms']):.2f}x"

    return cell


def _against_eager(table: Table) -> str | None:
    """At the largest size that the published maths survives."""
    op, sizes = "contrastive_lorentz", (262_144, 65_536, 32_768, 8_192, 2_048)
    for rows in sizes:
        ours, theirs = (table.find(op, name, rows, device="H200") for name in ("meru_fast high", "eager"))
        if ours and theirs and ours["p50_ms"] and theirs["p50_ms"]:
            speed = float(theirs["p50_ms"]) / float(ours["p50_ms"])
            memory = 100 * float(ours["extra_bytes"]) / float(theirs["extra_bytes"])
            return f"{speed:.1f}x at B = {rows:,}, {number(memory)} % of its memory"
    return None


def _memory(op: str, variant: str, rows: int) -> Callable[[Table], str | None]:
    def cell(table: Table) -> str | None:
        row = table.find(op, variant, rows, device="H200")
        return row and row["extra_bytes"] and f"{number(float(row['extra_bytes']) / 1e6)} MB"

    return cell


def _bandwidth(table: Table) -> str | None:
    cells = []
    for op, mode in (("exp_map0", "forward"), ("exp_map0", "backward"), ("entailment_loss", "full")):
        row = table.find(op, "meru_fast", 1_048_576, mode, device="H200")
        if not (row and row["percent_of_measured"]):
            return None
        cells.append(f"{op} {mode} {number(row['percent_of_measured'])} %")
    return ", ".join(cells)


def _small_blocks(table: Table) -> str | None:
    op, block = "contrastive_block", {"rows": 256, "columns": "2048", "device": "H200"}
    ours, eager, compiled = (table.find(op, name, **block) for name in ("meru_fast high", "eager", "torch.compile"))
    if not (ours and eager and compiled and ours["launches"] and eager["launches"]):
        return None
    fewer = float(eager["launches"]) / float(ours["launches"])
    return f"{fewer:.1f}x fewer, {float(compiled['p50_ms']) / float(ours['p50_ms']):.2f}x the speed of torch.compile"


LOSS, COSINE = "contrastive_lorentz", "contrastive_cosine"
TARGETS = [
    ("loss, B = 65,536, D = 512, `medium`", ">= 480 TFLOP/s, <= 40 ms", _speed(LOSS, "meru_fast medium", 65_536)),
    ("same, `high`", "<= 75 ms", _speed(LOSS, "meru_fast high", 65_536)),
    ("same, `highest`", "<= 110 ms", _speed(LOSS, "meru_fast highest", 65_536)),
    ("`high` against eager at the largest B that eager survives", ">= 10x, <= 1 % of its memory", _against_eager),
    (
        "against inf-cl, cosine geometry, B = 65,536, `high`",
        ">= 8x",
        _ratio((COSINE, "meru_fast high"), (COSINE, "inf-cl"), 65_536, "H200"),
    ),
    (
        "time of hyperbolic over cosine geometry, B = 65,536, `high`",
        "<= 1.25x",
        _ratio((COSINE, "meru_fast high"), (LOSS, "meru_fast high"), 65_536, "H200"),
    ),
    ("extra memory, B = 65,536, `medium`", "<= 400 MB", _memory(LOSS, "meru_fast medium", 65_536)),
    ("extra memory, B = 65,536, `high`", "<= 600 MB", _memory(LOSS, "meru_fast high", 65_536)),
    ("B = 1,048,576 on one GPU, `high`", "runs, <= 18 GB with its inputs", _memory(LOSS, "meru_fast high", 1_048_576)),
    ("1 M rows, share of the measured copy bandwidth", ">= 85 %", _bandwidth),
    ("256 x 2,048 block: launches against eager", ">= 10x fewer, faster than torch.compile", _small_blocks),
    (
        "CPU: PyTorch path against eager, B = 4,096",
        "> 1x",
        _ratio((LOSS, "meru_fast high"), (LOSS, "eager"), 4_096, "cores"),
    ),
    (
        "CPU: PyTorch path against eager, B = 8,192",
        "> 1x",
        _ratio((LOSS, "meru_fast high"), (LOSS, "eager"), 8_192, "cores"),
    ),
]


def targets(table: Table) -> str:
    lines = ["| what | target | measured |", "|---|---|---|"]
    lines += [f"| {what} | {target} | {cell(table) or UNMEASURED} |" for what, target, cell in TARGETS]
    return "\n".join(lines)


# --- the measured tables ---------------------------------------------------------------------------------------------


def _line(modes: dict[str, Row]) -> str:
    """One variant of one case."""
    last = modes.get("full") or modes["forward"]
    times = [number(modes[m]["p50_ms"]) if m in modes and modes[m]["p50_ms"] else "" for m in ("forward", "backward")]
    if last["status"] == "ok":
        total = f"{number(last['p50_ms'])} ({number(last['p20_ms'])} - {number(last['p80_ms'])})"
    else:
        total = last["status"]
    rate = last["tflop_per_s"] or last["gb_per_s"]
    share = last["percent_of_bf16"] or last["percent_of_bandwidth"] or last["percent_of_measured"]
    memory = number(float(last["extra_bytes"]) / 1e6) if last["extra_bytes"] else ""
    errors = [number(last[key]) if last[key] else "" for key in ("value_error", "gradient_error")]
    figures = [number(text) if text else "" for text in (rate, share)]
    return "| " + " | ".join([last["variant"], *times, total, *figures, memory, *errors]) + " |"


def op_table(rows: Sequence[Row]) -> str:
    """All variants of one op on one device, grouped by size."""
    rate = "TFLOP/s" if any(row["tflop_per_s"] for row in rows) else "GB/s"
    columns = ["variant", "forward ms", "backward ms", "full ms p50 (p20 - p80)", rate, "% of limit", "extra MB"]
    columns += ["value error", "gradient error"]
    lines = []
    by_size: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_size[size(row)][row["variant"]][row["mode"]] = row
    for title, variants in by_size.items():
        lines += [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [_line(modes) for modes in variants.values()] + [""]
    return "\n".join(lines)


def hardware(rows: Sequence[Row]) -> str:
    """One line: where and when, and with what."""
    newest = max(rows, key=lambda row: row["date"])
    driver = f", driver {newest['driver']}" if newest["driver"] else ""
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    versions = ", ".join(f"{name} {newest[name]}" for name in ("torch", "triton", "python", "commit"))
    loads = [float(row["clocks"].removeprefix("load ")) for row in rows if row["clocks"].startswith("load ")]
    busy = f"; system load {min(loads):g} to {max(loads):g} while measuring" if loads else ""
    return f"{when}; {newest['device']}, threads used {newest['threads']}{driver}; {versions}{busy}."


def by_device_and_op(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    grouped: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results.latest(rows):
        grouped[row["device"]][row["op"]].append(row)
    return grouped


def measured_tables(rows: Sequence[Row], plots: Sequence[Path]) -> str:
    """A section for each device, a subsection for each op with its plot."""
    parts = []
    for device, ops in by_device_and_op(rows).items():
        parts += [f"### {device}", "", hardware([row for op in ops.values() for row in op]), ""]
        for op, found in ops.items():
            parts += [f"#### {op}", ""]
            picture = next((path for path in plots if path.name == plot_name(device, op)), None)
            if picture:
                parts += [f"![Time and memory of {op} on {device}](assets/benchmarks/{picture.name})", ""]
            parts += [op_table(found), ""]
    return "\n".join(parts).rstrip() or UNMEASURED


# --- plots -----------------------------------------------------------------------------------------------------------


def plot_name(device: str, op: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in f"{op} {device}").split()
    return "_".join(words).lower() + ".png"


def draw(device: str, op: str, rows: Sequence[Row], folder: Path) -> Path | None:
    """Time and extra memory against rows, log-log, a line for each variant; None where there is only one size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mode = "full" if any(row["mode"] == "full" for row in rows) else "forward"
    shown = [r for r in rows if r["mode"] == mode and r["dim"] == "512" and r["dtype"] == "float32"]
    shown = [row for row in shown if row["data"] == "clusters" and row["rows"] == row["columns"]]
    ticks = sorted({int(row["rows"]) for row in shown})
    if len(ticks) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    panels = [("p50_ms", 1.0, "forward + backward, ms" if mode == "full" else "forward, ms")]
    panels += [("extra_bytes", 1e-6, "memory over inputs and gradients, MB")]
    for axis, (key, unit, label) in zip(axes, panels, strict=True):
        for variant in dict.fromkeys(row["variant"] for row in shown):
            line = sorted((int(r["rows"]), float(r[key]) * unit) for r in shown if r["variant"] == variant and r[key])
            if line:
                ours = variant.startswith("meru_fast")
                axis.plot(*zip(*line, strict=True), marker="o", ms=4, lw=2.2 if ours else 1.2, label=variant)
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{op}, D = 512, fp32 inputs, {device}", fontsize=10)
    path = folder / plot_name(device, op)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# --- the page --------------------------------------------------------------------------------------------------------


def fill(page: str, name: str, content: str) -> str:
    """Replace what stands between <!-- name:begin --> and <!-- name:end -->.

    Raises:
        ValueError: the page lacks the marks.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} ... {end}")
    return page[: page.index(begin) + len(begin)] + f"\n\n{content}\n\n" + page[page.index(end) :]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=results.DEFAULT, help="measurements (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to fill (default: %(default)s)")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--add", type=Path, metavar="CSV", help="append the rows of this file to --csv first")
    arguments = parser.parse_args(argv)
    if arguments.add:
        results.append(arguments.csv, results.read(arguments.add))
    rows = results.read(arguments.csv)
    groups = [(device, op, r) for device, ops in by_device_and_op(rows).items() for op, r in ops.items()]
    pictures = [path for group in groups if (path := draw(*group, arguments.plots))]
    page = arguments.page.read_text()
    page = fill(page, "targets", targets(Table(rows)))
    arguments.page.write_text(fill(page, "results", measured_tables(rows, pictures)))
    print(f"{len(rows)} rows of {arguments.csv}: {arguments.page} and {len(pictures)} plots in {arguments.plots}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
