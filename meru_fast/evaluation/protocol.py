"""The published evaluation protocol as data: class names, prompts and splits of the 22 datasets."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


class DatasetError(RuntimeError):
    """A dataset that is missing, incomplete or damaged; the message names it, the file and what to do."""


@dataclass(frozen=True)
class Protocol:
    """How the published results were measured on one dataset.

    Attributes:
        task: "classification" or "retrieval".
        class_names: names in label order, empty for retrieval.
        prompts: templates with one ``{}`` for the class name.
        splits: the sources of the parts "train", "val" and "test", in slicing notation (``train[:80%]``); a part that
            the protocol does not use is absent.
    """

    name: str
    task: str
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    splits: dict[str, str]


@cache
def protocols() -> dict[str, Protocol]:
    """Protocol of every dataset, by name, in the order in which results are reported."""
    text = resources.files("meru_fast").joinpath("assets/eval_protocol.json").read_text(encoding="utf-8")
    found = {}
    for name, entry in json.loads(text)["datasets"].items():
        splits = {
            part: source for part, source in zip(("train", "val", "test"), entry["splits"], strict=True) if source
        }
        class_names, prompts = tuple(entry.get("class_names", ())), tuple(entry.get("prompts", ()))
        found[name] = Protocol(name, entry["task"], class_names, prompts, splits)
    return found


def names(task: str) -> list[str]:
    """Datasets of a task, "classification" or "retrieval"."""
    return [name for name, protocol in protocols().items() if protocol.task == task]
