import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from meru_fast.data import keyed
from meru_fast.data.transforms import DRAWS, crop_window


def windows(width, height, count):
    draws = keyed.uniform(11, np.arange(count)[:, None], np.arange(DRAWS))
    return np.array([crop_window(width, height, draw) for draw in draws])


@pytest.mark.parametrize(("width", "height"), [(512, 384), (300, 500), (224, 224), (40, 31)])
def test_same_distribution_as_torchvision(width, height):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    reference = [RandomResizedCrop.get_params(image, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    reference = np.array([(left, top, w, h) for top, left, h, w in reference])
    ours = windows(width, height, 4000)
    assert (ours[:, 0] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    for column in range(4):  # two-sample Kolmogorov-Smirnov: the critical distance at p = 0.001 is 0.0436
        points = np.union1d(ours[:, column], reference[:, column])
        shares = [np.searchsorted(np.sort(x[:, column]), points, "right") / 4000 for x in (ours, reference)]
        assert abs(shares[0] - shares[1]).max() < 0.0436


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1000, 10), (10, 1000), (3, 1), (1, 50), (2, 2)])
def test_no_window_of_an_allowed_shape_falls_back_as_torchvision(width, height):
    impossible = (1.1, 1.2)  # an area beyond the image: every attempt fails
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), impossible, (3 / 4, 4 / 3))
    ours = crop_window(width, height, keyed.uniform(0, np.arange(DRAWS)), scale=impossible)
    assert ours == (left, top, max(w, 1), max(h, 1))
