"""What the evaluators share: the list of datasets, and one call for all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meru_fast.evaluation import catalog
from meru_fast.evaluation.features import Loading, input_size
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.sources import CaptionedImages, LabelledImages
from meru_fast.evaluation.transforms import EvalTransform, check_resize

if TYPE_CHECKING:
    from meru_fast.models import CLIP


class Evaluator:
    """Base of the evaluators.

    Args:
        datasets: catalog names, or mappings that describe own data (``meru_fast.evaluation.catalog.open_own``).
        data_dir: where the catalog's datasets lie, each in a folder of its name.
        image_size: side of the square of pixels; None means what the model was built for.
        resize: "crop" (shorter side, then centre) or "squeeze" (both sides; changes the aspect ratio).
        batch_size: images encoded at once.
        num_workers: decoding threads; None means one for each core, 16 at most.

    Raises:
        DatasetError: an unknown or twice given name, or an entry that describes no own data.
        ValueError: a size, batch size or number of threads below 1, or no such resize.
    """

    task: str

    def __init__(
        self,
        datasets: Sequence[str | Mapping[str, Any]],
        data_dir: str = "datasets/eval",
        image_size: int | None = None,
        resize: str = "crop",
        batch_size: int = 128,
        num_workers: int | None = None,
    ):
        self.entries = {catalog.name_of(entry): entry for entry in datasets}
        if len(self.entries) < len(datasets):
            raise DatasetError(
                f"datasets must have distinct names, got {[catalog.name_of(entry) for entry in datasets]}"
            )
        for setting, value in {"image_size": image_size, "batch_size": batch_size, "num_workers": num_workers}.items():
            if value is not None and value < 1:
                raise ValueError(f"{setting} must be at least 1, got {value}")
        self.data_dir = Path(data_dir).expanduser()
        self._provenance: dict[str, str] = {}
        self.image_size = image_size
        self.resize = check_resize(resize)
        self.loading = Loading(batch_size, num_workers)

    @property
    def names(self) -> list[str]:
        """Names of the datasets, in the order in which they are evaluated."""
        return list(self.entries)

    @property
    def settings(self) -> str:
        """What decides the numbers besides weights and data, in one line."""
        return f"{self.resize} {self.image_size or 'native'}"

    def provenance(self, name: str) -> str:
        """Whether the test part of a dataset that was evaluated is the published one."""
        return self._provenance[name]

    def transform(self, model: "CLIP") -> EvalTransform:
        """The pixels that `model` takes."""
        return EvalTransform(self.image_size or input_size(model), self.resize)

    def open(self, name: str, part: str) -> LabelledImages | CaptionedImages:
        """The "train", "val" or "test" part of a dataset. Raises DatasetError."""
        dataset = catalog.open_dataset(self.entries[name], self.data_dir, part)
        if part == "test":
            self._provenance[name] = dataset.provenance
        return dataset

    def open_labelled(self, name: str, part: str) -> LabelledImages:
        """``open`` for what needs labels. Raises DatasetError for a dataset with captions too."""
        dataset = self.open(name, part)
        if not isinstance(dataset, LabelledImages):
            raise DatasetError(f"{name}: has captions and no labels; use the retrieval config")
        return dataset

    def evaluate(self, model: "CLIP", name: str) -> dict[str, float]:
        """Scores of one dataset, fractions in [0, 1]. Raises DatasetError if it is missing or damaged."""
        raise NotImplementedError

    def __call__(self, model: "CLIP") -> dict[str, float]:
        """Scores of all datasets, ``{"<dataset>/<metric>": fraction}``. Raises DatasetError for a missing dataset."""
        return {
            f"{name}/{metric}": value for name in self.names for metric, value in self.evaluate(model, name).items()
        }
