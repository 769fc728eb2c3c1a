"""Retrieval among the demo's held-out scenes by their most specific captions."""

from .eval_zero_shot_retrieval import evaluator

evaluator.datasets = [{"name": "scenes", "kind": "manifest", "root": "demo_output/data/scenes.json"}]

__all__ = ["evaluator"]
