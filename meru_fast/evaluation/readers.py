"""Readers of the catalog's datasets in the layout that their authors publish.

A reader takes the folder of a dataset and the name of a published split ("train", "validation", ...) and returns the
samples with the keys by which that split is sliced (see ``splits``). Labels follow the class names of the protocol.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meru_fast.evaluation.protocol import DatasetError, protocols
from meru_fast.evaluation.sources import (
    CaptionedImages,
    ImageFiles,
    Samples,
    TarMembers,
    captioned,
    captioned_tars,
    class_folders,
    labelled_tars,
    list_images,
)

CALTECH_TRAIN_PER_CLASS = 30
CALTECH_SEED = 1234


class Split(NamedTuple):
    """Samples of one split and the key of each; without keys the split cannot be sliced."""

    samples: Samples
    keys: Sequence[str | int] | None = None


def torchvision_reader(class_name: str, renamed: dict[str, str] | None = None) -> Callable[[Path, str], Split]:
    """Reader made from a class of ``torchvision.datasets`` that takes ``(root, split=...)``.

    Args:
        renamed: torchvision's name of a split, where it differs from the published one.
    """

    def read(root: Path, split: str) -> Split:
        from torchvision import datasets

        samples = getattr(datasets, class_name)(root, split=(renamed or {}).get(split, split))
        return Split(samples, range(len(samples)))

    return read


def cifar_reader(class_name: str) -> Callable[[Path, str], Split]:
    """Reader made from a class of ``torchvision.datasets`` that takes ``(root, train=...)``."""

    def read(root: Path, split: str) -> Split:
        from torchvision import datasets

        samples = getattr(datasets, class_name)(root, train=split == "train")
        return Split(samples, range(len(samples)))

    return read


def read_imagenet(root: Path, split: str) -> Split:
    """``<split>/<wordnet id>/<image>``."""
    folders = expected_folders("imagenet", root / split)
    return Split(ImageFiles(*list_images(root / split, folders)))


def read_food101(root: Path, split: str) -> Split:
    """``food-101/meta/{train,test}.json`` and ``food-101/images/<class>/<number>.jpg``."""
    folder = root / "food-101"
    listed = json.loads((folder / "meta" / ("train.json" if split == "train" else "test.json")).read_text())
    keys = [key for class_name in sorted(listed) for key in listed[class_name]]
    labels = [label for label, class_name in enumerate(sorted(listed)) for _ in listed[class_name]]
    return listed_files("food101", [folder / "images" / f"{key}.jpg" for key in keys], labels, keys)


def read_cub2011(root: Path, split: str) -> Split:
    """``CUB_200_2011`` with ``images.txt``, ``image_class_labels.txt`` and ``train_test_split.txt``."""
    folder = root / "CUB_200_2011"
    in_train = dict(read_columns(folder / "train_test_split.txt", 2))
    class_of = dict(read_columns(folder / "image_class_labels.txt", 2))
    wanted = "1" if split == "train" else "0"
    chosen = [(number, file) for number, file in read_columns(folder / "images.txt", 2) if in_train[number] == wanted]
    paths = [folder / "images" / file for _, file in chosen]
    labels = [int(class_of[number]) - 1 for number, _ in chosen]
    return listed_files("cub2011", paths, labels, [f"CUB_200_2011/images/{file}" for _, file in chosen])


def read_sun397(root: Path, split: str) -> Split:
    """``SUN397/<letter>/<class>/<image>`` and partition 1, ``Partitions/{Training,Testing}_01.txt``."""
    folder = root / "SUN397"
    class_names = [line for (line,) in read_columns(folder / "ClassName.txt", 1)]
    position = {class_name: label for label, class_name in enumerate(class_names)}
    listed = read_columns(root / "Partitions" / ("Training_01.txt" if split == "train" else "Testing_01.txt"), 1)
    keys = [line for (line,) in listed]
    labels = [position[key.rpartition("/")[0]] for key in keys]
    return listed_files("sun397", [folder / key.lstrip("/") for key in keys], labels, keys)


def read_cars(root: Path, split: str) -> Split:
    """``stanford_cars/cars_{train,test}`` and the annotations of the devkit, as MATLAB files."""
    from scipy.io import loadmat

    folder = root / "stanford_cars"
    file = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    rows = loadmat(folder / file, squeeze_me=True)["annotations"]
    files, labels = [str(row["fname"]) for row in rows], [int(row["class"]) - 1 for row in rows]
    paths = [folder / f"cars_{split}" / file for file in files]
    return listed_files("cars", paths, labels, [file.split(".")[0] for file in files])


def read_pets(root: Path, split: str) -> Split:
    """``oxford-iiit-pet/{images,annotations}``, listed in ``annotations/{trainval,test}.txt``."""
    folder = root / "oxford-iiit-pet"
    listed = read_columns(folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt"), 4)
    keys = [f"{name}.jpg" for name, *_ in listed]
    return listed_files("pets", [folder / "images" / key for key in keys], [int(row[1]) - 1 for row in listed], keys)


def read_caltech101(root: Path, split: str) -> Split:
    """``caltech101/101_ObjectCategories/<class>/<image>``: 30 images of each class, drawn by a fixed seed, are for
    training.

    The background class counts. The published draw depends on the order in which a file system listed the images; this
    one takes them sorted.

    Raises:
        DatasetError: a class folder is missing or has too few images.
    """
    folder = root / "caltech101" / "101_ObjectCategories"
    folders = sorted(expected_folders("caltech101", folder), key=str.lower)
    random = np.random.RandomState(CALTECH_SEED)
    paths, labels = [], []
    for label, class_folder in enumerate(folders):
        images = list_images(folder, [class_folder])[0]
        if len(images) <= CALTECH_TRAIN_PER_CLASS:
            raise DatasetError(
                f"caltech101: {folder / class_folder} has {len(images)} images, more than 30 needed; extract it again"
            )
        chosen = set(random.choice(len(images), CALTECH_TRAIN_PER_CLASS, replace=False).tolist())
        own = [path for number, path in enumerate(images) if (number in chosen) == (split == "train")]
        paths += own
        labels += [label] * len(own)
    return Split(ImageFiles(paths, labels), [f"{path.parent.name}/{path.name}" for path in paths])


def read_eurosat(root: Path, split: str) -> Split:
    """``eurosat/2750/<class>/<image>``; there is one split, "train"."""
    return prefixed_folders("eurosat", root / "eurosat" / "2750")


def read_resisc45(root: Path, split: str) -> Split:
    """``NWPU-RESISC45/<class>/<image>``; there is one split, "train"."""
    return prefixed_folders("resisc45", root / "NWPU-RESISC45")


def read_clevr(root: Path, split: str) -> Split:
    """``clevr/CLEVR_v1.0/{images,scenes}``; the class is the number of objects."""
    folder, part = root / "clevr" / "CLEVR_v1.0", {"validation": "val"}.get(split, split)
    scenes = json.loads((folder / "scenes" / f"CLEVR_{part}_scenes.json").read_text())["scenes"]
    counts = {scene["image_filename"]: len(scene["objects"]) for scene in scenes}
    position = {class_name: label for label, class_name in enumerate(protocols()["clevr"].class_names)}
    keys = sorted(counts)
    labels = [position[str(counts[key])] for key in keys]
    return listed_files("clevr", [folder / "images" / part / key for key in keys], labels, keys)


def read_coco(root: Path, split: str) -> CaptionedImages:
    """``annotations/captions_val2017.json`` and ``val2017/``; all captions of an image count."""
    listed = json.loads((root / "annotations" / f"captions_{split}2017.json").read_text())
    captions_of: dict[int, list[str]] = {image["id"]: [] for image in listed["images"]}
    for annotation in listed["annotations"]:
        captions_of[annotation["image_id"]].append(annotation["caption"])
    paths = [root / f"{split}2017" / image["file_name"] for image in listed["images"]]
    return captioned("coco", existing("coco", paths, [0] * len(paths)), list(captions_of.values()))


def read_flickr30k(root: Path, split: str) -> CaptionedImages:
    """``dataset_flickr30k.json`` (Karpathy's splits) and ``flickr30k_images/``."""
    listed = json.loads((root / "dataset_flickr30k.json").read_text())["images"]
    images = [image for image in listed if image["split"] == split]
    paths = [root / "flickr30k_images" / image["filename"] for image in images]
    captions_of = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    return captioned("flickr30k", existing("flickr30k", paths, [0] * len(paths)), captions_of)


def read_webdataset(name: str, root: Path, split: str) -> Split | CaptionedImages:
    """``<split>/nshards.txt`` and ``<split>/0.tar`` ..., the layout that CLIP_benchmark writes; splits "train" and
    "test".

    ``classnames.txt`` is only compared in length: the names and prompts are those of the protocol.

    Raises:
        DatasetError: files are missing or damaged.
    """
    folder = root / split
    try:
        count = int((folder / "nshards.txt").read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{name}: {folder / 'nshards.txt'} does not hold the number of TARs ({error})") from error
    paths = [folder / f"{number}.tar" for number in range(count)]
    lacking = [path for path in paths if not path.is_file()]
    if lacking:
        raise DatasetError(f"{name}: {len(lacking)} of {count} TARs are missing, the first is {lacking[0]}")
    if protocols()[name].task == "retrieval":
        return captioned_tars(name, paths)
    class_names = protocols()[name].class_names
    own_names = root / "classnames.txt"
    if own_names.is_file() and len(own_names.read_text().splitlines()) != len(class_names):
        raise DatasetError(f"{name}: {own_names} does not name {len(class_names)} classes; this is another dataset")
    samples = labelled_tars(name, paths, class_names).samples
    assert isinstance(samples, TarMembers)
    if name == "clevr":  # stored as number of objects minus 3; the protocol sorts the numbers as text
        samples.labels = [class_names.index(str(label + 3)) for label in samples.labels]
    return Split(samples, samples.keys)


def prefixed_folders(name: str, folder: Path) -> Split:
    """One folder for each class; the key of an image is its class, an underscore and its file name."""
    paths, labels = list_images(folder, expected_folders(name, folder))
    return Split(ImageFiles(paths, labels), [f"{path.parent.name}_{path.name}" for path in paths])


def expected_folders(name: str, folder: Path) -> list[str]:
    """The class folders in `folder`. Raises DatasetError unless there are as many as the protocol has classes."""
    folders, classes = class_folders(name, folder), len(protocols()[name].class_names)
    if len(folders) != classes:
        raise DatasetError(f"{name}: {folder} has {len(folders)} class folders, expected {classes}; extract it again")
    return folders


def listed_files(name: str, paths: Sequence[Path], labels: Sequence[int], keys: Sequence[str]) -> Split:
    return Split(existing(name, paths, labels), keys)


def existing(name: str, paths: Sequence[Path], labels: Iterable[int]) -> ImageFiles:
    """The files with their labels. Raises DatasetError if one is not there."""
    lacking = [path for path in paths if not path.is_file()]
    if lacking:
        raise DatasetError(f"{name}: {len(lacking)} of {len(paths)} listed images are missing, such as {lacking[0]}")
    return ImageFiles(paths, labels)


def read_columns(path: Path, columns: int) -> list[list[str]]:
    """Lines of a text file in so many columns, without empty lines and comments (#).

    Raises:
        DatasetError: a file or a column is missing.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        row = line.split(maxsplit=columns - 1)
        if len(row) != columns:
            raise DatasetError(f"{path}, line {number}: expected {columns} columns, found {len(row)}")
        rows.append(row)
    return rows
