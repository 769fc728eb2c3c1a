"""How far a wrong class is from the right one, in a tree of concepts (WordNet, or any other).

The measures and their definitions are those reported by HyCoCLIP (arXiv 2410.06912, section 4.2) and its successors.
"""

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.zeroshot import ZeroShotClassification

if TYPE_CHECKING:
    from meru_fast.models import CLIP


class Hierarchy:
    """Concepts and their parents; a concept may have several (WordNet), but none may be its own ancestor.

    Args:
        parents: child to parent, or to a list of parents. Concepts that occur only as parents are roots.

    Raises:
        ValueError: a cycle.
    """

    def __init__(self, parents: Mapping[str, str | Sequence[str]]):
        self.parents = {child: (above,) if isinstance(above, str) else tuple(above) for child, above in parents.items()}
        for above in list(self.parents.values()):
            for node in above:
                self.parents.setdefault(node, ())
        self._neighbours: dict[str, set[str]] = {node: set(above) for node, above in self.parents.items()}
        for child, above in self.parents.items():
            for node in above:
                self._neighbours[node].add(child)
        self._check_cycles()
        self.ancestors = lru_cache(maxsize=None)(self._ancestors)
        self._distances = lru_cache(maxsize=4096)(self._distances_from)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Hierarchy":
        """Read a file, or a tree that is shipped, by its name ("cifar100", "imagenet").

        A ``.json`` file maps child to parent or parents; any other file has a line "parent child" for each pair, as
        ImageNet's ``wordnet.is_a.txt``.

        Raises:
            ValueError: no such file, or one that is neither.
        """
        path = Path(path)
        if not path.is_file():
            shipped = resources.files("meru_fast") / "assets" / "trees"
            if (shipped / f"{path}.json").is_file():
                return cls(json.loads((shipped / f"{path}.json").read_text(encoding="utf-8")))
            names = sorted(entry.name.removesuffix(".json") for entry in shipped.iterdir())
            raise ValueError(f"{path}: no such file, and no shipped tree of that name ({', '.join(names)})")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            try:
                return cls(json.loads(text))
            except (json.JSONDecodeError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}: expected a JSON object of child to parent or parents ({error})") from error
        parents: dict[str, list[str]] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            fields = line.split()
            if len(fields) not in (0, 2):
                raise ValueError(f'{path}: line {number} is not "parent child": {line!r}')
            if fields:
                parents.setdefault(fields[1], []).append(fields[0])
        return cls(parents)

    def __contains__(self, node: str) -> bool:
        return node in self.parents

    @property
    def leaves(self) -> list[str]:
        """Concepts that nothing is below, sorted: of the shipped "imagenet" the classes in label order."""
        inner = {node for above in self.parents.values() for node in above}
        return sorted(self.parents.keys() - inner)

    def connected(self, first: str, second: str) -> bool:
        """Whether there is a path between two concepts."""
        return second in self._distances(first)

    def distance(self, first: str, second: str) -> int:
        """Edges on the shortest path between two concepts, up or down. Raises ValueError if there is none."""
        found = self._distances(first).get(second)
        if found is None:
            raise ValueError(f"no path between {first!r} and {second!r} in the tree")
        return found

    def _ancestors(self, node: str) -> frozenset[str]:
        above = self.parents[node]
        return frozenset(above).union(*map(self.ancestors, above))

    def _distances_from(self, start: str) -> dict[str, int]:
        distances, queue = {start: 0}, deque([start])
        while queue:
            node = queue.popleft()
            for neighbour in self._neighbours[node]:
                if neighbour not in distances:
                    distances[neighbour] = distances[node] + 1
                    queue.append(neighbour)
        return distances

    def _check_cycles(self) -> None:
        """Take away concepts whose parents are gone, from the roots down; what stays lies on or below a cycle."""
        waiting = {node: len(above) for node, above in self.parents.items()}
        free = [node for node, count in waiting.items() if count == 0]
        while free:
            node = free.pop()
            del waiting[node]
            for child in (other for other in self._neighbours[node] if node in self.parents[other]):
                waiting[child] -= 1
                if waiting[child] == 0:
                    free.append(child)
        if waiting:
            raise ValueError(f"the tree has a cycle: {min(waiting)!r} is its own ancestor or lies below such a concept")


