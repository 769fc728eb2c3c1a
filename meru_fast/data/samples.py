"""Where samples come from: a set of shards, or nowhere at all (synthetic)."""

import contextlib
from typing import NamedTuple

import numpy as np
import torch

from meru_fast.data import captions, keyed
from meru_fast.data.captions import Caption
from meru_fast.data.errors import BadSampleError
from meru_fast.data.index import DEFECTS, TXT, ShardSet
from meru_fast.data.order import EpochOrder
from meru_fast.data.remote import RemoteReader
from meru_fast.data.shards import ShardReader, is_remote


class Raw(NamedTuple):
    """A sample as stored: the encoded image and its caption."""

    image: bytes
    caption: Caption


class ShardSamples:
    """Samples of a shard set, read by number."""

    def __init__(self, shards: ShardSet):
        self.shards = shards
        self.starts = shards.starts
        self.fingerprint = shards.fingerprint
        self._local, self._remote = ShardReader(), RemoteReader()

    def __len__(self) -> int:
        return len(self.shards)

    def reopen(self) -> None:
        """Drop open files and threads: they are the parent's, this is a new worker."""
        self._local, self._remote = ShardReader(), RemoteReader()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_local", "_remote")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.reopen()

    def name(self, sample: int) -> tuple[str, str]:
        """Shard and key, for messages."""
        return self.shards.paths[self.shards.shard_of(sample)], self.shards.key(sample)

    def example_subreddit(self) -> str | None:
        """The subreddit of a first sample, if these have any."""
        for sample in range(min(10, len(self))):
            with contextlib.suppress(BadSampleError):
                return self.read(sample).caption.subreddit
        return None

    def prefetch(self, order: EpochOrder, epoch: int, slots: np.ndarray) -> None:
        """Announce whole blocks that are about to be read, so that the disk reads them in one go."""
        for slot in np.unique(slots).tolist():
            path, start, stop = self.shards.extent(*order.block(epoch, slot))
            try:
                self._reader(path).prefetch(path, start, stop)
            except OSError:
                return  # the read that follows will say what is wrong, with the sample's name

    def read(self, sample: int) -> Raw:
        """Image bytes and caption.

        Raises:
            BadSampleError: a defect that the index knows, an unreadable range, or a bad caption.
        """
        place = self.shards.locate(sample)
        for flag, reason in DEFECTS.items():
            if place.flags & flag:
                raise BadSampleError(reason)
        image = self._bytes(place.shard, place.image_offset, place.image_size)
        text = self._bytes(place.shard, place.text_offset, place.text_size)
        return Raw(image, captions.parse(text, bool(place.flags & TXT)))

    def _reader(self, path: str) -> ShardReader | RemoteReader:
        return self._remote if is_remote(path) else self._local

    def _bytes(self, path: str, offset: int, size: int) -> bytes:
        try:
            data = self._reader(path).read(path, offset, size)
        except OSError as error:
            raise BadSampleError(f"cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise BadSampleError(f"the shard shrank since it was indexed: {len(data):,} of {size:,} bytes")
        return data


class SyntheticSamples:
    """Noise images and captions of plausible length, for throughput runs that must not wait for files.

    Its "shards" hold 1,000 samples each, so that the order is computed as for real data.
    """

    WORDS = ("a", "photo", "of", "the", "small", "red", "old", "house", "dog", "on", "grass", "under", "blue", "sky")

    def __init__(self, num_samples: int):
        self.starts = np.append(np.arange(0, num_samples, 1000), num_samples).astype(np.int64)
        self.fingerprint = num_samples

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, sample: int) -> tuple[str, str]:
        return "synthetic", str(sample)

    def reopen(self) -> None:
        """Nothing is open."""

    def example_subreddit(self) -> None:
        """There are none."""

    def prefetch(self, order: EpochOrder, epoch: int, slots: np.ndarray) -> None:
        """Nothing to read ahead."""

    def image(self, sample: int, size: int) -> torch.Tensor:
        """uint8 noise [3, size, size]."""
        words = -(-3 * size * size // 8)
        noise = keyed.bits(keyed.SYNTHETIC, sample, np.arange(words))
        return torch.from_numpy(noise.view(np.uint8)[: 3 * size * size].reshape(3, size, size))

    def caption(self, sample: int) -> Caption:
        """5 to 20 words."""
        draws = keyed.bits(keyed.SYNTHETIC, sample, np.arange(1, 22)) >> np.uint64(40)
        count = 5 + int(draws[0]) % 16
        return Caption(" ".join(self.WORDS[int(draw) % len(self.WORDS)] for draw in draws[1 : 1 + count]), None)


Samples = ShardSamples | SyntheticSamples
