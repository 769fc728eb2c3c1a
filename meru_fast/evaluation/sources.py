"""Pictures with labels or captions, from folders, manifests and TARs.

Every source is a map-style sequence of ``(PIL image, label)``, which the torchvision classes are too. Nothing is
decoded before it is asked for, and reading is thread-safe.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from meru_fast.data.tar import regular_members
from meru_fast.evaluation.protocol import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
DEFAULT_PROMPTS = ("a photo of a {}.",)


class Samples(Protocol):
    """Map-style: ``samples[i]`` is a PIL image and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


@dataclass
class LabelledImages:
    """A classification set: `samples` with labels that index `class_names`; `prompts` have one ``{}`` each."""

    name: str
    samples: Samples
    class_names: Sequence[str]
    prompts: Sequence[str] = DEFAULT_PROMPTS
    provenance: str = "own data"


@dataclass
class CaptionedImages:
    """A retrieval set.

    Attributes:
        samples: the images (their labels are not used).
        captions: all captions.
        pairs: (image, caption) positions that belong together. An image may have several captions and a caption several
            images.
    """

    name: str
    samples: Samples
    captions: Sequence[str]
    pairs: Sequence[tuple[int, int]]
    provenance: str = "own data"


class ImageFiles:
    """Image files with labels, opened on demand."""

    def __init__(self, paths: Iterable[str | os.PathLike], labels: Iterable[int] | None = None):
        self.paths = [Path(path) for path in paths]
        self.labels = [0] * len(self.paths) if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), self.labels[index]


class Subset:
    """Some samples of a source in a given order, with `relabel[label]` for a label where one is given."""

    def __init__(self, samples: Samples, indices: Sequence[int], relabel: Sequence[int] | None = None):
        self.samples = samples
        self.indices = indices
        self.relabel = relabel

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.samples[self.indices[index]]
        return image, label if self.relabel is None else self.relabel[label]


