"""Radii, cones and the map, on points whose place is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import clip, meru

from meru_fast import lorentz
from meru_fast.evaluation import cones


def points(count: int, dim: int = 32, seed: int = 0, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def along(axis: int, radius: float, dim: int = 32) -> torch.Tensor:
    return radius * torch.eye(dim)[axis]


def test_radius_is_the_distance_to_the_root():
    model, x = meru(curv_init=0.5), points(20)
    root = cones.root_of(model, x)
    assert torch.equal(root, torch.zeros(32))
    expected = lorentz.pairwise_dist(x.double(), root[None].double(), 0.5)[:, 0]
    torch.testing.assert_close(cones.radii(model, x, root).double(), expected, rtol=1e-5, atol=0)


def test_on_the_sphere_radius_is_the_angle_and_the_root_the_mean_direction():
    model, x, y = clip(), F.normalize(points(20), dim=-1), F.normalize(points(30, seed=1), dim=-1)
    root = cones.root_of(model, x, y)
    torch.testing.assert_close(root, F.normalize(x.mean(0) + y.mean(0), dim=-1))
    torch.testing.assert_close(cones.radii(model, x, root).cos(), x @ root)
    given = cones.root_of(model, x, root=3 * along(4, 1.0))
    torch.testing.assert_close(given, along(4, 1.0))
    quarter = cones.directions(model, along(5, 1.0)[None], given)
    torch.testing.assert_close(quarter[0], along(5, math.pi / 2))


def test_cones_hold_what_lies_behind_them():
    model = meru(min_radius=0.1)
    text = torch.stack([along(0, 0.5), along(1, 0.5), along(2, 0.1)])
    image = torch.stack([along(0, 1.0), -along(1, 1.0), along(3, 1.0)])
    found = cones.cone_statistics(model, text, image)
    # The first is straight behind its text, the second opposite. The third text is so near the root that its cone is
    # the half space behind it, and its image, at a right angle, is in front of that.
    assert found["inside"] == pytest.approx(1 / 3)
    assert found["full_cones"] == pytest.approx(1 / 3)
    apertures = 2 * math.degrees(math.asin(2 * 0.1 / 0.5)) + 90
    assert found["aperture"] == pytest.approx(apertures / 3, abs=1e-3)
    angle = math.degrees(lorentz.oxy_angle(text[2].double(), image[2].double()).item())
    assert found["exterior_angle"] == pytest.approx((0 + 180 + angle) / 3, abs=1e-3)


def test_mismatched_pairs_are_other_pairs():
    model = meru()
    text, image = torch.stack([along(0, 0.5), along(1, 0.5)]), torch.stack([along(0, 1.0), along(1, 1.0)])
    found = cones.cone_statistics(model, text, image)
    assert (found["inside"], found["inside_mismatched"]) == (1, 0)


def test_cones_need_a_hyperbolic_model_and_pairs():
    with pytest.raises(ValueError, match="not in CLIP"):
        cones.cone_statistics(clip(), points(4), points(4))
    with pytest.raises(ValueError, match="paired"):
        cones.cone_statistics(meru(), points(4), points(5))


def test_ranking_by_the_exterior_angle_is_blind_to_distance():
    model = meru()
    text = along(0, 0.5)[None]
    near, far, behind = along(0, 0.6) + along(1, 0.3), along(0, 6.0), -along(0, 0.6)
    images = torch.stack([near, far, behind, along(0, 0.9) + along(1, 0.05)])
    angles, order = cones.nearest_by_angle(model, text, images, k=3)
    assert order.tolist() == [[1, 3, 0]]  # by distance, 1 would come after 3 and 0
    assert angles[0, 0].item() == pytest.approx(0, abs=1e-5)
    texts, gallery = points(7), points(40, seed=3)
    angles, order = cones.nearest_by_angle(model, texts, gallery, k=5)
    brute = lorentz.pairwise_oxy_angle(texts.double(), gallery.double(), 1.0).sort(dim=1)
    assert torch.equal(order, brute.indices[:, :5])
    torch.testing.assert_close(angles.double(), brute.values[:, :5], atol=1e-5, rtol=0)


def test_the_map_keeps_distances_from_the_root():
    model = meru(curv_init=0.7)
    x, y = points(30), points(20, seed=1, scale=1.0)
    root = cones.root_of(model, x)
    for part, placed in zip((x, y), cones.disk_positions(model, root, x, y), strict=True):
        # distance from the centre of the Poincare disk of curvature -c: 2 artanh(r) / sqrt(c)
        distance = 2 * torch.atanh(placed.norm(dim=-1)) / math.sqrt(0.7)
        torch.testing.assert_close(distance, cones.radii(model, part, root).double(), rtol=1e-5, atol=1e-6)
    sphere = clip()
    x = F.normalize(x, dim=-1)
    (placed,) = cones.disk_positions(sphere, cones.root_of(sphere, x), x)
    assert placed.norm(dim=-1).max() < 1
