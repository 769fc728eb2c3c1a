"""Linear probe on the 19 datasets of the published protocol (all but ImageNet)."""

from meru_fast.config import LazyCall as L
from meru_fast.evaluation.linear_probe import LinearProbe
from meru_fast.evaluation.protocol import names

evaluator = L(LinearProbe)(
    datasets=[name for name in names("classification") if name != "imagenet"],
    solver="batched",  # "sklearn" is the published one: the same objective, much slower
    max_iterations=1000,
    cache_dir="output/features",
    data_dir="datasets/eval",
    image_size=None,  # what the model was built for
    resize="crop",
    batch_size=128,
    num_workers=None,
)
