"""Bringing batches to the device while the consumer is busy with the one before."""

import torch
from torch import Tensor

from meru_fast.data.dataset import LocalBatch


class DeviceStage:
    """Moves batches to the device, on a stream of its own. At most one batch is under way."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batch: LocalBatch) -> None:
        """Begin to bring images and tokens to the device."""
        with torch.cuda.stream(self.stream):
            batch.images = batch.images.to(self.device, non_blocking=True)
            batch.tokens = batch.tokens.to(self.device, non_blocking=True)

    def finish(self, batch: LocalBatch) -> Tensor:
        """The images uint8 [b, 3, size, size], safe to use on the current stream (as are the batch's tokens).

        The host does not wait for the device here: the current stream waits for ours.
        """
        with torch.cuda.stream(self.stream):
            images = self._images(batch)
        if self.stream is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_stream(self.stream)
            for tensor in (images, batch.tokens.ids, batch.tokens.cu_seqlens):
                tensor.record_stream(consumer)  # its memory is ours again only when the consumer is done with it
        return images

    def _images(self, batch: LocalBatch) -> Tensor:
        """All images of the batch, by work on the stage's stream."""
        return batch.images
