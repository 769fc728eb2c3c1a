"""From shards to batches on the device: worker processes, decoding, prefetching, bookkeeping."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meru_fast.data import captions, keyed
from meru_fast.data.dataset import LocalBatch, Mixture, TrainingSet
from meru_fast.data.errors import DataError
from meru_fast.data.index import open_shards
from meru_fast.data.order import BLOCK_SAMPLES, WINDOW_SAMPLES, EpochOrder
from meru_fast.data.samples import Samples, ShardSamples, SyntheticSamples
from meru_fast.data.stage import DeviceStage
from meru_fast.data.workers import Workers
from meru_fast.tokenizer import CONTEXT_LENGTH, PackedTokens

log = logging.getLogger(__name__)

DECODERS = ("auto", "pil", "dali")
TIMEOUT = 55.0  # seconds without a batch before a worker counts as stalled
JUDGED = 1000  # the first samples are judged as part of this many: a share of a few means nothing
MAX_LOGGED = 1000


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, on the device.

    Attributes:
        images: uint8 [b, 3, size, size], RGB.
        tokens: the captions, packed.
        keys: names of the samples in their shards.
        epoch: passes over all samples completed before this batch.
        step: number of the global batch, from 0 at the very start of the run.
    """

    images: Tensor
    tokens: PackedTokens
    keys: list[str]
    epoch: int
    step: int


