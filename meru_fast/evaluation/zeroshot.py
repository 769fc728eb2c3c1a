"""Zero-shot classification: the class whose prompts lie nearest to the image (MERU, arXiv 2304.09172, section 4.1)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meru_fast.evaluation.evaluator import Evaluator
from meru_fast.evaluation.features import image_features, text_features
from meru_fast.evaluation.ranking import accuracies, nearest
from meru_fast.evaluation.sources import LabelledImages

if TYPE_CHECKING:
    from meru_fast.models import CLIP


@torch.inference_mode()
def class_embeddings(model: "CLIP", class_names: list[str], prompts: list[str], title: str = "prompts") -> Tensor:
    """One embedding for each class, from all prompts of all classes encoded in one sweep; [C, D].

    Prompts are averaged where averaging makes sense: in the tangent space at the root for hyperbolic models, which is
    lifted afterwards, and on the sphere for CLIP, which is normalised again.

    Args:
        prompts: templates with one ``{}`` for the name.
        title: of the progress bar.

    Raises:
        ValueError: no names, no prompts, or a prompt without its ``{}``.
    """
    if not class_names or not prompts or any(prompt.count("{}") != 1 for prompt in prompts):
        raise ValueError(f"expected class names and prompts with one {{}} each, got {class_names} and {prompts}")
    texts = [prompt.replace("{}", name) for name in class_names for prompt in prompts]
    features = text_features(model, texts, title, project=False).unflatten(0, (len(class_names), len(prompts)))
    if model.geometry == "cosine":
        features = model.project_text(features)
    return model.project_text(features.mean(dim=1))


class ZeroShotClassification(Evaluator):
    """Top-1, top-5 and macro accuracy without training; arguments as ``Evaluator``."""

    task = "zeroshot_classification"

    def evaluate(self, model: "CLIP", name: str) -> dict[str, float]:
        dataset = self.open_labelled(name, "test")
        ranked, labels = self.classify(model, dataset)
        return accuracies(ranked, labels, len(dataset.class_names))

    def classify(self, model: "CLIP", dataset: LabelledImages) -> tuple[Tensor, Tensor]:
        """The five best classes (or all, if fewer) of each image, best first [N, k], and its label [N].

        Raises:
            DatasetError: an image that cannot be read.
        """
        name = dataset.name
        classes = class_embeddings(model, list(dataset.class_names), list(dataset.prompts), f"{name}: prompts")
        images, labels = image_features(model, dataset.samples, self.transform(model), self.loading, name)
        return nearest(model, images, classes, min(5, len(classes))), labels
