"""The DALI decoder: JPEGs decoded, cropped and resized by one graph, on the CPU or on the GPU.

DALI gets bytes that our index found and windows that we drew, so nothing of order, randomness or resuming depends on
it. The workers hand it only complete JPEGs of the usual kinds (`dataset._is_plain_jpeg`). Should one still fail, DALI
loses the whole batch: its images are then decoded one at a time, and those that fail alone too go to Pillow.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from meru_fast.data import decode
from meru_fast.data.dataset import Encoded, LocalBatch, TrainingSet
from meru_fast.data.errors import BadSampleError
from meru_fast.data.stage import DeviceStage
from meru_fast.data.transforms import Window

_TYPES: Any = types  # its members are made at run time

log = logging.getLogger(__name__)


class DaliDecoder:
    """Decode JPEGs, cut a window out of each and resize it, on a device.

    The whole image is decoded before it is cut: the JPEG engine of data-centre GPUs knows no windows.

    Args:
        batch_size: the most images at a time.
        image_size: side of the square output.
        device: "cuda" decodes with nvJPEG and its hardware engine, "cpu" with libjpeg-turbo.
        threads: CPU threads.
    """

    def __init__(self, batch_size: int, image_size: int, device: torch.device, threads: int):
        self.image_size = image_size
        self.device = device
        on_gpu = device.type == "cuda"
        self._options = {
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": torch.empty(0, device=device).get_device() if on_gpu else None,
            "prefetch_queue_depth": 1,
        }
        self._decoder_device = "mixed" if on_gpu else "cpu"
        self._build()

    def start(self, files: Sequence[Tensor], windows: Sequence[Window]) -> None:
        """Begin to decode uint8 files [n], on the CPU, in the background."""
        self._pipeline.feed_input("files", [file.numpy() for file in files])
        self._pipeline.feed_input("corners", np.array([(w.top, w.left) for w in windows], np.int32))
        self._pipeline.feed_input("shapes", np.array([(w.height, w.width) for w in windows], np.int32))
        self._pipeline.schedule_run()

    def finish(self) -> Tensor:
        """The images of the last start, uint8 [n, 3, size, size] on the device, ready on the current CUDA stream.

        Raises:
            BadSampleError: at least one file cannot be decoded. The decoder itself can be used again.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            (decoded,) = self._pipeline.outputs(cuda_stream=stream)  # given a stream, DALI makes it wait, not the host
        except RuntimeError as error:
            self._build()  # DALI declares a pipeline that failed invalid
            raise BadSampleError(f"DALI: {_cause(error)}") from error
        pixels = torch.empty((len(decoded), 3, self.image_size, self.image_size), dtype=torch.uint8, device=self.device)
        return feed_ndarray(decoded.as_tensor(), pixels, cuda_stream=stream)  # a copy: DALI's memory is DALI's

    def _build(self) -> None:
        self._pipeline = Pipeline(**self._options)
        with self._pipeline:
            files = fn.external_source(name="files", dtype=_TYPES.UINT8, ndim=1)
            corners = fn.external_source(name="corners", dtype=_TYPES.INT32, ndim=1)
            shapes = fn.external_source(name="shapes", dtype=_TYPES.INT32, ndim=1)
            images = fn.decoders.image(
                files,
                device=self._decoder_device,
                output_type=_TYPES.RGB,
                adjust_orientation=False,
                # The next two concern GPUs. Chroma is interpolated as libjpeg-turbo and Pillow do it.
                jpeg_fancy_upsampling=True,
                # Which of its decoders nvJPEG takes must not depend on a file's place in the batch, and so on the
                # number of ranks: the engine gets whatever it can decode.
                hw_decoder_load=1.0,
            )
            cut = fn.slice(images, corners, shapes, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
            resized: Any = fn.resize(
                cut, size=(self.image_size, self.image_size), interp_type=_TYPES.INTERP_CUBIC, antialias=True
            )
            self._pipeline.set_outputs(fn.transpose(resized, perm=(2, 0, 1)))
        self._pipeline.build()


def _cause(error: RuntimeError) -> str:
    """The telling line of DALI's long report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "nvImageCodec" in line or "ailed" in line), lines[0] if lines else "?")


class DaliStage(DeviceStage):
    """Decodes what the workers left encoded, while the consumer is busy."""

    def __init__(self, dataset: TrainingSet, device: torch.device, threads: int):
        super().__init__(device)
        self.dataset = dataset
        local_batch = dataset.batch_size // dataset.world_size
        self.decoder = DaliDecoder(local_batch, dataset.image_size, device, threads)

    def start(self, batch: LocalBatch) -> None:
        super().start(batch)
        if batch.encoded:
            self.decoder.start(batch.encoded.files(), batch.encoded.windows)

    def _images(self, batch: LocalBatch) -> Tensor:
        if not batch.encoded:
            return batch.images
        try:
            decoded = self.decoder.finish()
        except BadSampleError:
            decoded = self._one_by_one(batch, batch.encoded)
        if not len(batch.images):
            return decoded
        by_pillow = sorted(set(range(len(batch.keys))) - set(batch.encoded.rows))
        places = torch.tensor(batch.encoded.rows + by_pillow).argsort()
        if self.stream is not None:
            places = places.pin_memory().to(self.device, non_blocking=True)
        return torch.cat([decoded, batch.images])[places]

    def _one_by_one(self, batch: LocalBatch, encoded: Encoded) -> Tensor:
        pixels = []
        for row, file, window in zip(encoded.rows, encoded.files(), encoded.windows, strict=True):
            try:
                self.decoder.start([file], [window])
                pixels.append(self.decoder.finish()[0])
            except BadSampleError as error:
                batch.dali_fallbacks += 1
                log.warning("step %d: Pillow decodes %s, for %s", batch.step, batch.keys[row], error)
                pixels.append(self._with_pillow(batch, row, file, window).to(self.device))
        batch.tokens = batch.tokens.to(self.device)
        return torch.stack(pixels)

    def _with_pillow(self, batch: LocalBatch, row: int, file: Tensor, window: Window) -> Tensor:
        try:
            image = decode.open_image(file.numpy().tobytes())
            return decode.crop_and_resize(image, window, self.dataset.image_size)
        except BadSampleError as error:
            return self.dataset.replacement(batch, row, str(error))