def hierarchical_metrics(hierarchy: Hierarchy, predicted: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Means over the predictions. With A(x) the ancestors of x, itself not counted:

    - ``tie``, tree-induced error: edges between prediction and truth; 0 is best.
    - ``lca``, lowest common ancestor: ``|A(predicted) - A(true)| + 1``; 1 is best.
    - ``jaccard``: ``|A(predicted) & A(true)| / |A(predicted) | A(true)|``.
    - ``hierarchical_precision``, ``hierarchical_recall``: the same intersection over ``|A(predicted)|``, ``|A(true)|``.

    A ratio of two empty sets (both are roots) counts as 1 if the prediction is right and as 0 if not.

    Raises:
        ValueError: no predictions, lists of different length, or a concept that is not in the tree.
    """
    if len(predicted) != len(true) or not predicted:
        raise ValueError(
            f"expected as many predictions as truths and at least one, got {len(predicted)} and {len(true)}"
        )
    missing = sorted({node for node in (*predicted, *true) if node not in hierarchy})
    if missing:
        raise ValueError(f"not in the tree: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    totals = dict.fromkeys(("tie", "lca", "jaccard", "hierarchical_precision", "hierarchical_recall"), 0.0)
    for guess, truth in zip(predicted, true, strict=True):
        of_guess, of_truth = hierarchy.ancestors(guess), hierarchy.ancestors(truth)
        common = len(of_guess & of_truth)
        empty = float(guess == truth)
        totals["tie"] += hierarchy.distance(guess, truth)
        totals["lca"] += len(of_guess) - common + 1
        totals["jaccard"] += common / len(of_guess | of_truth) if of_guess | of_truth else empty
        totals["hierarchical_precision"] += common / len(of_guess) if of_guess else empty
        totals["hierarchical_recall"] += common / len(of_truth) if of_truth else empty
    return {name: total / len(predicted) for name, total in totals.items()}


class HierarchicalClassification(ZeroShotClassification):
    """Zero-shot classification, scored by the place of the predicted class in a tree.

    Args:
        trees: dataset name to the file of its tree, or the name of a shipped one (``Hierarchy.load``).
        nodes: dataset name to the concept of each class, in label order, or to "leaves": the tree's leaves in
            alphabetical order (ImageNet's WordNet ids). Default: the class names themselves are concepts.
        datasets, **kwargs: see ``Evaluator``.

    Raises:
        ValueError: a dataset without a tree, or a tree that cannot be read. Others as ``Evaluator``.
    """

    task = "hierarchical_classification"

    def __init__(
        self,
        datasets: Sequence[str | Mapping[str, Any]],
        trees: Mapping[str, str],
        nodes: Mapping[str, str | Sequence[str]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(datasets, **kwargs)
        without = [name for name in self.names if name not in trees]
        if without:
            raise ValueError(f"no tree for {', '.join(without)}: add it to evaluator.trees")
        self.trees = {name: Hierarchy.load(trees[name]) for name in self.names}
        self.nodes = dict(nodes or {})

    def evaluate(self, model: "CLIP", name: str) -> dict[str, float]:
        dataset = self.open_labelled(name, "test")
        nodes = self._concepts(name, dataset.class_names)
        if len(nodes) != len(dataset.class_names):
            raise DatasetError(f"{name}: {len(nodes)} concepts for {len(dataset.class_names)} classes")
        ranked, labels = self.classify(model, dataset)
        guesses, truth = ([nodes[index] for index in column.tolist()] for column in (ranked[:, 0], labels))
        try:
            return hierarchical_metrics(self.trees[name], guesses, truth)
        except ValueError as error:
            raise DatasetError(f"{name}: {error}") from error

    def _concepts(self, name: str, class_names: Sequence[str]) -> list[str]:
        """The concept of each class, in label order."""
        chosen = self.nodes.get(name, class_names)
        if isinstance(chosen, str):
            if chosen != "leaves":
                raise ValueError(f'evaluator.nodes of {name}: expected a list of concepts or "leaves", got {chosen!r}')
            return self.trees[name].leaves
        return list(chosen)
