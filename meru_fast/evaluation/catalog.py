"""The 22 datasets of the published evaluation: where they are looked for, how they are read and how to get them.

Adding a dataset: put its class names, prompts and splits into ``assets/eval_protocol.json`` and an ``Entry`` here; a
reader of its own (``readers``) is needed only where torchvision has no class for it. Data for one occasion needs
neither: describe it in the config (``open_own``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from meru_fast.evaluation import readers, sources
from meru_fast.evaluation.download import Download, Hosted
from meru_fast.evaluation.protocol import DatasetError, protocols
from meru_fast.evaluation.readers import Split, cifar_reader, torchvision_reader
from meru_fast.evaluation.sources import CaptionedImages, LabelledImages, Subset
from meru_fast.evaluation.splits import base_name, slice_of, tfds_order

HELD_OUT = 0.2  # of the training part of a webdataset build, which has no validation part
AS_PUBLISHED = "as published"


@dataclass(frozen=True)
class Entry:
    """One dataset of the catalog.

    Attributes:
        needs: what must lie in ``<data_dir>/<name>`` to read a split, by the split's name.
        licence: terms of the images, in a few words.
        how: how to get it by hand, where it cannot be downloaded.
        get: files to download, or the repository that hosts a webdataset build.
        differs: why the split is not the published one; empty where it is.
        size: images in the published test part; 0 where that is not known.
    """

    title: str
    read: Callable[[Path, str], Split | CaptionedImages]
    needs: Mapping[str, tuple[str, ...]]
    licence: str
    homepage: str
    get: tuple[Download, ...] | Hosted = ()
    how: str = ""
    differs: str = ""
    size: int = 0


@dataclass(frozen=True)
class Status:
    """Whether a dataset is there.

    Attributes:
        state: "present", "incomplete" or "missing".
        layout: "original" or "webdataset".
        missing: the paths that are looked for and are not there.
        provenance: "as published", or "differs, because ...".
        how: how to get it.
    """

    name: str
    title: str
    task: str
    state: str
    layout: str
    root: Path
    missing: tuple[Path, ...]
    licence: str
    homepage: str
    provenance: str
    how: str


def _entries() -> dict[str, Entry]:
    oxford = "https://www.robots.ox.ac.uk/~vgg/data"
    openai = "https://openaipublic.azureedge.net/clip/data"
    mnist = "https://ossci-datasets.s3.amazonaws.com/mnist"
    coco = "http://images.cocodataset.org"
    return {
        "imagenet": Entry(
            "ImageNet-1k (ILSVRC 2012)",
            readers.read_imagenet,
            {"val": ("val",), "train": ("train",)},
            "non-commercial research, by registration",
            "https://image-net.org/download.php",
            how="register, download ILSVRC2012_img_val.tar and sort the images into val/<wordnet id>/",
            size=50_000,
        ),
        "food101": Entry(
            "Food-101",
            readers.read_food101,
            {
                "train": ("food-101/meta/train.json", "food-101/images"),
                "validation": ("food-101/meta/test.json", "food-101/images"),
            },
            "images from Foodspotting; research, fair use",
            "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            (Download("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "md5:85eeb15f3717b99a5da872d97d918f87"),),
            size=25_250,
        ),
        "cifar10": Entry(
            "CIFAR-10",
            cifar_reader("CIFAR10"),
            {
                "train": tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
                "test": ("cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"),
            },
            "not stated by the authors",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            (
                Download(
                    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"
                ),
            ),
            size=10_000,
        ),
        "cifar100": Entry(
            "CIFAR-100",
            cifar_reader("CIFAR100"),
            {"train": ("cifar-100-python/train",), "test": ("cifar-100-python/test", "cifar-100-python/meta")},
            "not stated by the authors",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            (
                Download(
                    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"
                ),
            ),
            size=10_000,
        ),
        "cub2011": Entry(
            "Caltech-UCSD Birds-200-2011",
            readers.read_cub2011,
            {
                split: tuple(
                    f"CUB_200_2011/{name}"
                    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images")
                )
                for split in ("train", "test")
            },
            "non-commercial research and education",
            "https://www.vision.caltech.edu/datasets/cub_200_2011/",
            (
                Download(
                    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                    "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                ),
            ),
            size=5_794,
        ),
        "sun397": Entry(
            "SUN397, partition 1",
            readers.read_sun397,
            {
                "train": ("SUN397/ClassName.txt", "Partitions/Training_01.txt"),
                "test": ("SUN397/ClassName.txt", "Partitions/Testing_01.txt"),
            },
            "not stated by the authors; research",
            "https://vision.princeton.edu/projects/2010/SUN/",
            (
                Download(
                    "https://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                    "md5:8ca2778205c41d23104230ba66911c7a",
                ),
                Download(
                    "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
                    "sha256:e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9",
                    folder="Partitions",
                ),
            ),
            differs="the published images were re-encoded at 120,000 pixels and these are not; the lists agree",
            size=19_850,
        ),
        "cars": Entry(
            "Stanford Cars",
            readers.read_cars,
            {
                "train": ("stanford_cars/devkit/cars_train_annos.mat", "stanford_cars/cars_train"),
                "test": ("stanford_cars/cars_test_annos_withlabels.mat", "stanford_cars/cars_test"),
            },
            "non-commercial research",
            "https://github.com/pytorch/vision/issues/7545",
            Hosted("clip-benchmark/wds_cars"),
            how="the authors' site is gone; their files can be placed by hand into stanford_cars/",
            size=8_041,
        ),
        "aircraft": Entry(
            "FGVC Aircraft, variants",
            torchvision_reader("FGVCAircraft"),
            {
                split: ("fgvc-aircraft-2013b/data/images", f"fgvc-aircraft-2013b/data/images_variant_{split}.txt")
                for split in ("train", "val", "test")
            },
            "non-commercial research",
            f"{oxford}/fgvc-aircraft/",
            (Download(f"{oxford}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", ""),),
            size=3_333,
        ),
        "dtd": Entry(
            "Describable Textures, partition 1",
            torchvision_reader("DTD", {"validation": "val"}),
            {
                split: ("dtd/dtd/images", f"dtd/dtd/labels/{file}1.txt")
                for split, file in (("train", "train"), ("validation", "val"), ("test", "test"))
            },
            "research",
            f"{oxford}/dtd/",
            (Download(f"{oxford}/dtd/download/dtd-r1.0.1.tar.gz", "md5:fff73e5086ae6bdbea199a49dfb8a4c1", "dtd"),),
            size=1_880,
        ),
        "pets": Entry(
            "Oxford-IIIT Pets",
            readers.read_pets,
            {
                "train": ("oxford-iiit-pet/annotations/trainval.txt", "oxford-iiit-pet/images"),
                "test": ("oxford-iiit-pet/annotations/test.txt", "oxford-iiit-pet/images"),
            },
            "CC BY-SA 4.0",
            f"{oxford}/pets/",
            (
                Download(
                    f"{oxford}/pets/data/images.tar.gz", "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet"
                ),
                Download(
                    f"{oxford}/pets/data/annotations.tar.gz", "md5:95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet"
                ),
            ),
            size=3_669,
        ),
        "caltech101": Entry(
            "Caltech-101",
            readers.read_caltech101,
            dict.fromkeys(("train", "test"), ("caltech101/101_ObjectCategories",)),
            "CC BY 4.0",
            "https://data.caltech.edu/records/mzrjq-6wc02",
            (
                Download(
                    "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1",
                    "sha256:331234750fc7f77520e50d9565e8b6907b03565e30320da1401130db08c61f91",
                    "caltech101",
                    nested="caltech-101/101_ObjectCategories.tar.gz",
                ),
            ),
            differs="the published draw of 30 training images a class depends on the file system it was made on",
        ),
        "flowers102": Entry(
            "Oxford Flowers-102",
            torchvision_reader("Flowers102", {"validation": "val"}),
            dict.fromkeys(
                ("train", "validation", "test"),
                ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
            ),
            "not stated by the authors",
            f"{oxford}/flowers/102/",
            (
                Download(f"{oxford}/flowers/102/102flowers.tgz", "md5:52808999861908f626f3c1f4e79d11fa", "flowers-102"),
                Download(
                    f"{oxford}/flowers/102/imagelabels.mat", "md5:e0620be6f572b9609742df49c70aed4d", "flowers-102"
                ),
                Download(f"{oxford}/flowers/102/setid.mat", "md5:a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102"),
            ),
            size=6_149,
        ),
        "stl10": Entry(
            "STL-10",
            torchvision_reader("STL10"),
            {
                # torchvision checks all files, whichever split is read
                split: tuple(
                    f"stl10_binary/{name}"
                    for name in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin")
                )
                for split in ("train", "test")
            },
            "not stated by the authors; images from ImageNet",
            "https://cs.stanford.edu/~acoates/stl10/",
            (
                Download(
                    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "md5:91f7769df0f17e558f3565bffb0c7dfb"
                ),
            ),
            size=8_000,
        ),
        "eurosat": Entry(
            "EuroSAT (RGB)",
            readers.read_eurosat,
            {"train": ("eurosat/2750",)},
            "MIT",
            "https://github.com/phelber/eurosat",
            (
                Download(
                    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
                    "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                    "md5:c8fa014336c82ac7804f0398fcb19387",
                    "eurosat",
                ),
            ),
            size=5_000,
        ),
        "resisc45": Entry(
            "NWPU-RESISC45",
            readers.read_resisc45,
            {"train": ("NWPU-RESISC45",)},
            "not stated by the authors; research",
            "https://gcheng-nwpu.github.io/",
            Hosted("clip-benchmark/wds_vtab-resisc45"),
            how="or download NWPU-RESISC45.rar from the authors' page and unpack it",
            size=25_200,
        ),
        "country211": Entry(
            "Country211",
            torchvision_reader("Country211"),
            {split: (f"country211/{split}",) for split in ("train", "valid", "test")},
            "part of YFCC100M; each image under its own Creative Commons licence",
            "https://github.com/openai/CLIP/blob/main/data/country211.md",
            (Download(f"{openai}/country211.tgz", "md5:84988d7644798601126c29e9877aab6a"),),
            size=21_100,
        ),
        "mnist": Entry(
            "MNIST",
            cifar_reader("MNIST"),
            {
                split: (f"MNIST/raw/{file}-images-idx3-ubyte", f"MNIST/raw/{file}-labels-idx1-ubyte")
                for split, file in (("train", "train"), ("test", "t10k"))
            },
            "CC BY-SA 3.0",
            "http://yann.lecun.com/exdb/mnist/",
            tuple(
                Download(f"{mnist}/{file}.gz", f"md5:{checksum}", "MNIST/raw")
                for file, checksum in (
                    ("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                    ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
                    ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
                    ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
                )
            ),
            size=10_000,
        ),
        "clevr": Entry(
            "CLEVR, number of objects",
            readers.read_clevr,
            {
                split: (f"clevr/CLEVR_v1.0/images/{part}", f"clevr/CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json")
                for split, part in (("train", "train"), ("validation", "val"))
            },
            "CC BY 4.0",
            "https://cs.stanford.edu/people/jcjohns/clevr/",
            (
                Download(
                    "https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip",
                    "md5:b11922020e72d0cd9154779b2d3d07d2",
                    "clevr",
                ),
            ),
            size=5_000,
        ),
        "pcam": Entry(
            "PatchCamelyon",
            torchvision_reader("PCAM", {"validation": "val"}),
            {
                split: tuple(f"pcam/camelyonpatch_level_2_split_{part}_{kind}.h5" for kind in "xy")
                for split, part in (("train", "train"), ("validation", "valid"), ("test", "test"))
            },
            "CC0",
            "https://github.com/basveeling/pcam",
            Hosted("clip-benchmark/wds_vtab-pcam"),
            how="or download the .h5 files from the authors' page into pcam/ and `pip install h5py`",
            size=32_768,
        ),
        "sst2": Entry(
            "Rendered SST2",
            torchvision_reader("RenderedSST2"),
            {
                split: tuple(f"rendered-sst2/{folder}/{label}" for label in ("negative", "positive"))
                for split, folder in (("train", "train"), ("val", "valid"), ("test", "test"))
            },
            "not stated by the authors",
            "https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
            (Download(f"{openai}/rendered-sst2.tgz", "md5:2384d08e9dcfa4bd55b324e610496ee5"),),
            size=1_821,
        ),
        "coco": Entry(
            "COCO captions, val2017",
            readers.read_coco,
            {"val": ("val2017", "annotations/captions_val2017.json")},
            "annotations CC BY 4.0; images under Flickr's terms",
            "https://cocodataset.org/#download",
            (
                Download(f"{coco}/zips/val2017.zip", ""),
                Download(f"{coco}/annotations/annotations_trainval2017.zip", ""),
            ),
            size=5_000,
        ),
        "flickr30k": Entry(
            "Flickr30k, Karpathy's test split",
            readers.read_flickr30k,
            {"test": ("dataset_flickr30k.json", "flickr30k_images")},
            "non-commercial research and education, by form",
            "https://shannon.cs.illinois.edu/DenotationGraph/",
            how="fill in the authors' form for flickr30k-images.tar.gz (unpack to flickr30k_images/) and add "
            "dataset_flickr30k.json of https://cs.stanford.edu/people/karpathy/deepimagesent/",
            size=1_000,
        ),
    }


ENTRIES: dict[str, Entry] = _entries()


def name_of(entry: str | Mapping[str, Any]) -> str:
    """Name of a config entry: a catalog name, or the ``name`` of own data. Raises DatasetError for neither."""
    if isinstance(entry, str):
        if entry not in ENTRIES:
            raise DatasetError(f"unknown dataset {entry!r}; the catalog has {', '.join(ENTRIES)}")
        return entry
    unknown = set(entry) - {"name", "kind", "root", "class_names", "prompts"}
    lacking = {"name", "kind", "root"} - set(entry)
    if unknown or lacking:
        fault = (
            f"has no {', '.join(sorted(lacking))}" if lacking else f"has the unknown key {', '.join(sorted(unknown))}"
        )
        raise DatasetError(
            f"own dataset {dict(entry)} {fault}; keys: name, kind, root, and optional class_names, prompts"
        )
    return str(entry["name"])


def open_dataset(
    entry: str | Mapping[str, Any], data_dir: str | Path, part: str = "test"
) -> LabelledImages | CaptionedImages:
    """Open one part of a dataset.

    Args:
        entry: a catalog name, or a mapping as ``open_own`` takes it.
        data_dir: folder with one folder for each catalog dataset.
        part: "train", "val" or "test".

    Raises:
        DatasetError: missing, incomplete or damaged; the message says what is looked for and how to get it.
    """
    name = name_of(entry)
    if not isinstance(entry, str):
        return open_own(**entry, part=part)
    protocol = protocols()[name]
    if part not in protocol.splits:
        raise DatasetError(f"{name}: the published protocol uses no {part} part (it has {', '.join(protocol.splits)})")
    root, source = Path(data_dir) / name, protocol.splits[part]
    status = status_of(name, data_dir, part)
    if status.state != "present":
        lacking = ", ".join(str(path) for path in status.missing)
        raise DatasetError(f"{name}: the {part} part is {status.state} ({lacking} not found). To get it: {status.how}")
    try:
        if status.layout == "webdataset":
            found = _webdataset_part(name, root, part)
        else:
            found = ENTRIES[name].read(root, base_name(source))
            if isinstance(found, Split):
                found = _sliced(found, source)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, DatasetError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"{name}: {root} cannot be read ({reason}). To get it again: {status.how}") from error
    provenance, size = status.provenance, ENTRIES[name].size
    if provenance == AS_PUBLISHED and part == "test" and size not in (0, len(found.samples)):
        provenance = f"differs, because {len(found.samples):,} of {size:,} test images are there"
    if isinstance(found, CaptionedImages):
        found.provenance = provenance
        return found
    classes = getattr(found.samples, "classes", protocol.class_names)
    if len(classes) != len(protocol.class_names):
        raise DatasetError(f"{name}: {root} has {len(classes)} classes, expected {len(protocol.class_names)}")
    return LabelledImages(name, found.samples, protocol.class_names, protocol.prompts, provenance)


def open_own(
    name: str,
    kind: str,
    root: str,
    class_names: list[str] | None = None,
    prompts: list[str] | None = None,
    part: str = "test",
) -> LabelledImages | CaptionedImages:
    """Open data that is not in the catalog.

    Args:
        kind: "folder" (``root/<class>/<image>``), "manifest" (a JSON, JSON lines or CSV file with images and captions
            or labels) or "tar" (RedCaps, img2dataset or webdataset TARs; `root` may be a glob or a folder of
            ``*.tar``).
        root: the folder or file; ``{part}`` in it stands for train, val or test. Without it there is a test part only.
        class_names: names for the prompts; for folders the default is the folder names. Needed for TARs with ``.cls``.
        prompts: templates with one ``{}`` each.

    Raises:
        DatasetError: nothing there, not in the layout of its kind, or a prompt without its ``{}``.
    """
    if "{part}" not in root and part != "test":
        raise DatasetError(f"{name}: needs a {part} part; write root with {{part}} in it, such as data/{{part}}")
    path = Path(root.replace("{part}", part)).expanduser()
    wanted = tuple(prompts or sources.DEFAULT_PROMPTS)
    without = [prompt for prompt in wanted if prompt.count("{}") != 1]
    if without:
        raise DatasetError(f"{name}: the prompt {without[0]!r} should have one {{}} for the class name")
    if kind == "folder":
        return sources.labelled_folder(name, path, class_names, wanted)
    if kind == "manifest":
        rows = sources.manifest_rows(name, path, ("image",))
        if "label" in rows[0]:
            return sources.labelled_manifest(name, path, class_names, wanted)
        return sources.captioned_manifest(name, path)
    if kind == "tar":
        paths = sorted(path.glob("*.tar")) if path.is_dir() else sorted(Path(found) for found in glob(str(path)))
        if not paths:
            raise DatasetError(f"{name}: no TAR matches {path}")
        if class_names:
            return sources.labelled_tars(name, paths, class_names, wanted)
        return sources.captioned_tars(name, paths)
    raise DatasetError(f"{name}: kind must be folder, manifest or tar, got {kind!r}")


def status_of(name: str, data_dir: str | Path, part: str | None = None) -> Status:
    """Look for a catalog dataset: the files that one part needs, or all parts that are evaluated."""
    entry, protocol, root = ENTRIES[name], protocols()[name], Path(data_dir) / name
    parts = [part] if part else list(protocol.splits) if "val" in protocol.splits else ["test"]  # no probe without val
    stored = {_stored_part(name, one) for one in parts}
    layout = "webdataset" if any((root / one / "nshards.txt").is_file() for one in ("train", "test")) else "original"
    if layout == "webdataset":
        needed = [root / one / "nshards.txt" for one in sorted(stored)]
        provenance = "differs, because a webdataset build has its own split"
        if name in ("flickr30k", "imagenet"):
            provenance = AS_PUBLISHED
    else:
        needed = list(
            dict.fromkeys(root / path for one in parts for path in entry.needs[base_name(protocol.splits[one])])
        )
        provenance = f"differs, because {entry.differs}" if entry.differs else AS_PUBLISHED
    missing = tuple(path for path in needed if not path.exists())
    state = "present" if not missing else "missing" if len(missing) == len(needed) else "incomplete"
    if part is not None and state == "missing" and root.is_dir() and any(root.iterdir()):
        state = "incomplete"
    return Status(
        name, entry.title, protocol.task, state, layout, root, missing, entry.licence, entry.homepage, provenance,
        how_to_get(name),
    )  # fmt: skip


def how_to_get(name: str) -> str:
    """One line on how to obtain a dataset."""
    entry = ENTRIES[name]
    automatic = f"meru-fast datasets --download {name}" if entry.get else ""
    return "; ".join(text for text in (automatic, entry.how) if text) + f" (see {entry.homepage})"


def list_datasets(data_dir: str | Path = "datasets/eval") -> list[Status]:
    """Status of all datasets of the catalog, in the order of the protocol."""
    return [status_of(name, data_dir) for name in ENTRIES]


def download_dataset(name: str, data_dir: str | Path = "datasets/eval") -> Status:
    """Fetch a dataset into ``<data_dir>/<name>``. Raises DatasetError if it cannot be had without a form or by hand."""
    from meru_fast.evaluation.download import download

    entry = ENTRIES[name_of(name)]
    if not entry.get:
        raise DatasetError(f"{name}: cannot be downloaded automatically. To get it: {how_to_get(name)}")
    download(entry.get, Path(data_dir).expanduser() / name)
    return status_of(name, data_dir)


def _stored_part(name: str, part: str) -> str:
    """Folder of a webdataset build that holds a part: there are "train" and "test" only."""
    return "test" if part == "test" else "train"


def _sliced(split: Split, source: str) -> Split:
    if "[" not in source:
        return split
    if split.keys is None:
        raise ValueError(f"{source}: this split has no keys to slice it by")
    order = tfds_order(base_name(source), split.keys)[slice_of(source, len(split.keys))]
    return Split(Subset(split.samples, order))


def _webdataset_part(name: str, root: Path, part: str) -> Split | CaptionedImages:
    found = readers.read_webdataset(name, root, _stored_part(name, part))
    if part == "test" or isinstance(found, CaptionedImages) or "val" not in protocols()[name].splits:
        return found
    kept = round((1 - HELD_OUT) * 100)
    return _sliced(found, f"train[:{kept}%]" if part == "train" else f"train[{kept}%:]")
