"""The data loader, with one fault at one step: for tests of what the trainer does about it."""

import dataclasses
import time

import torch

from meru_fast.data import build_loader
from meru_fast.distributed import get_rank


class FaultyLoader:
    """A loader whose batch of step `at` (from 0) is bad on rank `on_rank`, or never comes."""

    def __init__(self, loader, fault: str, at: list[int], on_rank: int):
        self.loader, self.fault, self.at, self.on_rank = loader, fault, at, on_rank

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for batch in self.loader:
            if batch.step in self.at and get_rank() == self.on_rank:
                if self.fault == "hang":
                    wait_for_a_disk_that_is_gone()
                images = batch.images.float() / 255
                images[0, 0, 0, 0] = {"nan": torch.nan, "inf": torch.inf}[self.fault]
                batch = dataclasses.replace(batch, images=images)
            yield batch


def wait_for_a_disk_that_is_gone() -> None:
    while True:
        time.sleep(3600)


def build(fault: str, at: list[int], on_rank: int = 0, **arguments):
    return FaultyLoader(build_loader(**arguments), fault, at, on_rank)
