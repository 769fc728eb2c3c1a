"""Retrieval on COCO (val2017) and Flickr30k (Karpathy test).

Own data, for example a JSON file of ``[{"image": "a.png", "captions": ["...", "..."]}, ...]``:

    evaluator.datasets = [dict(name="scenes", kind="manifest", root="data/scenes/test.json")]
"""

from meru_fast.config import LazyCall as L
from meru_fast.evaluation.protocol import names
from meru_fast.evaluation.retrieval import ZeroShotRetrieval

evaluator = L(ZeroShotRetrieval)(
    datasets=names("retrieval"),
    ks=[1, 5, 10],
    merge_captions=False,
    data_dir="datasets/eval",
    image_size=None,  # what the model was built for
    resize="squeeze",  # as published; "crop" keeps the aspect ratio
    batch_size=128,
    num_workers=None,
)
