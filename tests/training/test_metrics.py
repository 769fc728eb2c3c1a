"""The files that curves are drawn from, and the line on the terminal."""

import csv
import json
import os
import pty
import struct
import subprocess
from pathlib import Path

import pytest
from training_runs import command, environment, metrics, run

from meru_fast.training.metrics import CsvLog, describe


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_column_does_not_lose_the_rows_before(tmp_path):
    log = CsvLog(tmp_path / "metrics.csv")
    log.write({"step": 1, "loss": 2.0})
    log.write({"step": 2, "loss": 1.5, "grad_norm": 3.0})
    assert read(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "2.0", "grad_norm": ""},
        {"step": "2", "loss": "1.5", "grad_norm": "3.0"},
    ]


def test_rows_behind_the_checkpoint_and_half_rows_are_forgotten(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2.0\n2,1.5\n3,1.2\n4")  # killed while writing
    log = CsvLog(path, resumed_at=2)
    log.write({"step": 3, "loss": 1.25})
    assert [row["loss"] for row in read(path)] == ["2.0", "1.5", "1.25"]


def test_a_full_disk_costs_metrics_and_not_the_run(tmp_path):
    """No file may grow beyond 6 kB, as if the disk ended there."""
    training = command(tmp_path, "train.num_iterations=60", "train.checkpoint_period=60")
    limited = ["bash", "-c", 'ulimit -f 6 && exec "$@"', "-", *training]
    finished = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    rows = metrics(tmp_path)
    assert 5 < len(rows) < 60
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["bad_samples"] == "0" for row in rows)  # the last column: no row is cut short
    assert finished.stderr.count("metrics could not be written, training goes on") == 1
    assert "60/60" in finished.stderr
    assert "Logging error" not in finished.stderr


def test_numbers_survive_to_the_last_bit(tmp_path):
    CsvLog(tmp_path / "metrics.csv").write({"step": 1, "loss": 0.1 + 0.2})
    assert float(read(tmp_path / "metrics.csv")[0]["loss"]) == 0.1 + 0.2


def test_description_of_a_row():
    row = {
        "loss": 2.5,
        "contrastive_loss": 2.3,
        "entailment_loss": 1.0,
        "curv": 1.0,
        "img_per_s": 1234.5,
        "data_wait": 0.07,
    }
    assert describe(row) == "loss 2.5000 (2.3000 + 1.0000)  curv 1  1234 img/s  data wait 7%"


def test_terminal_gets_a_bar_that_stays_in_place(tmp_path):
    """Under a real terminal: one line that is redrawn, and the log file has the values."""
    parent, child = pty.openpty()
    running = subprocess.Popen(
        command(tmp_path), env=environment(COLUMNS="120", TERM="xterm"), stdout=child, stderr=child, close_fds=True
    )
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 65536):
            shown += chunk
    except OSError:  # how a terminal says that nobody holds its other end any more
        pass
    assert running.wait(timeout=240) == 0
    text = shown.decode(errors="replace")
    assert "8/8" in text
    assert "img/s" in text
    assert "\x1b[" in text
    assert "img/s" in (tmp_path / "logs" / "rank0.log").read_text()


def wandb_records(file: Path) -> list:
    """What an offline run of Weights & Biases wrote: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, found = file.read_bytes(), 7, b"", []
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no header fits into what is left of the block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(record))
            record = b""
    return found


def test_wandb_gets_the_same_numbers_and_the_config(tmp_path):
    """The real package, offline: no account and no network."""
    pytest.importorskip("wandb", reason="an optional package that no extra brings")
    run(tmp_path, "train.wandb=meru", WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.stem == f"run-{(tmp_path / 'wandb_id').read_text()}"
    records = wandb_records(file)
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    for row, expected in zip(rows, metrics(tmp_path), strict=True):
        assert row["_step"] == int(expected["step"])
        for name in ("loss", "curv", "lr", "grad_norm"):
            assert row[f"train/{name}"] == float(expected[name])
    (begun,) = (record.run for record in records if record.HasField("run"))
    assert begun.project == "meru"
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["train"]["total_batch_size"] == 12
