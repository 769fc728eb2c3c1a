"""Result files and the table."""

import csv
import io

from rich.console import Console

from meru_fast.evaluation.output import Result, print_table, read_json, result_path, write_csv, write_json


def results():
    probe = {"model": "MERU", "pretrained": "runs/a", "task": "linear_probe"}
    return [
        Result("dtd", **probe, metrics={"lp_acc1": 0.5, "lp_cost": 10.0}, provenance="as published"),
        Result("own", **probe, metrics={"lp_acc1": 0.25, "lp_acc5": 1.0}, provenance="differs, because x"),
    ]


def test_json_round_trip_and_damage(tmp_path):
    (first, _) = results()
    path = result_path(tmp_path, "../runs/a/", "own data", "linear_probe")
    assert path.parent.parent == tmp_path  # no way out of the folder
    write_json(first, path)
    assert read_json(path) == first
    path.write_text(path.read_text().replace("dataset", "data_set"))
    assert read_json(path) is None
    assert read_json(tmp_path / "absent.json") is None


def test_csv_has_a_column_for_each_metric(tmp_path):
    write_csv(results(), tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["dataset"] for row in rows] == ["dtd", "own"]
    assert [(row["lp_acc1"], row["lp_acc5"]) for row in rows] == [("0.5", ""), ("0.25", "1.0")]


def test_table_shows_percent_and_whether_the_split_is_published():
    text = io.StringIO()
    print_table(results(), Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    assert any("dtd" in line and "50.0" in line and "as published" in line and " - " in line for line in lines)
    assert any("own" in line and "25.0" in line and "100.0" in line and "differs" in line for line in lines)
    assert "lp_cost" not in text.getvalue()  # no fraction
