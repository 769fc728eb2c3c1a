"""How far zero-shot predictions are from the truth in a tree of concepts.

CIFAR-100 with its superclasses and above, and ImageNet with the hypernyms of WordNet 3.0; both trees are
shipped. Another dataset needs a tree, as JSON of child to parent or parents or as lines "parent child", and, where its
class names are not the concepts, the concept of each class:

    evaluator.datasets = ["flowers"]
    evaluator.trees = {"flowers": "flowers.json"}
    evaluator.nodes = {"flowers": ["n11939491", "n12057211", ...]}
"""

from meru_fast.config import LazyCall as L
from meru_fast.evaluation.hierarchy import HierarchicalClassification

evaluator = L(HierarchicalClassification)(
    datasets=["cifar100", "imagenet"],
    trees={"cifar100": "cifar100", "imagenet": "imagenet"},
    nodes={"imagenet": "leaves"},  # the WordNet ids, in label order
    data_dir="datasets/eval",
    image_size=None,  # what the model was built for
    resize="crop",
    batch_size=128,
    num_workers=None,
)

__all__ = ["evaluator"]
