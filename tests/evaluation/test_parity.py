"""Scores and recalls equal a plain transcription of the published protocol (meru's evaluation of arXiv:2304.09172).

The transcription here follows the protocol step by step and one item at a time: images through Pillow, one class or one
image a forward pass, full score matrices, full sorting. It shares only the encoders with the package.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_models import IMAGE_SIZE, noise, tiny
from PIL import Image

from meru_fast import lorentz
from meru_fast.evaluation.retrieval import ZeroShotRetrieval
from meru_fast.evaluation.zeroshot import ZeroShotClassification
from meru_fast.tokenizer import Tokenizer

CLASSES = ("red cat", "dog", "a very small and rather striped zebra", "tree", "car", "house", "cat")
PROMPTS = ("a photo of a {}.", "art of the {} : one.", "{}")
SIZES = ((40, 28), (28, 40), (33, 33), (90, 20))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Pixels in [0, 1], [1, 3, H, W]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def cropped(image: Image.Image) -> torch.Tensor:
    """Shorter side to the input size, bicubic, then the centre."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(IMAGE_SIZE * width / short), int(IMAGE_SIZE * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - IMAGE_SIZE) / 2), round((image.height - IMAGE_SIZE) / 2)
    return to_tensor(image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))


def squeezed(image: Image.Image) -> torch.Tensor:
    return to_tensor(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def encode_text(model, texts, project):
    return model.encode_text(Tokenizer()(list(texts)), project=project)


def score(model, images, texts):
    """Higher is closer: Lorentz inner product, or dot product."""
    if model.geometry == "lorentz":
        return lorentz.pairwise_inner(images, texts, model.curv.exp())
    return images @ texts.T


def classifier(model):
    """One embedding a class: the mean of its prompts in the tangent space, then lifted; or on the sphere."""
    embeddings = []
    for name in CLASSES:
        features = encode_text(model, [prompt.format(name) for prompt in PROMPTS], project=False)
        if model.geometry == "lorentz":
            tangent = features.mean(dim=0) * model.textual_alpha.exp()
            embeddings.append(lorentz.exp_map0(tangent, model.curv.exp()))
        else:
            embeddings.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(embeddings)


def macro_accuracy(predicted, labels):
    """Mean over the classes of the share of their images that are right, in plain Python."""
    of_class = {}
    for guess, label in zip(predicted, labels, strict=True):
        of_class.setdefault(label, []).append(guess == label)
        of_class.setdefault(guess, [])
    return sum(sum(hits) / len(hits) if hits else 0.0 for hits in of_class.values()) / len(of_class)


@pytest.fixture(scope="module")
def images():
    return [noise(seed, SIZES[seed % len(SIZES)]) for seed in range(60)]


@pytest.fixture(params=["meru", "clip"])
def model(request):
    return tiny(request.param)


@torch.no_grad()
def test_zero_shot_classification(model, images, tmp_path):
    labels = [
        int(label) for label in np.random.RandomState(0).choice(len(CLASSES), 60, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0])
    ]
    folders = [f"{label}_class" for label in range(len(CLASSES))]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / folders[label]).mkdir(exist_ok=True)
        image.save(tmp_path / folders[label] / f"{number:03d}.png")
    (tmp_path / folders[6]).mkdir()  # a class without images

    text = classifier(model)
    scores = torch.cat([score(model, model.encode_image(cropped(image)), text) for image in images])
    order = scores.argsort(dim=1, descending=True)
    top1 = sum(int(order[i, 0]) == label for i, label in enumerate(labels)) / 60
    top5 = sum(label in order[i, :5].tolist() for i, label in enumerate(labels)) / 60

    entry = {"name": "own", "kind": "folder", "root": str(tmp_path)}
    entry |= {"class_names": list(CLASSES), "prompts": list(PROMPTS)}
    found = ZeroShotClassification([entry], batch_size=7, num_workers=2)(model)
    assert found["own/acc1"] == pytest.approx(top1, abs=1e-12)
    assert found["own/acc5"] == pytest.approx(top5, abs=1e-12)
    assert found["own/mean_per_class_recall"] == pytest.approx(macro_accuracy(order[:, 0].tolist(), labels), abs=1e-12)
    assert 0 < top1 < top5 < 1


@torch.no_grad()
@pytest.mark.parametrize("resize", ["squeeze", "crop"])
def test_retrieval(model, images, resize, tmp_path):
    words = ("red", "small", "cat", "dog", "tree", "on", "of", "blue", "left", "house")
    random = np.random.RandomState(1)
    captions_of = [[" ".join(random.choice(words, 5)) for _ in range(1 + number % 3)] for number in range(60)]
    rows = []
    for number, (image, captions) in enumerate(zip(images, captions_of, strict=True)):
        image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": captions})
    (tmp_path / "m.json").write_text(json.dumps(rows))

    prepare = {"squeeze": squeezed, "crop": cropped}[resize]
    image_feats = torch.cat([model.encode_image(prepare(image)) for image in images])
    captions = [caption for own in captions_of for caption in own]
    image_of = [number for number, own in enumerate(captions_of) for _ in own]
    text_feats = torch.cat([encode_text(model, own, project=True) for own in captions_of])
    scores = score(model, image_feats, text_feats)
    expected = {}
    for k in (1, 5, 10):
        for_text = [image_of[c] in scores[:, c].argsort(descending=True)[:k].tolist() for c in range(len(captions))]
        hits = [any(image_of[c] == i for c in scores[i].argsort(descending=True)[:k].tolist()) for i in range(60)]
        expected[f"own/image_retrieval_recall@{k}"] = sum(for_text) / len(for_text)
        expected[f"own/text_retrieval_recall@{k}"] = sum(hits) / len(hits)

    entry = {"name": "own", "kind": "manifest", "root": str(tmp_path / "m.json")}
    found = ZeroShotRetrieval([entry], resize=resize, batch_size=16)(model)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 < found["own/image_retrieval_recall@1"] < found["own/image_retrieval_recall@10"] < 1


@torch.no_grad()
def test_the_two_resizes_differ(model, images):
    """So that the parity of both is not the parity of one."""
    wide = images[3]
    assert not torch.allclose(model.encode_image(squeezed(wide)), model.encode_image(cropped(wide)), atol=1e-4)
