import io
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from shard_factory import encoded, photo, photos
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop, to_tensor

from meru_fast.data import decode, keyed
from meru_fast.data.dali import DaliDecoder
from meru_fast.data.dataset import _is_plain_jpeg
from meru_fast.data.errors import BadSampleError
from meru_fast.data.transforms import DRAWS, Window, crop_window


def ours(data, window=None, size=224):
    image = decode.open_image(data)
    return decode.crop_and_resize(image, window or Window(0, 0, *image.size), size)


def published(data, window, size=224):
    """As MERU's loader does it: Pillow, then torchvision's crop and bicubic resize. In levels of 255."""
    left, top, width, height = window
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return to_tensor(resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)) * 255


def cases():
    """Photographs of many sizes with crops as in training, from shrinking by 8 to enlarging by 4."""
    for number in range(24):
        data = encoded(photo(number, (60, 180, 512, 1500)[number % 4]))
        draws = keyed.uniform(5, number, np.arange(DRAWS))
        yield data, crop_window(*decode.open_image(data).size, draws)


def test_same_pixels_as_the_published_pipeline():
    for data, window in cases():
        difference = (ours(data, window) - published(data, window)).abs()
        assert difference.max() < 2.01  # levels of 255
        assert difference.mean() < 0.02


def test_crop_of_the_output_size_is_copied_bit_for_bit():
    data = encoded(photo(1, 300))
    window = Window(7, 9, 64, 64)
    assert (ours(data, window, 64) == published(data, window, 64).round()).all()


def dali(files, windows, size=224):
    decoder = DaliDecoder(len(files), size, torch.device("cpu"), threads=2)
    decoder.start([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files], windows)
    return decoder.finish()


def test_dali_cuts_the_same_pixels():
    files, windows = zip(*cases(), strict=True)
    by_dali = dali(files, windows)
    for image, data, window in zip(by_dali, files, windows, strict=True):
        difference = (image.float() - ours(data, window)).abs()
        assert difference.mean() < 0.5  # of 255; the contract is 1
        assert difference.max() < 16


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 100}, {"optimize": True}])
def test_dali_and_kinds_of_jpeg(options):
    files = [encoded(photo(2, 400), **options), encoded(photo(2, 400).convert("L"), **options)]
    windows = [Window(10, 20, 300, 200)] * 2
    for image, data, window in zip(dali(files, windows), files, windows, strict=True):
        assert (image.float() - ours(data, window)).abs().mean() < 0.5


def test_dali_decodes_to_the_same_pixels():
    """Where nothing is resized, both are libjpeg-turbo with interpolated chroma."""
    kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}]
    files = [encoded(photo(number, 301), **options) for number, options in enumerate(kinds)]
    windows = [Window(3, 7, 64, 64)] * len(files)
    for image, data, window in zip(dali(files, windows, 64), files, windows, strict=True):
        assert torch.equal(image, ours(data, window, 64))


def stored_as_rgb():
    """JPEGs whose colours are not YCbCr, as Adobe's marker says, or the names R, G, B of the components alone."""
    data = encoded(photo(2, 200), keep_rgb=True, quality=90)
    marker = data.index(b"\xff\xee")
    size = 2 + int.from_bytes(data[marker + 2 : marker + 4], "big")
    return {"marker": data, "names": data[:marker] + data[marker + size :]}


@pytest.mark.parametrize("kind", stored_as_rgb())
def test_rgb_jpegs_are_decoded_by_pillow(kind):
    data = stored_as_rgb()[kind]
    image = decode.open_image(data)
    assert image.mode == "RGB"
    assert (ours(data, size=200).float() - ours(encoded(photo(2, 200)), size=200)).abs().mean() < 8  # what JPEG costs
    assert not _is_plain_jpeg(image, data)
    window = Window(5, 9, 100, 90)
    assert (dali([data], [window])[0].float() - ours(data, window)).abs().mean() < 0.5  # though on a CPU DALI would do


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_usual_jpegs_are_left_to_dali(mode):
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        data = encoded(photo(2, 64).convert(mode), **options)
        assert _is_plain_jpeg(decode.open_image(data), data)
        assert not _is_plain_jpeg(decode.open_image(data), data[:-1])