class TarMembers:
    """The samples of TARs in the webdataset convention: members that share the name up to the first dot.

    The headers are read once; content is read by offset, so samples can be taken in any order from several threads.

    Attributes:
        keys: name of every sample that has an image.
    """

    def __init__(self, paths: Sequence[Path]):
        self.keys: list[str] = []
        self._members: list[dict[str, tuple[Path, int, int]]] = []
        for path in paths:
            self._index(path)
        self.labels = [0] * len(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        members = self._members[index]
        suffix = next(suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES)
        where = f"{members[suffix][0]}: member {self.keys[index]}.{suffix}"
        return decode_image(self.read(index, suffix), where), self.labels[index]

    def has(self, index: int, suffix: str) -> bool:
        return suffix in self._members[index]

    def read(self, index: int, suffix: str) -> bytes:
        """Content of one member. Raises DatasetError: it is cut off."""
        path, offset, size = self._members[index][suffix]
        with path.open("rb", buffering=0) as file:
            whole = offset + size <= os.fstat(file.fileno()).st_size  # else it may not even fit into memory
            content = os.pread(file.fileno(), size, offset) if whole else b""
        if not whole:
            raise DatasetError(f"{path}: member {self.keys[index]}.{suffix} is cut off; download this file again")
        return content

    def _index(self, path: Path) -> None:
        samples: dict[str, dict[str, tuple[Path, int, int]]] = {}
        try:
            with path.open("rb") as file:
                for member in regular_members(file):
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if stem and dot:
                        key = f"{folder}/{stem}" if folder else stem
                        samples.setdefault(key, {})[suffix.lower()] = (path, member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise DatasetError(f"{path}: not a readable TAR ({error})") from error
        for key, members in samples.items():
            if any(f".{suffix}" in IMAGE_SUFFIXES for suffix in members):
                self.keys.append(key)
                self._members.append(members)


def read_image(path: Path) -> Image.Image:
    """The picture in a file, decoded. Raises DatasetError that names the file."""
    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}") from error


def decode_image(content: bytes, where: str) -> Image.Image:
    """The picture in `content`, decoded. Raises DatasetError that names `where`."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: not a readable image ({error})") from error
    return image


def labelled_folder(
    name: str, root: Path, class_names: Sequence[str] | None = None, prompts: Sequence[str] = DEFAULT_PROMPTS
) -> LabelledImages:
    """``root/<class>/**/<image>``: one folder per class, labels in sorted order of the folder names.

    Args:
        class_names: names for the prompts, in the order of the sorted folders; default is the folder names with spaces
            for underscores.

    Raises:
        DatasetError: no folder, no images, or another number of class names.
    """
    folders = class_folders(name, root)
    if class_names is not None and len(class_names) != len(folders):
        raise DatasetError(f"{name}: {len(class_names)} class names for the {len(folders)} class folders of {root}")
    paths, labels = list_images(root, folders)
    if not paths:
        raise DatasetError(f"{name}: no images ({', '.join(IMAGE_SUFFIXES)}) below {root}/<class>/")
    return LabelledImages(
        name, ImageFiles(paths, labels), class_names or [folder.replace("_", " ") for folder in folders], prompts
    )


def class_folders(name: str, root: Path) -> list[str]:
    """Sorted names of the folders in `root`. Raises DatasetError: there are none."""
    if not root.is_dir():
        raise DatasetError(f"{name}: no folder {root}")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DatasetError(f"{name}: {root} has no class folders; expected {root}/<class>/<image>")
    return folders


def list_images(root: Path, folders: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Image files of each folder, sorted, and the position of their folder."""
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = sorted(path for path in (root / folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        paths += found
        labels += [label] * len(found)
    return paths, labels


def labelled_manifest(
    name: str, path: Path, class_names: Sequence[str] | None = None, prompts: Sequence[str] = DEFAULT_PROMPTS
) -> LabelledImages:
    """A JSON, JSON lines or CSV file with the fields ``image`` (path relative to the file) and ``label``.

    A label is a position in `class_names` or a class name; without `class_names` the sorted labels are the names.

    Raises:
        DatasetError: the file or a row of it cannot be used; names it.
    """
    rows = manifest_rows(name, path, ("image", "label"))
    values = [row["label"] for row in rows]
    if class_names is None:
        class_names = sorted({str(value) for value in values})
    position = {class_name: label for label, class_name in enumerate(class_names)}
    labels = []
    for value in values:
        number = int(value) if str(value).isdecimal() and len(str(value)) < 10 and str(value) not in position else None
        label = position.get(str(value), number)
        if label is None or label >= len(class_names):
            raise DatasetError(
                f"{name}: {path} has the label {value!r}, which is none of the {len(class_names)} classes"
            )
        labels.append(label)
    return LabelledImages(name, ImageFiles([path.parent / row["image"] for row in rows], labels), class_names, prompts)


def captioned_manifest(name: str, path: Path) -> CaptionedImages:
    """A JSON, JSON lines or CSV file with ``image`` (path relative to the file) and ``caption`` or ``captions`` (a
    list).

    Rows of the same image are joined.

    Raises:
        DatasetError: the file or a row of it cannot be used; names it.
    """
    rows = manifest_rows(name, path, ("image",))
    captions_of: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        captions = _texts(row.get("captions", row.get("caption")))
        if captions is None:
            raise DatasetError(f"{name}: {path}, row {number} has neither a caption nor a list of captions")
        captions_of.setdefault(row["image"], []).extend(captions)
    return captioned(name, ImageFiles([path.parent / image for image in captions_of]), list(captions_of.values()))


def captioned(name: str, samples: Samples, captions_of: Sequence[Sequence[str]], **kwargs: Any) -> CaptionedImages:
    """A retrieval set from the captions of each image."""
    captions: list[str] = []
    pairs: list[tuple[int, int]] = []
    for image, own in enumerate(captions_of):
        for caption in own:
            pairs.append((image, len(captions)))
            captions.append(caption)
    return CaptionedImages(name, samples, captions, pairs, **kwargs)


def manifest_rows(name: str, path: Path, needed: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows of a manifest file, each with the `needed` fields.

    Raises:
        DatasetError: the file or a row of it cannot be used; names it.
    """
    rows: list[Mapping[str, Any]]
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{name}: cannot read the manifest {path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise DatasetError(f"{name}: {path} should hold a list of rows, one for each image")
    for number, row in enumerate(rows, start=1):
        lacking = [field for field in needed if not isinstance(row, dict) or row.get(field) in (None, "")]
        if lacking:
            raise DatasetError(f"{name}: {path}, row {number} has no {' and no '.join(lacking)}")
        if not isinstance(row["image"], str):
            raise DatasetError(f"{name}: {path}, row {number} has the image {row['image']!r}, which is no path")
    return rows


def labelled_tars(
    name: str, paths: Sequence[Path], class_names: Sequence[str], prompts: Sequence[str] = DEFAULT_PROMPTS
) -> LabelledImages:
    """TARs of ``KEY.<image>`` and ``KEY.cls`` (the label as a decimal number), as CLIP_benchmark builds them.

    Raises:
        DatasetError: a TAR or a label cannot be used; names it.
    """
    samples = TarMembers(paths)
    for index, key in enumerate(samples.keys):
        if not samples.has(index, "cls"):
            raise DatasetError(f"{name}: sample {key} has no .cls member")
        text = samples.read(index, "cls").strip()
        label = int(text) if text.isdigit() and len(text) < 10 else -1
        if not 0 <= label < len(class_names):
            shown = text[:20].decode("utf-8", "replace")
            raise DatasetError(f"{name}: sample {key} has the label {shown!r}, none of 0 to {len(class_names) - 1}")
        samples.labels[index] = label
    return LabelledImages(name, samples, class_names, prompts)


def captioned_tars(name: str, paths: Sequence[Path]) -> CaptionedImages:
    """TARs of ``KEY.<image>`` and ``KEY.json`` with ``caption`` (RedCaps, img2dataset) or ``KEY.txt`` (one a line).

    Raises:
        DatasetError: a TAR or a caption cannot be used; names it.
    """
    samples = TarMembers(paths)
    captions_of = []
    for index, key in enumerate(samples.keys):
        own: Any = None
        try:
            if samples.has(index, "json"):
                fields = json.loads(samples.read(index, "json"))
                own = fields.get("captions", fields.get("caption")) if isinstance(fields, dict) else None
            elif samples.has(index, "txt"):
                own = samples.read(index, "txt").decode().splitlines()
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{name}: sample {key} has a caption that cannot be read ({error})") from error
        captions = _texts(own)
        if captions is None:
            raise DatasetError(f"{name}: sample {key} has no caption (a .json with the field caption, or a .txt)")
        captions_of.append(captions)
    return captioned(name, samples, captions_of)


def _texts(value: Any) -> list[str] | None:
    """A text or a list of texts as a list; None for anything else."""
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None
