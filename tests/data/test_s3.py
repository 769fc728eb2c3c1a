"""Shards behind the real S3 protocol: s3fs, HTTP, byte ranges, forked workers. The server is moto's, here."""

import uuid

import boto3
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from shard_factory import write_shards

from meru_fast.data import build_loader
from meru_fast.data.errors import DataError
from meru_fast.data.index import open_shards

SMALL = {"batch_size": 8, "image_size": 32, "block": 4, "window": 32}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    write_shards(folder, shards=3, per_shard=10, longer=48)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A server, which s3fs finds by the environment, as it does at home."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield boto3.client("s3")
    server.stop()


@pytest.fixture
def bucket(client, shards, tmp_path, monkeypatch):
    """A bucket of the test's own with the shards."""
    monkeypatch.setenv("MERU_FAST_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    for path in sorted(shards.glob("*.tar")):
        client.upload_file(str(path), name, f"redcaps/{path.name}")
    return name


def batches(shards, count, **options):
    loader = build_loader(shards, **SMALL, **options)
    taken = [batch for batch, _ in zip(loader, range(count), strict=False)]
    loader.close()
    return taken


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_disk(shards, bucket, workers):
    expected = batches(shards, 5, num_workers=0)
    found = batches(f"s3://{bucket}/redcaps/*.tar", 5, num_workers=workers)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.tokens.ids, theirs.tokens.ids)


def test_index_and_what_is_missing(client, bucket):
    for spec in [f"s3://{bucket}/redcaps", f"s3://{bucket}/redcaps/shard_{{00000..00002}}.tar"]:
        found = open_shards(spec, progress=False)
        assert [found.key(i) for i in range(len(found))] == [f"k{i:05d}" for i in range(30)]
    with pytest.raises(DataError, match=r"shard_00007\.tar"):
        open_shards(f"s3://{bucket}/redcaps/shard_00007.tar", progress=False)
    client.delete_object(Bucket=bucket, Key="redcaps/shard_00001.tar")
    with pytest.raises(DataError, match=r"shard_00001\.tar was indexed and is gone"):
        open_shards(f"s3://{bucket}/redcaps", progress=False)


def test_a_server_that_does_not_answer_is_one_error(client, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(DataError, match=r"s3://absent/\*\.tar cannot be listed: .*127\.0\.0\.1:1"):
            open_shards("s3://absent/*.tar", progress=False)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_an_object_that_vanishes_costs_its_samples(client, bucket):
    loader = build_loader(f"s3://{bucket}/redcaps", num_workers=1, max_bad_fraction=1.0, **SMALL)
    client.delete_object(Bucket=bucket, Key="redcaps/shard_00001.tar")
    for _, batch in zip(range(6), loader, strict=False):
        assert not {f"k{i:05d}" for i in range(10, 20)} & set(batch.keys)
    assert loader.report()["bad"] > 0
    loader.close()


def test_blocks_that_a_power_cut_shortened_are_fetched_again(shards, bucket, tmp_path):
    expected = batches(shards, 5, num_workers=0)
    batches(f"s3://{bucket}/redcaps", 5, num_workers=0)
    blocks = list((tmp_path / "cache" / "blocks").iterdir())
    for number, block in enumerate(blocks):
        block.write_bytes(block.read_bytes()[: 100 * (number % 2)])
    loader = build_loader(f"s3://{bucket}/redcaps", num_workers=0, **SMALL)
    for ours, theirs in zip(loader, expected, strict=False):
        assert torch.equal(ours.images, theirs.images)
    loader.close()
    assert loader.report()["bad"] == 0


def test_a_cache_that_cannot_be_written_is_one_error(bucket, tmp_path):
    loader = build_loader(f"s3://{bucket}/redcaps", num_workers=1, **SMALL)
    (tmp_path / "cache" / "blocks").write_text("a file in its place")
    with pytest.raises(DataError, match=r"the cache of remote shards .*blocks cannot be written.*MERU_FAST_CACHE"):
        next(iter(loader))
