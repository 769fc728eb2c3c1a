"""Zero-shot classification on the 20 datasets of the published protocol. Those that are missing are reported and
passed over.

Own data, for example one folder of images for each class:

    evaluator.datasets = [dict(name="digits", kind="folder", root="data/digits/test", prompts=["a handwritten {}."])]
"""

from meru_fast.config import LazyCall as L
from meru_fast.evaluation.protocol import names
from meru_fast.evaluation.zeroshot import ZeroShotClassification

evaluator = L(ZeroShotClassification)(
    datasets=names("classification"),
    data_dir="datasets/eval",
    image_size=None,  # what the model was built for
    resize="crop",
    batch_size=128,
    num_workers=None,
)