class Loader:
    """Endless batches, resumable at any step. Made by `build_loader`.

    Attributes:
        batches_per_epoch: global batches in one pass over all samples.
        num_samples: samples of all sources, bad ones included.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        *,
        num_workers: int,
        device: torch.device,
        seed: int,
        timeout: float,
        max_bad_fraction: float,
    ):
        self.dataset = dataset
        self.num_workers = num_workers
        self.device = device
        self.seed = seed
        self.timeout = timeout
        self.max_bad_fraction = max_bad_fraction
        self.num_samples = sum(len(part.samples) for part in dataset.mixture)
        self.batches_per_epoch = self.num_samples // dataset.batch_size
        self._step = 0
        self._seen = 0
        self._reasons: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()
        self._running: Generator[Batch, None, None] | None = None
        self._workers: Workers | None = None
        self._dali_fallbacks = 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current step on. One iterator at a time: a new one ends the one before.

        Raises:
            DataError: from the iterator: more bad samples than `max_bad_fraction` allows, no good one at all, or a
                worker that died, stalled or failed.
        """
        self.close()
        self._running = self._batches()
        return self._running

    def state_dict(self) -> dict[str, int]:
        """All there is to resume from: the next step, and what the order depends on."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where another loader stood, whatever its number of ranks and workers.

        Raises:
            DataError: that loader had other data, another seed or another global batch size, or this is no state.
        """
        expected = self._identity()
        for name in ("step", *expected):
            if not isinstance(state.get(name), int) or not 0 <= state["step"] < 2**62:
                raise DataError(f"the state of the data loader has no valid {name!r}: {dict(state)}")
        for name, ours in expected.items():
            if state[name] != ours:
                raise DataError(
                    f"cannot resume the data: {name} was {state[name]} when the state was saved and is {ours} now. "
                    + _RESUME_HINTS[name]
                )
        self.close()
        self._step = state["step"]

    def report(self) -> dict[str, Any]:
        """Samples seen and bad ones among them on this rank, since this loader was made, with the reasons' counts.

        With DALI also the JPEGs that it could not decode, so that Pillow had to.
        """
        counts = {"seen": self._seen, "bad": self._reasons.total(), "reasons": dict(self._reasons.most_common())}
        return counts | ({"dali_fallbacks": self._dali_fallbacks} if self.dataset.for_dali else {})

    def close(self) -> None:
        """End the workers. The state stays; iterating again continues."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _identity(self) -> dict[str, int]:
        fingerprint = 0
        for part in self.dataset.mixture:
            order = (part.order.block_samples, part.order.window_samples)
            fingerprint = int(keyed.bits(fingerprint, part.samples.fingerprint, part.quota, *order)) >> 1
        return {"seed": self.seed, "batch_size": self.dataset.batch_size, "fingerprint": fingerprint}

    def _batches(self) -> Generator[Batch, None, None]:
        # Workers first: they fork, and DALI starts threads.
        workers = Workers(self.dataset, self._step, self.num_workers, self.timeout, pin=self.device.type == "cuda")
        self._workers = workers
        try:
            stage = self._new_stage()
            ahead = _start(workers, stage)
            while True:
                batch = ahead
                images = stage.finish(batch)
                self._account(batch)
                ahead = _start(workers, stage)
                self._step = batch.step + 1
                yield Batch(images, batch.tokens, batch.keys, batch.step // self.batches_per_epoch, batch.step)
        finally:
            workers.close()

    def _new_stage(self) -> DeviceStage:
        if not self.dataset.for_dali:
            return DeviceStage(self.device)
        from meru_fast.data.dali import DaliStage

        return DaliStage(self.dataset, self.device, max(2, self.num_workers))

    def _account(self, batch: LocalBatch) -> None:
        """Count and log the bad samples of a batch; end the run when there are too many."""
        self._seen += len(batch.keys) + len(batch.defects)
        self._dali_fallbacks += batch.dali_fallbacks
        for defect in batch.defects:
            self._reasons[defect.reason.split(":")[0]] += 1
            place = (defect.shard, defect.key)
            if place not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(place)
                log.warning("bad sample replaced: %s in %s: %s", defect.key, defect.shard, defect.reason)
                if len(self._logged) == MAX_LOGGED:
                    log.warning("%d bad samples logged; further ones are only counted", MAX_LOGGED)
        bad = self._reasons.total()
        if bad > self.max_bad_fraction * max(self._seen, min(JUDGED, self.num_samples)):
            reasons = "\n".join(f"  {count:8,} {reason}" for reason, count in self._reasons.most_common())
            raise DataError(
                f"{bad:,} of {self._seen:,} samples were bad, more than max_bad_fraction={self.max_bad_fraction:g} "
                f"allows. List them with `meru-fast verify`. Reasons:\n{reasons}"
            )


def _start(workers: Workers, stage: DeviceStage) -> LocalBatch:
    """The next batch, with its decoding begun."""
    batch = next(workers)
    stage.start(batch)
    return batch


_RESUME_HINTS = {
    "seed": "Give the seed of the first run.",
    "batch_size": "Give the global batch size of the first run; ranks and workers may change.",
    "fingerprint": "Shards (names, contents, weights), block and window must be those of the first run.",
}


def build_loader(
    shards: str | os.PathLike | Sequence,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 4,
    image_size: int = 224,
    device: torch.device | str = "cpu",
    seed: int = 0,
    decoder: str = "auto",
    crop_scale: Sequence[float] = (0.5, 1.0),
    prefix_probability: float = captions.PREFIX_PROBABILITY,
    context_length: int = CONTEXT_LENGTH,
    block: int = BLOCK_SAMPLES,
    window: int = WINDOW_SAMPLES,
    max_bad_fraction: float = 0.05,
    timeout: float = TIMEOUT,
    num_samples: int = 1_000_000,
) -> Loader:
    """Training batches from shards of RedCaps or img2dataset layout.

    Global batch n is the same set of samples, with the same pixels and captions, for any number of ranks and workers.

    Args:
        shards: folder, glob, brace range, `a::b`, or list of these, local or fsspec; or a list of mappings
            `{"shards": ..., "weight": ...}` to mix sets by weight; or "synthetic" for noise that needs no files.
        batch_size: global, over all ranks.
        rank, world_size: which part of each global batch is this process's.
        num_workers: processes that read, decode and tokenise; 0 works in this one.
        image_size: side of the square output in pixels.
        device: where batches arrive.
        seed: of order, crops and caption prefixes.
        decoder: "pil" (Pillow in the workers), "dali" (DALI in this process, on `device`), or "auto": DALI on a GPU
            where it is installed, else Pillow.
        crop_scale: range of the crop's share of the image's area.
        prefix_probability: of putting the subreddit before a caption.
        context_length: tokens that a caption is cut to.
        block, window: samples read together and samples shuffled together (`meru_fast.data.order`).
        max_bad_fraction: share of bad samples above which the run ends.
        timeout: seconds without a batch before a worker counts as stalled.
        num_samples: of a synthetic set.

    Raises:
        DataError: shards that cannot be indexed (see `meru_fast.data.index.open_shards`), fewer samples than a batch,
            or DALI asked for and not installed.
        ValueError: a rank outside its world, a batch size that the ranks cannot share equally, an unknown decoder,
            weights that are negative or give a set no sample, a window smaller than a block, a GPU that is not there,
            or another argument out of its range.
    """
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; choose one of {', '.join(DECODERS)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of world_size {world_size}")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"global batch size {batch_size} cannot be shared equally by {world_size} ranks")
    for name, value, least, most in (
        ("num_workers", num_workers, 0, 1024),
        ("image_size", image_size, 1, 2**14),
        ("seed", seed, -(2**63), 2**63 - 1),
        ("context_length", context_length, 2, 2**16),
        ("num_samples", num_samples, 1, 2**40),
        ("prefix_probability", prefix_probability, 0, 1),
        ("max_bad_fraction", max_bad_fraction, 0, 1),
        ("timeout", timeout, 1, float("inf")),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {value}")
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1]:
        raise ValueError(f"crop_scale must be two positive numbers, the smaller one first, got {crop_scale}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}, but no GPU is there: use device='cpu'")
    sources = _sources(shards, num_samples, show_progress=rank == 0)
    mixture = []
    for number, (samples, quota) in enumerate(zip(*_quotas(sources, batch_size), strict=True)):
        if len(samples) < quota:
            raise DataError(
                f"{len(samples):,} samples cannot fill a batch of {quota:,}: add shards or lower batch_size"
            )
        own_seed = int(keyed.bits(seed, keyed.SET, number) >> 1)
        order = EpochOrder(samples.starts, own_seed, block=block, window=window)
        mixture.append(Mixture(samples, quota, order, own_seed))
    dataset = TrainingSet(
        mixture,
        rank=rank,
        world_size=world_size,
        image_size=image_size,
        crop_scale=crop_scale,
        prefix_probability=prefix_probability,
        context_length=context_length,
        for_dali=_uses_dali(decoder, device),
    )
    return Loader(
        dataset,
        num_workers=num_workers,
        device=device,
        seed=seed,
        timeout=timeout,
        max_bad_fraction=max_bad_fraction,
    )


def _uses_dali(decoder: str, device: torch.device) -> bool:
    """Whether DALI decodes.

    Raises:
        DataError: it was asked for and is not installed.
    """
    installed = importlib.util.find_spec("nvidia.dali") is not None if importlib.util.find_spec("nvidia") else False
    if decoder == "dali" and not installed:
        raise DataError("decoder='dali' needs NVIDIA DALI: pip install 'meru_fast[dali]', or use decoder='pil'")
    return decoder == "dali" or (decoder == "auto" and installed and device.type == "cuda")


def _sources(shards, num_samples: int, show_progress: bool) -> list[tuple[Samples, float | None]]:
    """Sample sets with their weights; a set without one weighs what it holds."""
    if isinstance(shards, str) and shards == "synthetic":
        return [(SyntheticSamples(num_samples), None)]
    if not isinstance(shards, (str, os.PathLike, Mapping, Sequence)):
        raise ValueError(f"shards must be a folder, a pattern, a mapping or a list of these, got {shards!r}")
    parts = [shards] if isinstance(shards, (str, os.PathLike, Mapping)) else list(shards)
    weighted = [part for part in parts if isinstance(part, Mapping)]
    if not weighted:
        found = open_shards(parts, progress=show_progress)
        if not len(found):
            raise DataError(f"no samples in {found.paths[0]}" + (" and all others" if len(found.paths) > 1 else ""))
        return [(ShardSamples(found), None)]
    if len(weighted) < len(parts):
        raise ValueError("shards: give all sets as {'shards': ..., 'weight': ...}, or none of them")
    sources = []
    for part in weighted:
        if unknown := set(part) - {"shards", "weight"}:
            raise ValueError(f"shards: unknown key {sorted(unknown)[0]!r} in {dict(part)}; known: shards, weight")
        if "shards" not in part:
            raise ValueError(f"shards: no key 'shards' in {dict(part)}")
        sources += [(s, part.get("weight")) for s, _ in _sources(part["shards"], num_samples, show_progress)]
    return sources


def _quotas(sources: Sequence[tuple[Samples, float | None]], batch_size: int) -> tuple[list[Samples], list[int]]:
    """Samples of each set in every global batch: the weights' shares, by largest remainder."""
    weights = [len(samples) if weight is None else float(weight) for samples, weight in sources]
    if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise ValueError(f"weights of shard sets must be positive, got {weights}")
    shares = [batch_size * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
    for i in by_remainder[: batch_size - sum(quotas)]:
        quotas[i] += 1
    if 0 in quotas:
        raise ValueError(f"shard set {quotas.index(0)} gets no sample in a batch of {batch_size}: weights {weights}")
    return [samples for samples, _ in sources], quotas
