"""Batches by number: what loader workers run.

`dataset[step]` is this rank's part of global batch `step`, a pure function of (seed, step): the order, the crops, the
caption prefixes and the replacements of bad samples are all computed from the numbers, never drawn from a state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from meru_fast.data import captions, decode, keyed, order
from meru_fast.data.errors import BadSampleError, DataError
from meru_fast.data.order import EpochOrder
from meru_fast.data.samples import Samples, SyntheticSamples
from meru_fast.data.transforms import DRAWS, Window, crop_window
from meru_fast.tokenizer import CONTEXT_LENGTH, PackedTokens, Tokenizer

MAX_REPLACEMENTS = 1000


class Origin(NamedTuple):
    """Where a row of a batch comes from."""

    set: int
    epoch: int
    sample: int


class Defect(NamedTuple):
    """A bad sample that was met and replaced."""

    shard: str
    key: str
    reason: str


@dataclass
class Encoded:
    """JPEGs of a batch that a DALI pipeline is to decode.

    Attributes:
        data: uint8 [total], the files end to end.
        sizes: bytes of each file.
        windows: the crop of each.
        rows: the row of the batch that each belongs to.
    """

    data: Tensor
    sizes: list[int]
    windows: list[Window]
    rows: list[int]

    def files(self) -> list[Tensor]:
        return list(self.data.split(self.sizes))


@dataclass
class LocalBatch:
    """One rank's part of a global batch, as a worker hands it over.

    Attributes:
        images: uint8 [decoded, 3, size, size], the rows that are not in `encoded`.
        tokens: the captions.
        keys: names of the samples.
        origins: where each row comes from.
        encoded: JPEGs left to DALI, if it decodes.
        defects: bad samples met on the way.
        dali_fallbacks: JPEGs that DALI could not decode.
    """

    step: int
    images: Tensor
    tokens: PackedTokens
    keys: list[str]
    origins: list[Origin]
    encoded: Encoded | None = None
    defects: list[Defect] = field(default_factory=list)
    dali_fallbacks: int = 0

    def pin_memory(self) -> "LocalBatch":
        return replace(self, images=self.images.pin_memory(), tokens=self.tokens.pin_memory())


class _Row(NamedTuple):
    """One good sample: pixels, or the JPEG and its window for DALI."""

    pixels: Tensor | None
    jpeg: bytes
    window: Window | None
    text: str
    key: str


@dataclass
class Mixture:
    """A source of samples and its part in every global batch.

    Attributes:
        samples: where they come from.
        quota: samples of a global batch.
        order: of its epochs; a last part of less than a quota is dropped, a different one each epoch.
        seed: of this source.
    """

    samples: Samples
    quota: int
    order: EpochOrder
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        return len(self.samples) // self.quota


class TrainingSet:
    """This rank's part of every global batch. See the module's text.

    Args:
        mixture: the sources, whose quotas sum to the global batch size.
        for_dali: leave plain JPEGs encoded.

    Raises:
        DataError: when asked for a batch: no good sample in place of a bad one.
    """

    def __init__(
        self,
        mixture: Sequence[Mixture],
        *,
        rank: int = 0,
        world_size: int = 1,
        image_size: int = 224,
        crop_scale: Sequence[float] = (0.5, 1.0),
        prefix_probability: float = captions.PREFIX_PROBABILITY,
        context_length: int = CONTEXT_LENGTH,
        for_dali: bool = False,
    ):
        self.mixture = list(mixture)
        self.rank = rank
        self.world_size = world_size
        self.image_size = image_size
        self.crop_scale = tuple(crop_scale)
        self.prefix_probability = prefix_probability
        self.context_length = context_length
        self.for_dali = for_dali
        self.tokenizer = Tokenizer()
        self.on_sample: Callable[[int, int, int], None] | None = None  # told (step, source, sample) before each read

    @property
    def batch_size(self) -> int:
        """Global batch size."""
        return sum(part.quota for part in self.mixture)

    def __getitem__(self, step: int) -> LocalBatch:
        origins = self.origins(step)
        rows, defects = [], []
        for origin in origins:
            row, met = self._good_row(step, origin)
            rows.append(row)
            defects += met
        pixels = [row.pixels for row in rows if row.pixels is not None]
        images = torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size).byte()
        tokens = self._tokenize([row.text for row in rows])
        return LocalBatch(step, images, tokens, [row.key for row in rows], origins, _encoded(rows), defects)

    def warm_up(self) -> None:
        """Load vocabularies and word counts in this process, so that the workers it forks share one copy."""
        self.tokenizer("warm up")
        for part in self.mixture:
            if subreddit := part.samples.example_subreddit():
                captions.segment(subreddit)

    def origins(self, step: int, prefetch: bool = True) -> list[Origin]:
        """What this rank takes from global batch `step`, before any replacement."""
        picks = []
        for part in self.mixture:
            epoch, batch = divmod(step, part.batches_per_epoch)
            picks.append((epoch, part.order[epoch, batch * part.quota, (batch + 1) * part.quota]))
        # Sources take turns through the batch, so that every rank and every micro-batch has its part of each.
        turns = np.concatenate([np.arange(part.quota) / part.quota for part in self.mixture])
        block_turns = np.concatenate([_ranks(picked.slots) / len(picked.slots) for _, picked in picks])
        mine = order.rank_share(block_turns, self.rank, self.world_size)
        mine = mine[np.argsort(turns[mine], kind="stable")]

        sources = np.repeat(np.arange(len(picks)), [part.quota for part in self.mixture])[mine]
        samples = np.concatenate([picked.samples for _, picked in picks])[mine]
        if prefetch:
            slots = np.concatenate([picked.slots for _, picked in picks])[mine]
            for source, part in enumerate(self.mixture):
                epoch, batch = divmod(step, part.batches_per_epoch)
                part.samples.prefetch(part.order, epoch, slots[sources == source])
                stretch = (epoch, batch * part.quota, (batch + 1) * part.quota)
                part.samples.prefetch(part.order, *part.order.upcoming(*stretch, self.rank, self.world_size))
        pairs = zip(sources.tolist(), samples.tolist(), strict=True)
        return [Origin(source, picks[source][0], sample) for source, sample in pairs]

    def replacement(self, batch: LocalBatch, row: int, reason: str) -> Tensor:
        """Pixels of the next good sample, for a row that proved bad only after its batch was made.

        The batch gets its key and its caption.
        """
        origin = batch.origins[row]
        good, met = self._good_row(batch.step, origin, bad=reason, for_dali=False)
        batch.keys[row] = good.key
        batch.defects += met
        tokens = batch.tokens.to("cpu").to_list()
        tokens[row] = self._tokenize([good.text]).ids
        batch.tokens = PackedTokens.from_list(tokens, self.context_length)
        assert good.pixels is not None  # as DALI is not to decode it
        return good.pixels

    def _good_row(
        self, step: int, origin: Origin, *, bad: str = "", for_dali: bool | None = None
    ) -> tuple[_Row, list[Defect]]:
        """This sample, or if it is bad the next good one of a fixed chain that starts at it.

        The chain jumps through the whole set: a broken shard is replaced from all over, not by its one neighbour.
        """
        part = self.mixture[origin.set]
        defects: list[Defect] = []
        for attempt in range(MAX_REPLACEMENTS):
            sample = origin.sample
            if attempt:
                place = (part.seed, origin.epoch, origin.sample, keyed.REPLACEMENT, attempt)
                sample = int(keyed.bits(*place) % np.uint64(len(part.samples)))
            if self.on_sample:
                self.on_sample(step, origin.set, sample)
            try:
                if bad and not attempt:
                    raise BadSampleError(bad)
                return self._load(part, origin.epoch, sample, self.for_dali if for_dali is None else for_dali), defects
            except BadSampleError as error:
                defects.append(Defect(*part.samples.name(sample), str(error)))
        shard, key, reason = defects[0]
        raise DataError(f"{shard}: no good sample found in place of {key} ({reason}) after {MAX_REPLACEMENTS} attempts")

    def _load(self, part: Mixture, epoch: int, sample: int, for_dali: bool) -> _Row:
        key = part.samples.name(sample)[1]
        if isinstance(part.samples, SyntheticSamples):
            pixels = part.samples.image(sample, self.image_size)
            return _Row(pixels, b"", None, part.samples.caption(sample).text, key)
        raw = part.samples.read(sample)
        prefix_draw = float(keyed.uniform(part.seed, epoch, sample, keyed.PREFIX))
        text = captions.compose(raw.caption, prefix_draw, self.prefix_probability)
        image = decode.open_image(raw.image)
        draws = keyed.uniform(part.seed, epoch, sample, keyed.CROP, np.arange(DRAWS))
        window = crop_window(*image.size, draws, self.crop_scale)
        if for_dali and _is_plain_jpeg(image, raw.image):
            return _Row(None, raw.image, window, text, key)
        return _Row(decode.crop_and_resize(image, window, self.image_size), b"", None, text, key)

    def _tokenize(self, texts: list[str]) -> PackedTokens:
        return PackedTokens.from_list(self.tokenizer(texts), self.context_length)


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place that each value takes when they are sorted."""
    places = np.empty(len(values), np.int64)
    places[np.argsort(values, kind="stable")] = np.arange(len(values))
    return places


def _is_plain_jpeg(image: Image, data: bytes) -> bool:
    """A complete JPEG in grey or YCbCr, of which all decoders make the same. All others are decoded by Pillow at once.

    That colours are stored as RGB only Adobe's marker or the names of the components tell, which a decoder may ignore.
    """
    if type(image) is not JpegImageFile or not data.endswith(b"\xff\xd9"):  # not its subclass for several in a file
        return False
    components = bytes(component[0] for component in image.layer)
    stored_as_rgb = image.info.get("adobe_transform") == 0 or components == b"RGB"
    return image.mode == "L" or (image.mode == "RGB" and not stored_as_rgb)


def _encoded(rows: list[_Row]) -> Encoded | None:
    left = [position for position, row in enumerate(rows) if row.jpeg]
    if not left:
        return None
    files = [rows[position].jpeg for position in left]
    data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    windows = [window for position in left if (window := rows[position].window) is not None]
    return Encoded(data, [len(file) for file in files], windows, left)
