import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from shard_factory import encoded, photo, sample, write_shards, write_tar

from meru_fast.data import build_loader
from meru_fast.data.errors import DataError
from meru_fast.data.transforms import DRAWS, crop_window
from meru_fast.tokenizer import Tokenizer

SMALL = {"image_size": 32, "block": 4, "window": 32}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """6 shards of 21 good samples; 21 is no multiple of the block."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 6, 21, 48)
    return folder


def take(loader, count):
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == count:
            break
    loader.close()
    return batches


def content(batches):
    """Everything of the rows of some batches, by key."""
    rows = {}
    for batch in batches:
        for key, image, tokens in zip(batch.keys, batch.images, batch.tokens.to_list(), strict=True):
            rows[batch.step, key] = (image.clone(), tokens.tolist())
    return rows


def same(one, other):
    return one.keys() == other.keys() and all(
        (one[key][0] == other[key][0]).all() and one[key][1] == other[key][1] for key in one
    )


def test_batches(shards):
    loader = build_loader(shards, batch_size=24, num_workers=2, **SMALL)
    assert loader.num_samples == 126
    assert loader.batches_per_epoch == 5
    batches = take(loader, 11)
    for step, batch in enumerate(batches):
        assert (batch.step, batch.epoch) == (step, step // 5)
        assert batch.images.shape == (24, 3, 32, 32)
        assert batch.images.dtype == torch.uint8
        assert len(batch.tokens) == len(batch.keys) == 24
    epochs = [[key for batch in batches[5 * e : 5 * e + 5] for key in batch.keys] for e in range(2)]
    assert [len(set(keys)) for keys in epochs] == [120, 120]
    assert epochs[0] != epochs[1]
    assert loader.report() == {"seen": 264, "bad": 0, "reasons": {}}


def test_images_are_of_their_keys(shards):
    """Key, caption and picture belong together."""
    always_central = (1.1, 1.2)  # no window has more than the area of its image, so the central one is taken
    loader = build_loader(shards, batch_size=12, num_workers=0, crop_scale=always_central, **SMALL)
    (batch,) = take(loader, 1)
    for key, image, tokens in zip(batch.keys, batch.images, batch.tokens.to_list(), strict=True):
        number = int(key[1:])
        assert f"picture number {' '.join(str(number))}" in Tokenizer().decode(tokens)
        original = photo(number, 48)
        window = crop_window(*original.size, np.full(DRAWS, 0.5), always_central)
        part = original.crop((window.left, window.top, window.left + window.width, window.top + window.height))
        expected = torch.from_numpy(np.array(part.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        assert (image.float() - expected).abs().mean() < 8  # what JPEG costs


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_any_number_of_ranks_and_workers_gives_the_same_global_batches(shards, decoder, device):
    options = {"batch_size": 24, "decoder": decoder, "device": device, **SMALL}
    expected = content(take(build_loader(shards, num_workers=0, **options), 7))
    for world_size, workers in [(1, 1), (1, 3), (2, 0), (3, 1), (8, 0)]:
        parts = [
            build_loader(shards, rank=rank, world_size=world_size, num_workers=workers, **options)
            for rank in range(world_size)
        ]
        rows = [content(take(part, 7)) for part in parts]
        assert sum(map(len, rows)) == 7 * 24
        assert same({key: value for part in rows for key, value in part.items()}, expected), (world_size, workers)


@pytest.mark.parametrize("decoder", ["pil", "dali"])
@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_resume_inside_an_epoch_gives_identical_samples_and_pixels(shards, stop, decoder):
    options = {"batch_size": 24, "decoder": decoder, **SMALL}
    expected = content(take(build_loader(shards, num_workers=0, **options), 12)[stop:])
    first = build_loader(shards, num_workers=2, **options)
    take(first, stop)
    state = first.state_dict()
    assert all(isinstance(value, int) for value in state.values())
    assert len(state) == 4
    rows = {}
    for rank in range(2):  # goes on with other ranks and workers
        second = build_loader(shards, rank=rank, world_size=2, num_workers=1, **options)
        second.load_state_dict(state)
        rows |= content(take(second, 12 - stop))
    assert same(rows, expected)


def test_resume_costs_the_same_anywhere(shards):
    loader = build_loader(shards, batch_size=24, num_workers=0, **SMALL)
    state = loader.state_dict()
    seconds = []
    for step in (0, 10**15):
        loader.load_state_dict({**state, "step": step})
        start = time.perf_counter()
        assert take(loader, 1)[0].step == step
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < seconds[0] + 0.5


def test_iterating_again_goes_on(shards):
    loader = build_loader(shards, batch_size=24, num_workers=1, **SMALL)
    assert [batch.step for batch in take(loader, 3) + take(loader, 2)] == [0, 1, 2, 3, 4]


def test_foreign_state_is_refused_with_the_reason(shards, tmp_path):
    state = build_loader(shards, batch_size=24, num_workers=0, **SMALL).state_dict()
    with pytest.raises(DataError, match=r"seed was 0 .* is 1 now"):
        build_loader(shards, batch_size=24, num_workers=0, seed=1, **SMALL).load_state_dict(state)
    with pytest.raises(DataError, match=r"batch_size was 24 .* is 12 now"):
        build_loader(shards, batch_size=12, num_workers=0, **SMALL).load_state_dict(state)
    write_shards(tmp_path, 6, 20, 48)
    with pytest.raises(DataError, match=r"fingerprint was .* Shards \(names, contents, weights\)"):
        build_loader(tmp_path, batch_size=24, num_workers=0, **SMALL).load_state_dict(state)
    with pytest.raises(DataError, match=r"fingerprint was .* block and window"):
        build_loader(shards, batch_size=24, num_workers=0, **{**SMALL, "block": 5}).load_state_dict(state)
    for damage in ({"step": -1}, {"step": 2**64}, {"step": "3"}, {"seed": 0.5}):
        (name,) = damage
        with pytest.raises(DataError, match=f"no valid '{name}'"):
            build_loader(shards, batch_size=24, num_workers=0, **SMALL).load_state_dict({**state, **damage})
    with pytest.raises(DataError, match="no valid 'step'"):
        build_loader(shards, batch_size=24, num_workers=0, **SMALL).load_state_dict({})


def test_a_state_of_other_data_is_refused_also_from_a_file(shards, tmp_path):
    other = build_loader("synthetic", batch_size=24, num_workers=0, image_size=32)
    other.load_state_dict({**other.state_dict(), "step": 7})
    (tmp_path / "state").write_bytes(pickle.dumps(other.state_dict()))
    loader = build_loader(shards, batch_size=24, num_workers=0, **SMALL)
    with pytest.raises(DataError, match="cannot resume the data: fingerprint was"):
        loader.load_state_dict(pickle.loads((tmp_path / "state").read_bytes()))
    assert loader.state_dict()["step"] == 0


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_any_seed_of_64_bits(shards, seed):
    first, again, other = (
        content(take(build_loader(shards, batch_size=24, num_workers=0, seed=s, **SMALL), 2))
        for s in (seed, seed, abs(seed) - 5)
    )
    assert same(first, again)
    assert first.keys() != other.keys()


def test_closing_twice_and_iterating_twice(shards):
    loader = build_loader(shards, batch_size=24, num_workers=1, **SMALL)
    loader.close()  # never begun
    first = iter(loader)
    assert next(first).step == 0
    second = iter(loader)
    assert next(first, None) is None  # the first one has ended
    assert next(second).step == 1
    loader.close()
    loader.close()
    assert next(second, None) is None
    assert next(iter(loader)).step == 2
    loader.close()


def test_epochs_draw_new_crops(shards):
    loader = build_loader(shards, batch_size=126, num_workers=0, prefix_probability=0, **SMALL)
    first, second = (content([batch]) for batch in take(loader, 2))
    equal = [(first[0, key][0] == second[1, key][0]).all().item() for _, key in first]
    assert sum(equal) < 20
    assert all(first[0, key][1] == second[1, key][1] for _, key in first)


def test_the_trainers_random_state_is_left_alone(shards):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    take(build_loader(shards, batch_size=24, num_workers=1, **SMALL), 2)
    assert (torch.rand(4) == expected).all()


def defects():
    """Members of samples that are all bad, each in its own way."""
    jpeg = encoded(photo(0, 48))
    text = b'{"subreddit": "cats", "caption": "c"}'
    return {
        "truncated": (jpeg[:-300], text),
        "zero": (b"", text),
        "html": (b"<html>404</html>", text),
        "header": (jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9", text),  # looks complete, until DALI decodes it
        "tables": (jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :], text),  # likewise: the quantisation tables are missing
        "nojson": (jpeg, None),
        "badjson": (jpeg, b'{"caption": '),
        "nocaption": (jpeg, b'{"subreddit": "cats"}'),
        "latin1": (jpeg, '{"caption": "Männlein"}'.encode("latin-1")),
        "noimage": (None, text),
    }


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory):
    """Good samples with one of every defect among them, a truncated, an empty and a foreign shard."""
    folder = tmp_path_factory.mktemp("bad")
    members = [m for i in range(20) for m in sample(i, 48)]
    for name, (image, text) in defects().items():
        members += [(f"{name}.jpg", image)] if image is not None else []
        members += [(f"{name}.json", text)] if text is not None else []
    members += sample(0, 48)  # a key that was there before
    write_tar(folder / "a.tar", members + [m for i in range(20, 40) for m in sample(i, 48)])
    whole = write_tar(folder / "b.tar", [m for i in range(40, 60) for m in sample(i, 48)])
    whole.write_bytes(whole.read_bytes()[: whole.read_bytes().index(b"k00055.jpg") + 700])
    write_tar(folder / "c.tar", [])
    (folder / "d.tar").write_bytes(b"")
    (folder / "e.tar").write_bytes(b"no archive" * 200)
    write_tar(folder / "f.tar", [(f"empty{i}.jpg", encoded(photo(i, 48))) for i in ()] + sample(60, 48))
    return folder


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_bad_samples_are_counted_logged_once_and_replaced(bad_shards, decoder, device, caplog):
    options = {"batch_size": 22, "decoder": decoder, "device": device, "max_bad_fraction": 0.5, **SMALL}
    loader = build_loader(bad_shards, num_workers=2, **options)
    assert loader.num_samples == 40 + len(defects()) + 1 + 16 + 1  # the last of b.tar is cut
    batches = take(loader, 9)
    assert all(len(batch.keys) == 22 for batch in batches)
    keys = {key for batch in batches for key in batch.keys}
    assert keys <= {f"k{i:05d}" for i in range(61)} - {"k00055"}
    report = loader.report()
    assert report["bad"] >= 3 * 10
    assert set(report["reasons"]) >= {
        "cannot be decoded",
        "image of zero bytes",
        "not an image",
        "no caption member (.json or .txt)",
        "invalid JSON",
        "no caption in the JSON",
        "caption is not UTF-8",
        "no image member",
        "key occurs twice in its shard",
        "the shard ends inside this sample",
    }
    lines = [record.getMessage() for record in caplog.records if "bad sample replaced" in record.getMessage()]
    assert len(lines) == len(set(lines))
    assert any("badjson in" in line and "a.tar" in line for line in lines)
    if decoder == "dali":
        assert report["dali_fallbacks"] > 0

    rows = {}
    for rank in range(2):  # the replacements do not depend on ranks, workers or where a run resumed
        part = build_loader(bad_shards, rank=rank, world_size=2, num_workers=0, **options)
        part.load_state_dict({**part.state_dict(), "step": 2})
        rows |= content(take(part, 7))
    assert same(rows, content(batches[2:]))


def test_too_many_bad_samples_end_the_run_with_a_summary(bad_shards):
    loader = build_loader(bad_shards, batch_size=11, num_workers=1, max_bad_fraction=0.15, **SMALL)
    with pytest.raises(DataError, match=r"of \d+ samples were bad, more than max_bad_fraction=0.15 allows") as error:
        take(loader, 50)
    assert "invalid JSON" in str(error.value)
    report = loader.report()
    assert str(error.value).startswith(f"{report['bad']} of {report['seen']} samples")
    lines = str(error.value).partition("Reasons:\n")[2].splitlines()
    assert {line.split(None, 1)[1]: int(line.split()[0]) for line in lines} == report["reasons"]


def test_no_bad_sample_is_allowed_or_any_number(bad_shards, shards):
    strict = build_loader(bad_shards, batch_size=4, num_workers=0, max_bad_fraction=0, **SMALL)
    with pytest.raises(DataError, match="more than max_bad_fraction=0 allows"):
        take(strict, 17)
    assert strict.report()["seen"] < 20  # at the first one, not after a thousand
    assert len(take(build_loader(shards, batch_size=24, num_workers=0, max_bad_fraction=0, **SMALL), 6)) == 6


def test_a_set_of_mostly_bad_samples_can_be_allowed(tmp_path):
    members = [m for i in range(4) for m in sample(i, 48)]
    write_tar(tmp_path / "a.tar", members + [(f"bad{i}.jpg", b"x") for i in range(36)])
    loader = build_loader(tmp_path, batch_size=8, num_workers=0, max_bad_fraction=1, **SMALL)
    batches = take(loader, 20)
    assert {key for batch in batches for key in batch.keys} == {f"k{i:05d}" for i in range(4)}
    report = loader.report()
    assert report["seen"] - report["bad"] == 160
    assert 0.8 < report["bad"] / report["seen"] < 0.96  # of all that were looked at, as in the shard


def test_no_good_sample_at_all_is_an_error_not_a_hang(tmp_path):
    write_tar(tmp_path / "a.tar", [m for i in range(9) for m in [(f"{i}.jpg", b"x"), (f"{i}.json", b"{}")]])
    with pytest.raises(DataError, match="no good sample found"):
        take(build_loader(tmp_path, batch_size=3, num_workers=0, max_bad_fraction=1.0, **SMALL), 1)


def test_a_shard_that_shrinks_during_the_run_is_survived(tmp_path):
    write_shards(tmp_path, 3, 20, 48)
    loader = build_loader(tmp_path, batch_size=10, num_workers=0, max_bad_fraction=0.9, **SMALL)
    take(loader, 1)
    shard = tmp_path / "shard_00001.tar"
    shard.write_bytes(shard.read_bytes()[:30_000])
    batches = take(loader, 5)
    assert all(len(batch.keys) == 10 for batch in batches)
    assert any("shrank since it was indexed" in reason for reason in loader.report()["reasons"])


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_closing_ends_processes_and_threads(shards, decoder):
    def threads():
        return len(os.listdir("/proc/self/task"))

    take(build_loader(shards, batch_size=24, num_workers=2, decoder=decoder, **SMALL), 1)  # what libraries start once
    time.sleep(1)
    before = threads()
    for _ in range(2):
        loader = build_loader(shards, batch_size=24, num_workers=2, decoder=decoder, **SMALL)
        next(iter(loader))  # another batch is under way
        assert threads() > before
        loader.close()
        assert not multiprocessing.active_children()
        deadline = time.monotonic() + 120
        while threads() > before:  # a thread that was joined is still seen for a moment
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_rewritten_during_the_run_is_indexed_at_the_next_start(tmp_path, workers):
    write_shards(tmp_path, 3, 20, 48)
    loader = build_loader(tmp_path, batch_size=10, num_workers=workers, max_bad_fraction=1, **SMALL)
    take(loader, 1)
    state = loader.state_dict()
    write_tar(tmp_path / "shard_00001.tar", [m for i in range(700, 710) for m in sample(i, 64)])  # other sizes
    batches = take(loader, 5)
    assert all(len(batch.keys) == 10 for batch in batches)
    assert loader.report()["bad"] > 0  # what lies at the old places is no sample
    with pytest.raises(DataError, match="fingerprint"):
        build_loader(tmp_path, batch_size=10, num_workers=0, **SMALL).load_state_dict(state)


def test_a_shard_that_becomes_a_folder_during_the_run_is_survived(tmp_path):
    write_shards(tmp_path, 3, 20, 48)
    loader = build_loader(tmp_path, batch_size=10, num_workers=1, max_bad_fraction=1, **SMALL)
    (tmp_path / "shard_00001.tar").unlink()
    (tmp_path / "shard_00001.tar").mkdir()
    take(loader, 6)
    assert any("cannot be read" in reason for reason in loader.report()["reasons"])


def exhaust(batches):
    for _ in range(100):
        next(batches)


def test_killed_worker_is_reported_by_name(shards):
    loader = build_loader(shards, batch_size=24, num_workers=2, **SMALL)
    batches = iter(loader)
    next(batches)
    pid = loader._workers.pids()[1]
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=rf"loader worker 1 \(pid {pid}\) died \(SIGKILL.*sample k\d+ of .*shard_\d+\.tar"
    ):
        exhaust(batches)
    assert time.monotonic() - start < 60  # within the minute that is promised
    assert len(take(loader, 1)) == 1  # a caller that wants to can go on


def test_stalled_worker_is_reported_by_name_and_ended(shards):
    loader = build_loader(shards, batch_size=24, num_workers=2, timeout=10, **SMALL)
    batches = iter(loader)
    next(batches)
    pid = loader._workers.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=rf"worker 0 \(pid {pid}\) has delivered nothing for 10 s.*at step \d+, sample"):
        exhaust(batches)
    assert not os.path.exists(f"/proc/{pid}")


def test_workers_do_not_outlive_a_killed_trainer(shards):
    code = f"""
