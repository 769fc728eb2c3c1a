"""Own data: class folders, manifests and TARs, given as config entries."""

import csv
import io
import json
import tarfile

import pytest
from eval_models import paint, painted

from meru_fast.evaluation.catalog import name_of, open_dataset
from meru_fast.evaluation.protocol import DatasetError


def opened(tmp_path, part="test", **entry):
    return open_dataset({"name": "own", **entry}, tmp_path, part)


def write_images(folder, labels):
    folder.mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(labels):
        paint(label).save(folder / f"{number}.png")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if not isinstance(content, bytes):
                buffer = io.BytesIO()
                content.save(buffer, "JPEG", quality=95)
                content = buffer.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_folder(tmp_path):
    for label, name in enumerate(("large_cat", "old dog", "zebra")):
        write_images(tmp_path / "test" / name, [label] * 3)
    (tmp_path / "test" / ".hidden").mkdir()
    (tmp_path / "test" / "zebra" / "notes.txt").write_text("no image")
    dataset = opened(tmp_path, kind="folder", root=f"{tmp_path}/{{part}}", prompts=["see {}"])
    assert dataset.class_names == ["large cat", "old dog", "zebra"]
    assert dataset.prompts == ("see {}",)
    assert [painted(image) == label for image, label in dataset.samples] == [True] * 9
    named = opened(tmp_path, kind="folder", root=f"{tmp_path}/test", class_names=["a", "b", "c"])
    assert list(named.class_names) == ["a", "b", "c"]
    with pytest.raises(DatasetError, match="2 class names for the 3 class folders"):
        opened(tmp_path, kind="folder", root=f"{tmp_path}/test", class_names=["a", "b"])
    with pytest.raises(DatasetError, match=r"no folder .*/train"):
        opened(tmp_path, "train", kind="folder", root=f"{tmp_path}/{{part}}")
    with pytest.raises(DatasetError, match=r"write root with \{part\} in it"):
        opened(tmp_path, "train", kind="folder", root=f"{tmp_path}/test")
    with pytest.raises(DatasetError, match="has no class folders"):
        opened(tmp_path, kind="folder", root=f"{tmp_path}/test/zebra")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no images"):
        opened(tmp_path, kind="folder", root=f"{tmp_path}/empty")


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_manifest_with_captions(tmp_path, form):
    write_images(tmp_path / "images", [0, 1])
    rows = [("images/0.png", "first"), ("images/1.png", "second"), ("images/0.png", "third, with comma")]
    fields = [{"image": image, "caption": caption} for image, caption in rows]
    path = tmp_path / f"m.{form}"
    if form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "caption"])
            writer.writeheader()
            writer.writerows(fields)
    else:
        path.write_text(json.dumps(fields) if form == "json" else "\n".join(map(json.dumps, fields)))
    dataset = opened(tmp_path, kind="manifest", root=str(path))
    assert dataset.captions == ["first", "third, with comma", "second"]
    assert dataset.pairs == [(0, 0), (0, 1), (1, 2)]
    assert [painted(dataset.samples[index][0]) for index in (0, 1)] == [0, 1]


def test_manifest_with_several_captions_in_a_row(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"image": "a.png", "captions": ["x", "y"]}, {"image": "b.png", "captions": ["x"]}]))
    dataset = opened(tmp_path, kind="manifest", root=str(path))
    assert dataset.pairs == [(0, 0), (0, 1), (1, 2)]
    assert dataset.captions == ["x", "y", "x"]


def test_manifest_with_labels(tmp_path):
    write_images(tmp_path, [0, 1])
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"image": "0.png", "label": "cat"}, {"image": "1.png", "label": "dog"}]))
    dataset = opened(tmp_path, kind="manifest", root=str(path))
    assert (dataset.class_names, [label for _, label in dataset.samples]) == (["cat", "dog"], [0, 1])
    path.write_text(json.dumps([{"image": "0.png", "label": 1}, {"image": "1.png", "label": 0}]))
    dataset = opened(tmp_path, kind="manifest", root=str(path), class_names=["cat", "dog"])
    assert [label for _, label in dataset.samples] == [1, 0]
    with pytest.raises(DatasetError, match="has the label 1, which is none of the 1 classes"):
        opened(tmp_path, kind="manifest", root=str(path), class_names=["cat"])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[]", "should hold a list of rows"),
        ("{}", "should hold a list of rows"),
        ("[", "cannot read the manifest"),
        ('[{"caption": "x"}]', "row 1 has no image"),
        ('[{"image": "a.png"}]', "row 1 has neither a caption nor a list of captions"),
        ('[{"image": 5, "caption": "x"}]', "row 1 has the image 5, which is no path"),
        ('[{"image": "a.png", "captions": ["x", 3]}]', "row 1 has neither a caption nor a list of captions"),
        ('[{"image": "a.png", "label": 0}, {"image": "b.png"}]', "row 2 has no label"),
    ],
)
def test_bad_manifests_are_named(tmp_path, content, fault):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(DatasetError, match=fault) as error:
        opened(tmp_path, kind="manifest", root=str(tmp_path / "m.json"))
    assert "m.json" in str(error.value)


