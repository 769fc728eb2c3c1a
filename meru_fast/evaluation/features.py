"""Features of whole datasets: batched, split over processes, and kept on disk.

All evaluators work on features. Batches are the unit that processes share: batch b belongs to rank b modulo world
size, so every batch has the same content, and thereby every feature the same bits, for any number of processes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meru_fast.distributed import (
    all_gather_object,
    barrier,
    broadcast_object,
    get_rank,
    get_world_size,
    is_main_process,
)
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.sources import Samples
from meru_fast.evaluation.transforms import EvalTransform
from meru_fast.files import whole
from meru_fast.progress import progress_bar

if TYPE_CHECKING:
    from meru_fast.models import CLIP


class Loading(NamedTuple):
    """How images are read: samples a batch, and decoding threads (None: one for each core, 16 at most)."""

    batch_size: int = 128
    num_workers: int | None = None


class Labelled(NamedTuple):
    """Features [N, D] float32 of images and their labels [N] int64, on the model's device."""

    features: Tensor
    labels: Tensor


@torch.inference_mode()
def image_features(
    model: "CLIP", samples: Samples, transform: EvalTransform, loading: Loading, title: str, project: bool = True
) -> Labelled:
    """Encode all images.

    Args:
        project: True for the final embedding, False for the output of the image encoder *before* the projection (what
            the linear probe is trained on).

    Raises:
        DatasetError: an image that cannot be read, or no images at all.
    """
    if len(samples) == 0:
        raise DatasetError(f"{title}: no images")
    features, labels = [], []
    encode = model.encode_image if project else pre_projection(model)
    failure = None
    try:
        for images, batch_labels in batches(samples, transform, loading, title):
            features.append(encode(images.to(model.device, non_blocking=True)).float())
            labels.append(batch_labels.to(model.device))
    except DatasetError as error:
        failure = str(error)
    failures = [message for message in all_gather_object(failure) if message]
    if failures:  # on every process, also those whose own images are fine
        raise DatasetError(failures[0])
    return Labelled(*(join_batches(own, len(samples), loading.batch_size, model.device) for own in (features, labels)))


@torch.inference_mode()
def text_features(
    model: "CLIP", texts: Sequence[str], title: str, project: bool = True, batch_size: int = 512
) -> Tensor:
    """Encode texts -> [T, D] float32. With `project` False the result is in the tangent space (before lift or norm)."""
    from meru_fast.tokenizer import PackedTokens, Tokenizer

    tokenizer = Tokenizer()
    features = []
    with progress_bar(title, len(texts), "texts") as advance:
        for start in own_starts(len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            tokens = PackedTokens.from_list(tokenizer(chunk)).to(model.device)
            features.append(model.encode_text(tokens, project=project).float())
            advance(len(chunk) * get_world_size())
    return join_batches(features, len(texts), batch_size, model.device)


def input_size(model: "CLIP") -> int:
    """Side in pixels of the square images that the model's encoder was built for."""
    visual: Any = model.visual
    return visual.patch_embed.img_size[0]


def pre_projection(model: "CLIP") -> Callable[[Tensor], Tensor]:
    """The image encoder up to where its projection layer begins."""

    def encode(images: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        hook = model.visual_proj.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        try:
            model.encode_image(images, project=False)
        finally:
            hook.remove()
        return inputs[0]

    return encode


def own_starts(total: int, batch_size: int) -> range:
    """Where the batches of this process start."""
    return range(get_rank() * batch_size, total, get_world_size() * batch_size)


def batches(
    samples: Samples, transform: EvalTransform, loading: Loading, title: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches, in order: uint8 [b, 3, H, W] and labels int64 [b].

    Threads decode ahead of the model (Pillow and torchvision release the interpreter lock), two batches at most.

    Raises:
        DatasetError: a picture cannot be read.
    """
    workers = loading.num_workers or min(os.cpu_count() or 1, 16)
    starts = own_starts(len(samples), loading.batch_size)

    def load(index: int) -> tuple[Tensor, int]:
        try:
            image, label = samples[index]
            return transform(image), int(label)
        except DatasetError:
            raise
        except Exception as error:
            raise DatasetError(f"{title}: sample {index} cannot be read: {error}") from error

    with ThreadPoolExecutor(workers) as pool, progress_bar(title, len(samples), "images") as advance:
        pending: list[list[Future]] = []
        try:
            for position in range(len(starts) + 2):
                if position < len(starts):
                    start = starts[position]
                    indices = range(start, min(start + loading.batch_size, len(samples)))
                    pending.append([pool.submit(load, index) for index in indices])
                if position >= 2 and pending:
                    loaded = [future.result() for future in pending.pop(0)]
                    yield torch.stack([image for image, _ in loaded]), torch.tensor([label for _, label in loaded])
                    advance(len(loaded) * get_world_size())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def join_batches(own: list[Tensor], total: int, batch_size: int, device: torch.device) -> Tensor:
    """The rows of all processes' batches in dataset order, on every process; [total, ...]."""
    world_size = get_world_size()
    if world_size == 1:
        return torch.cat(own).to(device)
    shapes: list[Any] = [None] * world_size
    dist.all_gather_object(shapes, (own[0].shape[1:], own[0].dtype) if own else None)
    tail, dtype = next(shape for shape in shapes if shape is not None)
    rounds = -(-total // (batch_size * world_size))
    block = torch.zeros((rounds, batch_size, *tail), dtype=dtype, device=device)
    for position, batch in enumerate(own):
        block[position, : len(batch)] = batch
    gathered = [torch.empty_like(block) for _ in range(world_size)]
    dist.all_gather(gathered, block)
    return torch.stack(gathered, dim=1).flatten(0, 2)[:total].contiguous()


def fingerprint(model: "CLIP") -> str:
    """Hash of all weights and buffers: the same for the same model, whatever kind of file it came from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached(path: Path | None, compute: Callable[[], Labelled]) -> Labelled:
    """The features in `path`, or those of `compute`, which are then kept there (in safetensors, by the main process).

    Every process must call this; all of them see the file or none does.
    """
    from safetensors.torch import load_file, save_file

    if path is None:
        return compute()
    present = broadcast_object(path.is_file())
    if present:
        return Labelled(**load_file(path))
    result = compute()
    if is_main_process():
        with whole(path) as partial:
            save_file({key: value.cpu().contiguous() for key, value in result._asdict().items()}, partial)
    barrier()
    return result
