"""Miniatures of the catalog's datasets, in the layout in which their authors publish them.

Each builder fills a folder and returns the number of samples of every part of the protocol. Pictures carry their label
(``eval_models.paint``), so a test sees whether a reader pairs them rightly.
"""

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from eval_models import paint

from meru_fast.evaluation.protocol import protocols

BUILDERS: dict[str, Callable[..., dict[str, int]]] = {}


def builder(function: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
    BUILDERS[function.__name__] = function
    return function


def classes(name: str) -> int:
    return len(protocols()[name].class_names)


def save(path: Path, label: int) -> None:
    """Write the picture of a label; the same picture is encoded once and copied after that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(label, path.suffix.lower()))


_ENCODED: dict[tuple[int, str], bytes] = {}


def encoded(label: int, suffix: str) -> bytes:
    if (label, suffix) not in _ENCODED:
        buffer = io.BytesIO()
        paint(label).save(buffer, {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG"), quality=95)
        _ENCODED[label, suffix] = buffer.getvalue()
    return _ENCODED[label, suffix]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def pixels(label: int, side: int) -> np.ndarray:
    """[3, side, side] uint8."""
    return np.asarray(paint(label, (side, side))).transpose(2, 0, 1)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@builder
def imagenet(root: Path, monkeypatch) -> dict[str, int]:
    for label in range(1000):
        save(root / "val" / f"n{label:08d}" / "ILSVRC2012_val_00000001.JPEG", label)
    for label in range(1000):
        save(root / "train" / f"n{label:08d}" / "a.JPEG", label)
    return {"train": 1000, "test": 1000}


@builder
def food101(root: Path, monkeypatch) -> dict[str, int]:
    names = sorted(name.replace(" ", "_") for name in protocols()["food101"].class_names)
    for file, count in (("train", 10), ("test", 2)):
        listed = {name: [f"{name}/{file}{number}" for number in range(count)] for name in names}
        write(root / "food-101" / "meta" / f"{file}.json", json.dumps(listed))
        for label, name in enumerate(names):
            for key in listed[name]:
                save(root / "food-101" / "images" / f"{key}.jpg", label)
    return {"train": 909, "val": 101, "test": 202}


def _cifar(root: Path, monkeypatch, name: str) -> dict[str, int]:
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    prefix, count = ("label", 10) if name == "cifar10" else ("fine_label", 100)
    key, folder = f"{prefix}s", root / cls.base_folder
    folder.mkdir(parents=True)
    names = {f"{prefix}_names": [str(number) for number in range(count)]}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(names))
    for attribute in ("train_list", "test_list"):
        for file, _ in getattr(cls, attribute):
            rows = np.stack([pixels(label, 32).reshape(-1) for label in range(count)])
            (folder / file).write_bytes(pickle.dumps({"data": rows, key: list(range(count))}))
        # the class compares md5 with the real files
        checked = [[file, md5(folder / file)] for file, _ in getattr(cls, attribute)]
        monkeypatch.setattr(cls, attribute, checked)
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(folder / cls.meta["filename"])})
    train = count * len(cls.train_list)
    return {"train": round(0.9 * train), "val": train - round(0.9 * train), "test": count}


@builder
def cifar10(root: Path, monkeypatch) -> dict[str, int]:
    return _cifar(root, monkeypatch, "cifar10")


@builder
def cifar100(root: Path, monkeypatch) -> dict[str, int]:
    return _cifar(root, monkeypatch, "cifar100")


@builder
def cub2011(root: Path, monkeypatch) -> dict[str, int]:
    folder = root / "CUB_200_2011"
    images, labels, splits, number = [], [], [], 0
    for label in range(200):
        for shot in range(3):
            number += 1
            file = f"{label + 1:03d}.Bird_{label}/Bird_{label}_{shot:04d}.jpg"
            save(folder / "images" / file, label)
            images.append(f"{number} {file}")
            labels.append(f"{number} {label + 1}")
            splits.append(f"{number} {int(shot < 2)}")
    for name, lines in (("images", images), ("image_class_labels", labels), ("train_test_split", splits)):
        write(folder / f"{name}.txt", "\n".join(lines) + "\n")
    return {"train": 320, "val": 80, "test": 200}


@builder
def sun397(root: Path, monkeypatch) -> dict[str, int]:
    names = [
        f"/{name[0]}/{name.replace(' ', '_')}_{number}" for number, name in enumerate(protocols()["sun397"].class_names)
    ]
    names[1] = "/a/apartment_building/outdoor"
    write(root / "SUN397" / "ClassName.txt", "\n".join(names) + "\n")
    for label, name in enumerate(names):
        for part in ("tr", "te"):
            save(root / "SUN397" / name.lstrip("/") / f"sun_{part}{label}.jpg", label)
    for file, part in (("Training_01", "tr"), ("Testing_01", "te")):
        lines = [f"{name}/sun_{part}{label}.jpg" for label, name in enumerate(names)]
        write(root / "Partitions" / f"{file}.txt", "\n".join(reversed(lines)) + "\n")
    return {"train": 318, "val": 79, "test": 397}


@builder
def cars(root: Path, monkeypatch) -> dict[str, int]:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    kind = [("bbox_x1", "f8"), ("class", "f8"), ("fname", "O")]
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(1.0, label + 1.0, f"{label + 1:05d}.jpg") for label in range(196)], dtype=kind)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        savemat(folder / file, {"annotations": rows})
        for label in range(196):
            save(folder / f"cars_{split}" / f"{label + 1:05d}.jpg", label)
    return {"train": 157, "val": 39, "test": 196}


@builder
def aircraft(root: Path, monkeypatch) -> dict[str, int]:
    data = root / "fgvc-aircraft-2013b" / "data"
    names = protocols()["aircraft"].class_names
    write(data / "variants.txt", "\n".join(names) + "\n")
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(names):
            key = f"{number}{label:06d}"
            save(data / "images" / f"{key}.jpg", label)
            lines.append(f"{key} {name}")
        write(data / f"images_variant_{split}.txt", "\n".join(lines) + "\n")
    return dict.fromkeys(("train", "val", "test"), 100)


@builder
def dtd(root: Path, monkeypatch) -> dict[str, int]:
    folder = root / "dtd" / "dtd"
    names = protocols()["dtd"].class_names
    for number, file in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(names):
            key = f"{name}/{name}_{number:04d}.jpg"
            save(folder / "images" / key, label)
            lines.append(key)
        write(folder / "labels" / f"{file}1.txt", "\n".join(lines) + "\n")
    return dict.fromkeys(("train", "val", "test"), 47)


@builder
def pets(root: Path, monkeypatch) -> dict[str, int]:
    folder = root / "oxford-iiit-pet"
    for file in ("trainval", "test"):
        lines = []
        for label, name in enumerate(protocols()["pets"].class_names):
            for number in range(5):
                key = f"{name.replace(' ', '_')}_{file}{number}"
                save(folder / "images" / f"{key}.jpg", label)
                lines.append(f"{key} {label + 1} 1 1")
        write(folder / "annotations" / f"{file}.txt", "\n".join(lines) + "\n")
    return {"train": 148, "val": 37, "test": 185}


@builder
def caltech101(root: Path, monkeypatch) -> dict[str, int]:
    names = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes"]
    names += [f"{chr(97 + number % 26)}_{number:03d}" for number in range(97)]
    for label, name in enumerate(sorted(names, key=str.lower)):
        for number in range(32):
            save(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", label)
    write(root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp", "not an image")
    return {"train": 2448, "val": 612, "test": 204}


@builder
def flowers102(root: Path, monkeypatch) -> dict[str, int]:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    labels = np.arange(306) % 102
    for number, label in enumerate(labels, start=1):
        save(folder / "jpg" / f"image_{number:05d}.jpg", int(label))
    savemat(folder / "imagelabels.mat", {"labels": labels + 1})
    numbers = np.arange(1, 307)
    savemat(folder / "setid.mat", {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]})
    checked = {key: (file, checksum) for key, (file, checksum) in Flowers102._file_dict.items()}
    for key in ("label", "setid"):
        checked[key] = (checked[key][0], md5(folder / checked[key][0]))
    monkeypatch.setattr(Flowers102, "_file_dict", checked)
    return dict.fromkeys(("train", "val", "test"), 102)


@builder
def stl10(root: Path, monkeypatch) -> dict[str, int]:
    from torchvision.datasets import STL10

    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = np.stack([pixels(label, 96).transpose(0, 2, 1) for label in range(10)])  # columns first
    for split in ("train", "test"):
        images.tofile(folder / f"{split}_X.bin")
        np.arange(1, 11, dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    images[:1].tofile(folder / "unlabeled_X.bin")
    write(folder / "class_names.txt", "\n".join(protocols()["stl10"].class_names) + "\n")
    for attribute in ("train_list", "test_list"):
        checked = [[file, md5(folder / file)] for file, _ in getattr(STL10, attribute)]
        monkeypatch.setattr(STL10, attribute, checked)
    return {"train": 8, "val": 2, "test": 10}


@builder
def eurosat(root: Path, monkeypatch) -> dict[str, int]:
    """The protocol takes 15,000 of 27,000: here 10 pictures, linked 1,501 times each."""
    names = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop")
    names += ("Residential", "River", "SeaLake")
    for label, name in enumerate(names):
        folder = root / "eurosat" / "2750" / name
        save(folder / f"{name}_1.jpg", label)
        for number in range(2, 1502):
            os.link(folder / f"{name}_1.jpg", folder / f"{name}_{number}.jpg")
    return {"train": 5000, "val": 5000, "test": 5000}


@builder
def resisc45(root: Path, monkeypatch) -> dict[str, int]:
    for label, name in enumerate(protocols()["resisc45"].class_names):
        for number in range(1, 5):
            folder = name.replace(" ", "_")
            save(root / "NWPU-RESISC45" / folder / f"{folder}_{number:03d}.jpg", label)
    return {"train": 18, "val": 18, "test": 144}


@builder
def country211(root: Path, monkeypatch) -> dict[str, int]:
    for split in ("train", "valid", "test"):
        for label in range(211):
            code = chr(65 + label // 26) + chr(65 + label % 26)
            save(root / "country211" / split / code / f"{label}.jpg", label)
    return dict.fromkeys(("train", "val", "test"), 211)


@builder
def mnist(root: Path, monkeypatch) -> dict[str, int]:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in ("train", "t10k"):
        images = np.stack([np.full((28, 28), 25 * label + 12, np.uint8) for label in range(10)])
        header = np.array([2051, 10, 28, 28], ">i4").tobytes()
        (folder / f"{file}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([2049, 10], ">i4").tobytes()
        (folder / f"{file}-labels-idx1-ubyte").write_bytes(header + bytes(range(10)))
    return {"train": 8, "val": 2, "test": 10}


@builder
def clevr(root: Path, monkeypatch) -> dict[str, int]:
    """The protocol takes 5,000 training images: 8 pictures, linked."""
    folder = root / "clevr" / "CLEVR_v1.0"
    names = protocols()["clevr"].class_names
    for part, count in (("train", 5010), ("val", 24)):
        scenes = []
        for number in range(count):
            label = number % 8
            path = folder / "images" / part / f"CLEVR_{part}_{number:06d}.png"
            if number < 8:
                save(path, label)
            else:
                os.link(folder / "images" / part / f"CLEVR_{part}_{label:06d}.png", path)
            scenes.append({"image_filename": path.name, "objects": [{}] * int(names[label])})
        write(folder / "scenes" / f"CLEVR_{part}_scenes.json", json.dumps({"scenes": scenes}))
    return {"train": 4500, "val": 500, "test": 24}


@builder
def pcam(root: Path, monkeypatch) -> dict[str, int]:
    import h5py

    folder = root / "pcam"
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        with h5py.File(folder / f"camelyonpatch_level_2_split_{part}_x.h5", "w") as file:
            file["x"] = np.stack([np.asarray(paint(label, (96, 96))) for label in (0, 1, 1)])
        with h5py.File(folder / f"camelyonpatch_level_2_split_{part}_y.h5", "w") as file:
            file["y"] = np.array([0, 1, 1], np.uint8).reshape(3, 1, 1, 1)
    return dict.fromkeys(("train", "val", "test"), 3)


@builder
def sst2(root: Path, monkeypatch) -> dict[str, int]:
    for split in ("train", "valid", "test"):
        for label, name in enumerate(("negative", "positive")):
            save(root / "rendered-sst2" / split / name / "0.png", label)
    return dict.fromkeys(("train", "val", "test"), 2)


@builder
def coco(root: Path, monkeypatch) -> dict[str, int]:
    ids = (139, 285, 632)
    for number, image in enumerate(ids):
        save(root / "val2017" / f"{image:012d}.jpg", number)
    listed = {
        "images": [{"id": image, "file_name": f"{image:012d}.jpg"} for image in ids],
        "annotations": [
            {"id": 10 * number + which, "image_id": image, "caption": f"caption {number} {which}"}
            for which in range(5 + 1)
            for number, image in enumerate(ids)
            if which < 5 or number == 1  # a few images have six
        ],
    }
    write(root / "annotations" / "captions_val2017.json", json.dumps(listed))
    return {"test": 3}


@builder
def flickr30k(root: Path, monkeypatch) -> dict[str, int]:
    images = []
    for number in range(4):
        save(root / "flickr30k_images" / f"{1000 + number}.jpg", number)
        sentences = [{"raw": f"caption {number} {which}", "sentid": 5 * number + which} for which in range(5)]
        split = "train" if number == 3 else "test"
        images.append({"filename": f"{1000 + number}.jpg", "split": split, "sentences": sentences})
    write(root / "dataset_flickr30k.json", json.dumps({"images": images}))
    return {"test": 3}


def webdataset(root: Path, name: str, copies: int = 5) -> None:
    """The build of CLIP_benchmark: two TARs for each of train and test."""
    retrieval = protocols()[name].task == "retrieval"
    count = 3 if retrieval else classes(name)
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        write(root / split / "nshards.txt", "2")
        samples = [label for _ in range(copies) for label in range(count)]
        for shard in range(2):
            with tarfile.open(root / split / f"{shard}.tar", "w") as tar:
                for number, label in list(enumerate(samples))[shard::2]:
                    stored = str(label)
                    if name == "clevr":
                        stored = str(int(protocols()[name].class_names[label]) - 3)
                    text = "\n".join(f"caption {label} {which}" for which in range(5))
                    members = {"webp": encoded(label, ".webp")}
                    members |= {"txt": text.encode()} if retrieval else {"cls": stored.encode()}
                    for suffix, content in members.items():
                        info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    if not retrieval:
        write(root / "classnames.txt", "\n".join(protocols()[name].class_names))
        write(root / "zeroshot_classification_templates.txt", "a photo of {c}")
    write(root / "dataset_type.txt", "retrieval" if retrieval else "classification")
