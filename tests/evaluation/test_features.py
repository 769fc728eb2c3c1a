"""Features: batches, the cache, the hash of the weights."""

import threading

import pytest
import torch
from eval_models import noise, paint, tiny

from meru_fast.evaluation.features import Labelled, Loading, batches, cached, fingerprint, image_features, text_features
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.transforms import EvalTransform


class Pictures:
    """Numbered pictures; remembers which threads asked, and fails at `broken`."""

    def __init__(self, count, broken=None):
        self.count, self.broken, self.threads = count, broken, set()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.threads.add(threading.get_ident())
        if index == self.broken:
            raise ValueError("a broken picture")
        return noise(index), index


TRANSFORM = EvalTransform(32)


@pytest.mark.parametrize("count", [1, 4, 5, 23])
def test_batches_are_in_order_and_complete(count):
    found = list(batches(Pictures(count), TRANSFORM, Loading(4, 3), "own"))
    assert [len(labels) for _, labels in found] == [4] * (count // 4) + ([count % 4] if count % 4 else [])
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(count))
    expected = torch.stack([TRANSFORM(noise(index)) for index in range(count)])
    assert torch.equal(torch.cat([images for images, _ in found]), expected)


def test_decoding_uses_threads_and_stops_with_its_consumer():
    pictures = Pictures(50)
    stream = batches(pictures, TRANSFORM, Loading(4, 3), "own")
    next(stream)
    stream.close()
    assert threading.get_ident() not in pictures.threads
    assert not [thread for thread in threading.enumerate() if thread.ident in pictures.threads]


def test_a_bad_sample_is_named():
    model = tiny("meru")
    with pytest.raises(DatasetError, match="own: sample 9 cannot be read: a broken picture"):
        image_features(model, Pictures(12, broken=9), TRANSFORM, Loading(4, 2), "own")
    with pytest.raises(DatasetError, match="own: no images"):
        image_features(model, Pictures(0), TRANSFORM, Loading(4, 2), "own")


@pytest.mark.parametrize("kind", ["meru", "clip"])
def test_features_do_not_depend_on_the_batch_size(kind):
    model = tiny(kind)
    one, many = (image_features(model, Pictures(9), TRANSFORM, Loading(size), "own").features for size in (1, 9))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
    texts = [f"caption {number} " * (number + 1) for number in range(9)]
    one, many = (text_features(model, texts, "own", batch_size=size) for size in (1, 9))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def test_fingerprint_follows_the_weights():
    model = tiny("meru")
    same, other = fingerprint(tiny("meru")), fingerprint(tiny("meru", seed=1))
    assert fingerprint(model) == same != other
    with torch.no_grad():
        model.curv += 1e-6
    assert fingerprint(model) != same


def test_cache_keeps_what_it_was_given(tmp_path):
    path = tmp_path / "sub" / "features.safetensors"
    computed = Labelled(torch.randn(5, 3), torch.arange(5))
    assert cached(None, lambda: computed) is computed
    assert cached(path, lambda: computed) is computed

    def refuse():
        raise AssertionError

    found = cached(path, refuse)
    assert torch.equal(found.features, computed.features)
    assert torch.equal(found.labels, computed.labels)
    assert [file.name for file in path.parent.iterdir()] == ["features.safetensors"]


@pytest.mark.parametrize(("size", "expected"), [((64, 32), (64, 32)), ((32, 64), (32, 64))])
def test_crop_keeps_the_aspect_ratio_and_squeeze_does_not(size, expected):
    """A picture, half red and half green: the crop shows its middle, the squeeze all of it."""
    picture = paint(900, size)
    wide = size[0] > size[1]
    half = paint(90, (size[0] // 4, size[1]) if wide else (size[0], size[1] // 4))
    picture.paste(half, (0, 0))
    squeezed, cropped = (EvalTransform(32, resize)(picture).float() for resize in ("squeeze", "crop"))
    share = [(pixels[1] > 128).float().mean().item() for pixels in (squeezed, cropped)]
    assert share[0] == pytest.approx(0.25, abs=0.02)
    assert share[1] == pytest.approx(0.0, abs=0.02)


def test_pictures_of_all_modes_are_taken():
    pictures = [noise(0).convert(mode) for mode in ("L", "P", "RGBA", "CMYK", "1", "LA", "I", "F")]
    for picture in pictures:
        assert EvalTransform(16)(picture).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="resize must be one of crop, squeeze, got 'pad'"):
        EvalTransform(16, "pad")
