"""Traversals against a plain transcription of the published protocol, and the command."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import clip, meru

from meru_fast import checkpoint, config, lorentz
from meru_fast.evaluation import cones, features, traversal
from meru_fast.evaluation.traversal import ROOT, Stop, load_pool, points_between, traverse

K = 0.1
SMALL = Path(__file__).parent / "small_meru.py"


def published_traversal(image, texts, curv, steps=50):
    """Texts met on the way from the image to the root, in float64 and by the acos form (MERU, section 5)."""
    image, texts = image.double(), texts.double()

    def time(x):
        return (1 / curv + x.square().sum(-1)).sqrt()

    norm = image.norm()
    tangent = torch.asinh(curv**0.5 * norm) / (curv**0.5 * norm) * image
    met = []
    for weight in torch.linspace(0, 1, steps, dtype=torch.float64).flip(0):
        step = weight * tangent
        radius = curv**0.5 * step.norm()
        point = step if radius == 0 else torch.sinh(radius) / radius * step
        best, best_score = None, -float("inf")
        for index, text in enumerate(texts):
            inner = text @ point - time(text) * time(point)
            product = curv * inner
            spread = (product**2 - 1).clamp(min=1e-12).sqrt()
            angle = torch.acos(((time(point) + product * time(text)) / (text.norm() * spread)).clamp(-1, 1))
            aperture = torch.asin((2 * K / (text.norm() * curv**0.5)).clamp(max=1))
            score = inner if angle <= aperture else torch.tensor(-1e12)
            if score > best_score:
                best, best_score = index, score
        if -time(point) / curv**0.5 > best_score:  # the root, whose cone holds everything
            best = ROOT
        if best not in met:
            met.append(best)
    return met


@pytest.mark.parametrize("curv", [0.3, 1.0])
def test_agrees_with_the_published_protocol(curv, device):
    model = meru(curv_init=curv).to(device)
    generator = torch.Generator().manual_seed(1)
    names, longest = [f"text {number}" for number in range(40)], 0
    for _ in range(6):
        image = F.normalize(torch.randn(32, generator=generator), dim=-1) * 1.5
        # Captions around the way to the root, near enough to it that some of their cones hold parts of it.
        radii = torch.linspace(0.15, 1.2, 40)[:, None]
        texts = radii * F.normalize(image + 0.1 * torch.randn(40, 32, generator=generator), dim=-1)
        root = torch.zeros(32, device=device)
        found = traverse(model, image.to(device), root, texts.to(device), names, root)
        expected = [ROOT if index is ROOT else names[index] for index in published_traversal(image, texts, curv)]
        assert [stop.text for stop in found] == expected
        assert expected[-1] == ROOT
        longest = max(longest, len(expected))
    assert longest > 3  # the walks pass texts, not the root alone


def test_clip_takes_the_nearest_text_on_the_sphere():
    model = clip()
    texts = torch.eye(32)[:3]
    root, image = torch.eye(32)[2], F.normalize(torch.eye(32)[0] + 0.1 * torch.eye(32)[1], dim=-1)
    found = traverse(model, image, root, texts[:2], ["first", "second"], root, steps=101)
    assert [stop.text for stop in found] == ["first", ROOT]
    # lerp((1, .1, 0)/|.|, (0, 0, 1), w): the root is nearer from w = 1 / (1 + |(1, .1)|) on
    assert found[1].progress == pytest.approx(1 / (1 + 1.01**0.5), abs=0.011)


def test_points_lie_on_the_geodesic_at_equal_steps():
    model, end = meru(curv_init=0.6), torch.zeros(32)
    start = 0.8 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    placed = points_between(model, start, end, 11)
    torch.testing.assert_close(placed[0], start)
    torch.testing.assert_close(placed[-1], end)
    distance = cones.radii(model, placed, end)
    torch.testing.assert_close(distance, distance[0] * torch.linspace(1, 0, 11), rtol=1e-5, atol=1e-6)
    sphere = points_between(clip(), F.normalize(start, dim=-1), torch.eye(32)[3], 11)
    torch.testing.assert_close(sphere.norm(dim=-1), torch.ones(11))


def test_a_text_that_does_not_entail_the_point_is_out_however_near():
    model, image = meru(), torch.eye(32)[0] * 1.0
    beside = torch.eye(32)[0] * 0.99 + torch.eye(32)[1] * 0.1  # nearest of all, but the image is not in its cone
    behind = torch.eye(32)[0] * 0.3
    assert lorentz.oxy_angle(beside, image) > lorentz.half_aperture(beside)
    found = traverse(
        model, image, torch.zeros(32), torch.stack([beside, behind]), ["beside", "behind"], torch.zeros(32)
    )
    assert [stop.text for stop in found] == ["behind", ROOT]
    assert found[0] == Stop("behind", 0.0)


def test_wrong_arguments():
    model, zero = meru(), torch.zeros(32)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        traverse(model, zero + 1, zero, torch.eye(32)[:1], ["a"], zero, steps=1)
    with pytest.raises(ValueError, match="2 texts but 1"):
        traverse(model, zero + 1, zero, torch.eye(32)[:1], ["a", "b"], zero)


def test_pools(tmp_path):
    shipped = load_pool()
    assert len(shipped) > 500
    assert len(set(shipped)) == len(shipped)
    assert "a photo of a dog." in shipped
    assert not any("{}" in text for text in shipped)
    (tmp_path / "pool.txt").write_text("a dog\n\n a cat \na dog\n")
    assert load_pool(tmp_path / "pool.txt") == ["a dog", "a cat"]
    (tmp_path / "pool.json").write_text(json.dumps({"a {}!": ["dog"], "{}": ["night, in {braces}"]}))
    assert load_pool(tmp_path / "pool.json") == ["a dog!", "night, in {braces}"]
    (tmp_path / "list.json").write_text('["x"]')
    assert load_pool(tmp_path / "list.json") == ["x"]
    for content, fault in (("[1]", "expected a list of texts"), ("{", "cannot read"), ("[]", "no texts")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"bad.json: {fault}"):
            load_pool(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"nowhere.txt: cannot read"):
        load_pool(tmp_path / "nowhere.txt")


def test_the_command_walks_and_interpolates(tmp_path, demo_data, capsys):
    weights = tmp_path / "small.pth"
    checkpoint.save_published(weights, meru().state_dict(), iteration=3)
    node = config.load(SMALL).model
    loaded, _ = checkpoint.load_model(weights, node)
    assert features.input_size(loaded) == 32
    pictures = [str(path) for path in sorted((demo_data / "scenes").glob("*.png"))[:3]]
    common = ["--checkpoint-path", str(weights), "--train-config", str(SMALL)]
    for picture in pictures:
        common += ["--image-path", picture]
    traversal.main(common)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "->" in line] == [f"{picture} -> {ROOT}" for picture in pictures]
    assert sum(ROOT in line and "%" in line for line in lines) == 3  # every walk ends there
    traversal.main([*common, "--interpolate", "--json", "--steps", "5"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["from"], row["to"]) for row in rows] == [(pictures[0], pictures[1]), (pictures[1], pictures[2])]
    assert all(row["stops"][0]["progress"] == 0 for row in rows)


def test_the_command_refuses_in_one_line(tmp_path, demo_data, capsys):
    picture = str(next((demo_data / "scenes").glob("*.png")))
    with pytest.raises(SystemExit, match=r"error: .*nothing.pth: no such file"):
        traversal.main(["--image-path", picture, "--checkpoint-path", str(tmp_path / "nothing.pth")])
    with pytest.raises(SystemExit) as stop:
        traversal.main(["--image-path", picture, "--checkpoint-path", "x", "--interpolate"])
    assert stop.value.code == 2
    assert "--interpolate needs two" in capsys.readouterr().err
    checkpoint.save_published(tmp_path / "small.pth", meru().state_dict())
    common = ["--checkpoint-path", str(tmp_path / "small.pth"), "--train-config", str(SMALL)]
    with pytest.raises(SystemExit, match=r"error: .*missing.jpg"):
        traversal.main([*common, "--image-path", str(tmp_path / "missing.jpg")])
