"""Data that several tests of the evaluation look at."""

from pathlib import Path

import pytest

from meru_fast.demo import shards


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data with the fewest shards: the held-out part is whole."""
    return shards.make(tmp_path_factory.mktemp("demo") / "data", num_shards=2)