import sys
from meru_fast.data import build_loader
loader = build_loader({str(shards)!r}, batch_size=24, num_workers=2, image_size=32)
next(iter(loader))
print(*loader._workers.pids(), flush=True)
sys.stdin.read()
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = trainer.stdout.readline().split()
    assert len(pids) == 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_an_interpreter_ends_although_a_loader_is_open(shards):
    code = f"""
import os, signal
from meru_fast.data import build_loader
loader = build_loader({str(shards)!r}, batch_size=24, num_workers=2, image_size=32)
batches = iter(loader)
next(batches)
pids = loader._workers.pids()
os.kill(pids[1], signal.SIGTERM)  # as a scheduler's warning to all processes of a job
for _ in range(4):
    next(batches)
os.kill(pids[0], signal.SIGSTOP)
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_more_workers_than_shards_and_batches(tmp_path):
    write_shards(tmp_path, 1, 8, 48)
    assert [batch.step for batch in take(build_loader(tmp_path, batch_size=8, num_workers=4, **SMALL), 6)] == [
        *range(6)
    ]


def test_weighted_sets(shards, tmp_path):
    write_shards(tmp_path, 1, 30, 48, first=1000)
    mix = [{"shards": shards, "weight": 3}, {"shards": str(tmp_path), "weight": 1}]
    loader = build_loader(mix, batch_size=16, num_workers=0, **SMALL)
    batches = take(loader, 20)
    seen = []
    for batch in batches:
        second = [key for key in batch.keys if int(key[1:]) >= 1000]
        assert len(second) == 4
        assert 0 < sum(int(key[1:]) >= 1000 for key in batch.keys[:8]) < 4  # also mixed within the batch
        seen += second
    assert len(set(seen[:28])) == 28  # the small set has epochs of its own
    assert set(seen) == {f"k{i:05d}" for i in range(1000, 1030)}

    resumed = build_loader(mix, batch_size=16, num_workers=1, **SMALL)
    resumed.load_state_dict({**loader.state_dict(), "step": 9})
    assert same(content(take(resumed, 5)), content(batches[9:14]))
    parts = [build_loader(mix, batch_size=16, rank=r, world_size=8, num_workers=0, **SMALL) for r in range(8)]
    rows = {key: value for part in parts for key, value in content(take(part, 3)).items()}
    assert same(rows, content(batches[:3]))
    other = build_loader([{**mix[0], "weight": 1}, mix[1]], batch_size=16, num_workers=0, **SMALL)
    with pytest.raises(DataError, match="fingerprint"):
        other.load_state_dict(loader.state_dict())


def test_sets_without_weights_count_by_their_size(shards, tmp_path):
    write_shards(tmp_path, 1, 42, 48, first=1000)
    loader = build_loader([{"shards": shards}, {"shards": tmp_path}], batch_size=16, num_workers=0, **SMALL)
    (batch,) = take(loader, 1)
    assert sum(int(key[1:]) >= 1000 for key in batch.keys) == 4


def test_synthetic():
    loader = build_loader("synthetic", batch_size=32, num_workers=1, num_samples=5000, image_size=24)
    first, second = take(loader, 2)
    assert loader.num_samples == 5000
    assert first.images.shape == (32, 3, 24, 24)
    assert 100 < first.images.float().mean() < 155
    assert len({image.sum().item() for image in first.images}) == 32
    assert not set(first.keys) & set(second.keys)
    assert all(7 <= length <= 22 for length in first.tokens.lengths)
    again = take(build_loader("synthetic", batch_size=32, num_workers=0, num_samples=5000, image_size=24), 2)
    assert same(content([first, second]), content(again))


def test_remote_shards_give_the_same_batches(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MERU_FAST_CACHE", str(tmp_path))
    fsspec.filesystem("memory").put(f"{shards}/", "/loader/", recursive=True)
    expected = content(take(build_loader(shards, batch_size=24, num_workers=0, **SMALL), 7))
    for workers in (0, 2):
        loader = build_loader("memory://loader/*.tar", batch_size=24, num_workers=workers, **SMALL)
        assert same(content(take(loader, 7)), expected)
    cached = list((tmp_path / "blocks").iterdir())
    assert len(cached) == 6 * 6  # every block of 4 samples once, however many workers asked for it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 25, "world_size": 2}, "batch size 25 cannot be shared equally by 2 ranks"),
        ({"batch_size": 4, "world_size": 8}, "batch size 4 cannot be shared equally by 8 ranks"),
        ({"batch_size": 0}, "batch size 0 cannot be shared"),
        ({"batch_size": 24, "rank": 2, "world_size": 2}, "got rank 2 of world_size 2"),
        ({"batch_size": 24, "world_size": 0}, "got rank 0 of world_size 0"),
        ({"batch_size": 24, "num_workers": -1}, "num_workers must be from 0 .*got -1"),
        ({"batch_size": 24, "image_size": 0}, "image_size must be from 1 .*got 0"),
        ({"batch_size": 24, "context_length": 1}, "context_length must be from 2 .*got 1"),
        ({"batch_size": 24, "prefix_probability": 50}, "prefix_probability must be from 0 to 1, got 50"),
        ({"batch_size": 24, "crop_scale": (0.9, 0.1)}, r"crop_scale must be .*got \(0.9, 0.1\)"),
        ({"batch_size": 24, "crop_scale": [0.5]}, r"crop_scale must be two .*got \[0.5\]"),
        ({"batch_size": 24, "timeout": 0}, "timeout must be from 1 .*got 0"),
        ({"batch_size": 4, "shards": "synthetic", "num_samples": 0}, "num_samples must be from 1 .*got 0"),
        ({"batch_size": 24, "shards": None}, "shards must be a folder.*got None"),
        ({"batch_size": 24, "shards": []}, "no shards match ''"),
        ({"batch_size": 24, "shards": [{"weight": 1}]}, "no key 'shards'"),
        ({"batch_size": 4, "shards": {"shards": "synthetic", "weight": float("nan")}}, "weights .*nan"),
        ({"batch_size": 24, "seed": 2**64}, "seed must be from .*got 18446744073709551616"),
        ({"batch_size": 24, "max_bad_fraction": -0.1}, "max_bad_fraction must be from 0 to 1, got -0.1"),
        ({"batch_size": 24, "max_bad_fraction": 5}, "max_bad_fraction must be from 0 to 1, got 5"),
        ({"batch_size": 24, "window": 2}, "need 1 <= block <= window, got block 4 and window 2"),
        ({"batch_size": 4, "shards": {"shards": "synthetic", "weight": -1}}, "weights .* must be positive"),
        ({"batch_size": 24, "decoder": "opencv"}, "unknown decoder 'opencv'.*auto, pil, dali"),
        ({"batch_size": 200}, "126 samples cannot fill a batch of 200"),
        ({"batch_size": 24, "shards": [{"shards": "x", "wieght": 1}]}, "unknown key 'wieght'"),
        ({"batch_size": 24, "shards": [{"shards": "synthetic"}, "x"]}, "none of them"),
        ({"batch_size": 4, "shards": [{"shards": "synthetic", "weight": w} for w in (1, 99)]}, "gets no sample"),
    ],
)
def test_impossible_options(shards, options, message):
    with pytest.raises((ValueError, DataError), match=message):
        build_loader(**{"shards": shards, "num_workers": 0, **SMALL, **options})


def test_an_empty_folder_and_empty_shards(tmp_path):
    with pytest.raises(DataError, match=rf"no shards match '{tmp_path}'"):
        build_loader(tmp_path, batch_size=4, num_workers=0, **SMALL)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no samples in .*a\.tar$"):
        build_loader(tmp_path, batch_size=4, num_workers=0, **SMALL)


def test_a_gpu_that_is_not_there_is_one_error(shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda:1', but no GPU is there"):
        build_loader(shards, batch_size=24, device="cuda:1", **SMALL)


def test_dali_that_is_not_installed_is_one_error(shards, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "dali" in name else found(name, *rest))
    with pytest.raises(DataError, match=r"needs NVIDIA DALI: pip install 'meru_fast\[dali\]', or use decoder='pil'"):
        build_loader(shards, batch_size=24, num_workers=0, decoder="dali", **SMALL)
    assert len(take(build_loader(shards, batch_size=24, num_workers=0, decoder="auto", **SMALL), 1)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_batches_arrive_on_the_gpu(shards, decoder):
    options = {"batch_size": 24, **SMALL}
    expected = content(take(build_loader(shards, num_workers=0, **options), 7))
    batches = take(build_loader(shards, num_workers=2, device="cuda", decoder=decoder, **options), 7)
    for batch in batches:
        assert batch.images.device.type == batch.tokens.ids.device.type == batch.tokens.cu_seqlens.device.type == "cuda"
    rows = content(batches)
    assert rows.keys() == expected.keys()
    for key, (image, tokens) in rows.items():
        assert tokens == expected[key][1]
        assert (image.cpu().float() - expected[key][0]).abs().mean() < 1
