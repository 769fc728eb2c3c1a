"""The data benchmark runs, and its variants do the same work."""

import csv

import pytest
from shard_factory import write_shards

from benchmarks import bench_data


@pytest.fixture
def small(tmp_path):
    write_shards(tmp_path / "shards", 2, 40, 64)
    return [
        *("--shards", f"{tmp_path}/shards/shard_{{00000..00001}}.tar", "--csv", str(tmp_path / "data.csv")),
        *("--batch", "8", "--images", "320", "--rounds", "1", "--workers", "1", "--step-ms", "1"),
    ]


def test_every_variant_is_measured(small, tmp_path, capsys):
    assert bench_data.main(small) == 0
    with open(tmp_path / "data.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert rows.keys() == bench_data.VARIANTS.keys()
    for row in rows.values():
        assert float(row["img_per_s"]) > 0
        assert float(row["cpu_ms_per_img"]) > 0
        assert 0 <= float(row["data_wait_share"]) <= 1
    assert float(rows["ours-pil"]["mean_difference"]) < 0.1
    assert 0 < float(rows["ours-dali"]["mean_difference"]) < 1
    assert rows["published"]["mean_difference"] == ""
    assert "x published" in capsys.readouterr().out


def test_soak_writes_its_curve_and_judges_it(small, tmp_path):
    status = bench_data.main([*small, "--soak", "200", "--curve", str(tmp_path / "curve")])
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    looks = [(row["decoder"], row["batch"]) for row in rows]
    assert looks == [(decoder, batch) for decoder in ("pil", "dali") for batch in ("0", "100", "200")]
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert status in (0, 1)
    leak = [("pil", step, 100.0 + step / 100, 50.0) for step in range(0, 10_001, 100)]
    assert bench_data.plot_soak(leak, tmp_path / "leak", warm_up=1000) == 1
    steady = [("pil", step, 100.0, 50.0 if step else 10.0) for step in range(0, 10_001, 100)]
    assert bench_data.plot_soak(steady, tmp_path / "steady", warm_up=1000) == 0
