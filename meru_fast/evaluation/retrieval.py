"""Image-text retrieval in both directions (MERU, arXiv 2304.09172, section 4.1)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meru_fast.evaluation.evaluator import Evaluator
from meru_fast.evaluation.features import image_features, text_features
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.ranking import nearest, recalls
from meru_fast.evaluation.sources import CaptionedImages

if TYPE_CHECKING:
    from meru_fast.models import CLIP


class ZeroShotRetrieval(Evaluator):
    """Recall@k of images for a caption and of captions for an image.

    A query counts as found at k if any of its true matches is among the k best.

    Args:
        ks: the k; those larger than the gallery are left out.
        merge_captions: True counts equal captions as one caption that belongs to several images. The published protocol
            (False) asks for the one image that each copy came from.
        resize: "squeeze" as published, or "crop", which keeps the aspect ratio.
        **kwargs: the other arguments of ``Evaluator``.

    Raises:
        ValueError: a k below 1, or none. Others as ``Evaluator``.
    """

    task = "zeroshot_retrieval"

    def __init__(
        self,
        datasets: Sequence[str | Mapping[str, Any]],
        ks: Sequence[int] = (1, 5, 10),
        merge_captions: bool = False,
        resize: str = "squeeze",
        **kwargs: Any,
    ):
        super().__init__(datasets, resize=resize, **kwargs)
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be positive numbers, got {list(ks)}")
        self.ks = sorted(ks)
        self.merge_captions = merge_captions

    @property
    def settings(self) -> str:
        return super().settings + (", equal captions merged" if self.merge_captions else "")

    def evaluate(self, model: "CLIP", name: str) -> dict[str, float]:
        dataset = self.open(name, "test")
        if not isinstance(dataset, CaptionedImages):
            raise DatasetError(f"{name}: has labels and no captions; use the classification config")
        captions, pairs = merged(dataset) if self.merge_captions else (dataset.captions, dataset.pairs)
        if not pairs:
            raise DatasetError(f"{name}: no image has a caption")
        texts = text_features(model, captions, f"{name}: captions")
        images = image_features(model, dataset.samples, self.transform(model), self.loading, name).features
        image_to_text = torch.tensor(pairs, device=images.device)
        scores: dict[str, float] = {}
        for direction, queries, gallery, matches in (
            ("image_retrieval", texts, images, image_to_text.flip(1)),
            ("text_retrieval", images, texts, image_to_text),
        ):
            asked = matches[:, 0].unique()  # a caption without an image, or the reverse, asks nothing
            ranked = nearest(model, queries[asked], gallery, min(self.ks[-1], len(gallery)))
            ks = [k for k in self.ks if k <= len(gallery)]
            found = recalls(ranked, matches, asked, ks)
            scores |= {f"{direction}_recall@{k}": value for k, value in found.items()}
        return scores


def merged(dataset: CaptionedImages) -> tuple[list[str], list[tuple[int, int]]]:
    """Distinct captions, and the pairs in their numbering."""
    captions = list(dict.fromkeys(dataset.captions))
    position = {caption: number for number, caption in enumerate(captions)}
    return captions, sorted({(image, position[dataset.captions[caption]]) for image, caption in dataset.pairs})