def test_redcaps_tars(tmp_path):
    for shard in range(2):
        members = {}
        for number in range(3):
            label = 3 * shard + number
            members[f"{label:05d}.jpg"] = paint(label)
            members[f"{label:05d}.json"] = json.dumps({"subreddit": "pics", "caption": f"caption {label}"}).encode()
        write_tar(tmp_path / f"pics_2020_{shard:08d}.tar", members)
    for root in (tmp_path, tmp_path / "*.tar"):
        dataset = opened(tmp_path, kind="tar", root=str(root))
        assert dataset.captions == [f"caption {label}" for label in range(6)]
        assert [painted(dataset.samples[index][0]) for index in range(6)] == list(range(6))


def test_tars_with_text_and_with_labels(tmp_path):
    write_tar(
        tmp_path / "t.tar", {"x/a.jpg": paint(0), "x/a.txt": b"one\ntwo", "y/a.jpg": paint(1), "y/a.txt": b"three"}
    )
    dataset = opened(tmp_path, kind="tar", root=str(tmp_path / "t.tar"))
    assert (dataset.captions, dataset.pairs) == (["one", "two", "three"], [(0, 0), (0, 1), (1, 2)])
    write_tar(tmp_path / "c.tar", {"0.jpg": paint(1), "0.cls": b"1", "1.JPG": paint(0), "1.cls": b"0\n", "2.cls": b"0"})
    labelled = opened(tmp_path, kind="tar", root=str(tmp_path / "c.tar"), class_names=["a", "b"])
    assert [(painted(image), label) for image, label in labelled.samples] == [(1, 1), (0, 0)]
    with pytest.raises(DatasetError, match="sample 0 has the label '1', none of 0 to 0"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "c.tar"), class_names=["a"])
    with pytest.raises(DatasetError, match=r"sample x/a has no \.cls member"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "t.tar"), class_names=["a"])
    with pytest.raises(DatasetError, match="sample 0 has no caption"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "c.tar"))


@pytest.mark.parametrize("label", [b"x", b"", b"-1", b"2", "\u00b2".encode(), b"9" * 5000])
def test_labels_that_are_none_are_named(tmp_path, label):
    write_tar(tmp_path / "c.tar", {"0.jpg": paint(1), "0.cls": label})
    with pytest.raises(DatasetError, match="sample 0 has the label"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "c.tar"), class_names=["a", "b"])


@pytest.mark.parametrize(
    ("member", "content", "fault"),
    [
        ("0.json", b"{", "has a caption that cannot be read"),
        ("0.json", b"\xff", "has a caption that cannot be read"),
        ("0.json", b"[" * 100_000, "has a caption that cannot be read"),
        ("0.txt", b"\xff\xfe", "has a caption that cannot be read"),
        ("0.json", b"[1]", "has no caption"),
        ("0.json", b'{"captions": ["a", 5]}', "has no caption"),
        ("0.json", b'{"caption": 5}', "has no caption"),
    ],
)
def test_captions_that_are_none_are_named(tmp_path, member, content, fault):
    write_tar(tmp_path / "c.tar", {"0.jpg": paint(1), member: content})
    with pytest.raises(DatasetError, match=f"sample 0 {fault}"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "c.tar"))


def test_damaged_tars_are_named(tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DatasetError, match=r"broken\.tar: not a readable TAR"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "broken.tar"))
    with pytest.raises(DatasetError, match="no TAR matches"):
        opened(tmp_path, kind="tar", root=str(tmp_path / "nothing*.tar"))
    write_tar(tmp_path / "junk.tar", {"a.jpg": b"no jpeg", "a.txt": b"caption"})
    dataset = opened(tmp_path, kind="tar", root=str(tmp_path / "junk.tar"))
    with pytest.raises(DatasetError, match=r"junk\.tar: member a\.jpg: not a readable image"):
        dataset.samples[0]
    write_tar(tmp_path / "cut.tar", {"a.txt": b"caption", "a.jpg": paint(0, (400, 300))})
    dataset = opened(tmp_path, kind="tar", root=str(tmp_path / "cut.tar"))
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:2200])
    with pytest.raises(DatasetError, match=r"member a\.jpg is cut off"):
        dataset.samples[0]


def test_bad_entries_are_refused():
    with pytest.raises(DatasetError, match="unknown dataset 'cifar'; the catalog has imagenet, food101"):
        name_of("cifar")
    with pytest.raises(DatasetError, match="has no kind, root"):
        name_of({"name": "x"})
    with pytest.raises(DatasetError, match="has the unknown key colour"):
        name_of({"name": "x", "kind": "folder", "root": ".", "colour": 1})
    with pytest.raises(DatasetError, match="kind must be folder, manifest or tar, got 'zip'"):
        open_dataset({"name": "x", "kind": "zip", "root": "."}, ".")
