"""Zero-shot classification of the demo's held-out digits."""

from .eval_zero_shot_classification import evaluator

evaluator.datasets = [
    {
        "name": "digits",
        "kind": "folder",
        "root": "demo_output/data/digits",
        "prompts": ["a handwritten {}", "handwriting : a handwritten {}"],
    }
]

__all__ = ["evaluator"]
