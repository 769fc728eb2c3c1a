"""How far zero-shot predictions are from the truth in a tree of concepts: CIFAR-100, with its superclasses and above.

For ImageNet give the tree as lines "parent child" of WordNet ids and the id of each class, in label order:

    evaluator.datasets = ["imagenet"]
    evaluator.trees = {"imagenet": "wordnet.is_a.txt"}
    evaluator.nodes = {"imagenet": ["n01440764", "n01443537", ...]}
"""

from meru_fast.config import LazyCall as L
from meru_fast.evaluation.hierarchy import HierarchicalClassification

evaluator = L(HierarchicalClassification)(
    datasets=["cifar100"],
    trees={"cifar100": "cifar100"},
    nodes={},
    data_dir="datasets/eval",
    image_size=None,  # what the model was built for
    resize="crop",
    batch_size=128,
    num_workers=None,
)

__all__ = ["evaluator"]
