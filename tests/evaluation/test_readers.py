"""Every dataset of the catalog is read from a miniature in its authors' layout, and from a webdataset build."""

import shutil
from dataclasses import replace

import eval_miniatures
import pytest
from eval_models import painted

from meru_fast.evaluation import catalog
from meru_fast.evaluation.protocol import DatasetError, protocols
from meru_fast.evaluation.sources import CaptionedImages, LabelledImages, Subset

NAMES = list(catalog.ENTRIES)


def check_labels(dataset: LabelledImages, step: int) -> set[int]:
    """Compare the painted with the reported labels of every `step`-th sample."""
    seen = set()
    for index in range(0, len(dataset.samples), step):
        image, label = dataset.samples[index]
        said = painted(image)
        assert label == (said // 111 if dataset.name == "mnist" else said), f"sample {index}"
        seen.add(label)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_original_layout(name, tmp_path, monkeypatch):
    sizes = eval_miniatures.BUILDERS[name](tmp_path / name, monkeypatch)
    assert set(sizes) == set(protocols()[name].splits)
    opened = {part: catalog.open_dataset(name, tmp_path, part) for part in sizes}
    for part, size in sizes.items():
        dataset = opened[part]
        assert len(dataset.samples) == size
        if isinstance(dataset, LabelledImages):
            assert check_labels(dataset, 1 + size // 300)
            assert dataset.class_names == protocols()[name].class_names
    assert catalog.status_of(name, tmp_path).state == "present"
    sliced = {part: dataset.samples for part, dataset in opened.items() if isinstance(dataset.samples, Subset)}
    taken = [index for part in ("train", "val") if part in sliced for index in sliced[part].indices]
    assert len(set(taken)) == len(taken), "training and validation part share samples"


@pytest.mark.parametrize("name", NAMES)
def test_webdataset_build(name, tmp_path):
    copies = 1 if name in ("imagenet", "sun397", "country211") else 5  # of each class; these have many
    eval_miniatures.webdataset(tmp_path / name, name, copies)
    test = catalog.open_dataset(name, tmp_path)
    if isinstance(test, CaptionedImages):
        assert len(test.captions) == 5 * len(test.samples)
        return
    every = set(range(len(test.class_names)))
    for index in range(len(test.samples)):
        image, label = test.samples[index]
        assert label == painted(image)
    assert {test.samples[index][1] for index in range(len(test.samples))} == every
    total = copies * len(every)
    train = catalog.open_dataset(name, tmp_path, "train").samples
    if "val" in protocols()[name].splits:
        val = catalog.open_dataset(name, tmp_path, "val").samples
        assert (len(train), len(val)) == (round(0.8 * total), total - round(0.8 * total))
        assert set(train.indices).isdisjoint(val.indices)
    else:
        assert len(train) == total
    published = name == "imagenet"  # the validation images are the test part in every build
    assert ("differs" in catalog.status_of(name, tmp_path).provenance) != published


@pytest.mark.parametrize("name", NAMES)
def test_missing_dataset_is_one_clear_error(name, tmp_path):
    with pytest.raises(DatasetError, match=rf"^{name}: the test part is missing .* To get it: ") as error:
        catalog.open_dataset(name, tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_folder_is_reported(name, tmp_path):
    (tmp_path / name / "something_else").mkdir(parents=True)
    with pytest.raises(DatasetError, match=rf"^{name}: the test part is incomplete"):
        catalog.open_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "food101", "cub2011", "sun397", "cars", "pets", "coco"])
def test_half_present_dataset_is_reported_on_opening(name, tmp_path, monkeypatch):
    """Some of the pictures are gone: readers that know what to expect say so before anything is encoded."""
    eval_miniatures.BUILDERS[name](tmp_path / name, monkeypatch)
    pictures = sorted(path for path in (tmp_path / name).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for path in pictures[::2]:
        path.unlink()
        if name == "imagenet" and not any(path.parent.iterdir()):
            path.parent.rmdir()
    with pytest.raises(DatasetError, match=rf"^{name}: .*(missing|class folders)"):
        catalog.open_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["resisc45", "mnist", "flickr30k"])
def test_another_number_of_images_than_published_is_said(name, tmp_path, monkeypatch):
    eval_miniatures.BUILDERS[name](tmp_path / name, monkeypatch)
    size = catalog.ENTRIES[name].size
    dataset = catalog.open_dataset(name, tmp_path)
    assert dataset.provenance == f"differs, because {len(dataset.samples)} of {size:,} test images are there"
    monkeypatch.setitem(catalog.ENTRIES, name, replace(catalog.ENTRIES[name], size=len(dataset.samples)))
    assert catalog.open_dataset(name, tmp_path).provenance == "as published"


@pytest.mark.parametrize("name", ["country211", "eurosat", "caltech101", "dtd"])
def test_missing_class_is_reported_on_opening(name, tmp_path, monkeypatch):
    eval_miniatures.BUILDERS[name](tmp_path / name, monkeypatch)
    if name == "dtd":  # classes come from the list
        file = tmp_path / name / "dtd/dtd/labels/test1.txt"
        file.write_text("\n".join(file.read_text().splitlines()[1:]))
    else:
        folders = {
            "country211": "country211/test/AA",
            "eurosat": "eurosat/2750/Forest",
            "caltech101": "caltech101/101_ObjectCategories/Faces",
        }
        shutil.rmtree(tmp_path / name / folders[name])
    with pytest.raises(DatasetError, match=rf"^{name}: .*expected"):
        catalog.open_dataset(name, tmp_path)


def test_damaged_files_are_named(tmp_path, monkeypatch):
    eval_miniatures.cub2011(tmp_path / "cub2011", monkeypatch)
    (tmp_path / "cub2011/CUB_200_2011/images.txt").write_text("1 a.jpg\n2\n")
    with pytest.raises(DatasetError, match=r"images\.txt, line 2: expected 2 columns, found 1"):
        catalog.open_dataset("cub2011", tmp_path)
    eval_miniatures.coco(tmp_path / "coco", monkeypatch)
    (tmp_path / "coco/annotations/captions_val2017.json").write_text("{")
    with pytest.raises(DatasetError, match=r"^coco: .* cannot be read"):
        catalog.open_dataset("coco", tmp_path)
    (tmp_path / "cifar10/cifar-10-batches-py").mkdir(parents=True)
    for file in ("test_batch", "batches.meta"):
        (tmp_path / "cifar10/cifar-10-batches-py" / file).write_bytes(b"half")
    with pytest.raises(DatasetError, match=r"^cifar10: .* cannot be read \(Dataset not found or corrupted"):
        catalog.open_dataset("cifar10", tmp_path)


def test_damaged_webdataset_builds_are_named(tmp_path):
    eval_miniatures.webdataset(tmp_path / "stl10", "stl10")
    (tmp_path / "stl10/test/1.tar").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 TARs are missing, the first is .*test/1\.tar"):
        catalog.open_dataset("stl10", tmp_path)
    eval_miniatures.webdataset(tmp_path / "mnist", "mnist")
    (tmp_path / "mnist/test/nshards.txt").write_text("two")
    with pytest.raises(DatasetError, match=r"nshards\.txt does not hold the number of TARs"):
        catalog.open_dataset("mnist", tmp_path)
    eval_miniatures.webdataset(tmp_path / "pcam", "pcam")
    (tmp_path / "pcam/classnames.txt").write_text("a\nb\nc")
    with pytest.raises(DatasetError, match="does not name 2 classes"):
        catalog.open_dataset("pcam", tmp_path)