def test_inverted_cmyk_is_left_to_pillow():
    """Photoshop stores YCCK and CMYK inverted and says so in Adobe's marker."""
    data = encoded(photo(1, 120).convert("CMYK"))
    for transform in (0, 2):  # CMYK, and YCCK
        at = data.index(b"Adobe") + 11
        changed = data[:at] + bytes([transform]) + data[at + 1 :]
        image = decode.open_image(changed)
        assert (image.mode, image.info["adobe_transform"]) == ("CMYK", transform)
        assert not _is_plain_jpeg(image, changed)
        assert ours(changed, size=48).shape == (3, 48, 48)


def test_several_pictures_in_a_file_are_left_to_pillow():
    data = encoded(photo(1, 120), "MPO", save_all=True, append_images=[photo(2, 120)])
    assert not _is_plain_jpeg(decode.open_image(data), data)
    window = Window(0, 0, 48, 48)
    assert (ours(data, window, 48) == ours(encoded(photo(1, 120)), window, 48)).all()  # the first


def test_dali_ignores_exif_rotation_as_pillow_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encoded(photo(0, 200), exif=exif)
    window = Window(0, 0, *decode.open_image(data).size)
    assert decode.open_image(data).size == photo(0, 200).size
    assert (dali([data], [window])[0].float() - ours(data, window)).abs().mean() < 0.5


def test_dali_goes_on_after_a_failure():
    good = encoded(photo(0, 100))
    bad = good[: good.index(b"\xff\xda")] + b"\xff\xd9"  # headers and an end, no picture
    window = Window(0, 0, 50, 50)
    decoder = DaliDecoder(2, 32, torch.device("cpu"), threads=1)
    files = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in (good, bad)]
    for _ in range(2):
        decoder.start(files, [window] * 2)
        with pytest.raises(BadSampleError, match="DALI"):
            decoder.finish()
        decoder.start(files[:1], [window])
        assert (decoder.finish()[0].float() - ours(good, window, 32)).abs().mean() < 0.5


@cache
def odd_files():
    image = photo(1, 120)
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 3
    transparent = image.convert("RGBA")
    transparent.putalpha(image.convert("L"))
    return {
        "cmyk": encoded(image.convert("CMYK")),
        "grey": encoded(image.convert("L")),
        "grey-png": encoded(image.convert("L"), "PNG"),
        "grey16": encoded(grey16, "PNG"),
        "alpha": encoded(transparent, "PNG"),
        "grey-alpha": encoded(transparent.convert("LA"), "PNG"),
        "palette": encoded(image.convert("P"), "PNG", transparency=3),
        "bilevel": encoded(image.convert("1"), "PNG"),
        "gif": encoded(image, "GIF"),
        "webp": encoded(image, "WEBP"),
        "exif": encoded(image, exif=exif),
        "pixel": encoded(image.resize((1, 1))),
        "pixel-png": encoded(image.resize((1, 1)), "PNG"),
        "line": encoded(image.resize((500, 1)), "PNG"),
        "50-megapixel": encoded(photos()[0].resize((8192, 6144), Image.Resampling.NEAREST), quality=50),
    }


@pytest.mark.parametrize("kind", odd_files())
def test_odd_images_are_what_pillow_makes_of_them(kind):
    data = odd_files()[kind]
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    pixels = ours(data, size=48)
    assert pixels.shape == (3, 48, 48)
    assert pixels.dtype == torch.uint8
    width, height = decode.open_image(data).size
    side = min(48, width, height)
    corner = ours(data, Window(0, 0, side, side), side)
    assert (corner == expected[:, :side, :side]).all()
    if kind == "grey16":
        assert (expected == 255).float().mean() > 0.9  # Pillow clips 16 bits, and so do the published loaders


def bomb():
    """A PNG whose header claims 20,000 x 20,000 pixels."""
    data = bytearray(encoded(photo(0, 32), "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (encoded(photo(0, 100))[:200], "not an image|cannot be decoded"),
        (encoded(photo(0, 100))[:-500], "cannot be decoded: image file is truncated"),
        (encoded(photo(0, 100), "PNG")[:-5000], "cannot be decoded"),
        (bomb(), "not an image|400000000 pixels"),
    ],
)
def test_broken_images_say_why(data, reason):
    with pytest.raises(BadSampleError, match=reason):
        ours(data)


def test_odd_exif_is_no_fault():
    exif = Image.Exif()
    exif[0x9286] = b"\xff" * 50  # a comment in no known encoding
    assert ours(encoded(photo(0, 64), exif=exif), size=32).shape == (3, 32, 32)
