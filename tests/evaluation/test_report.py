"""The page of one model and of two, parsed as a browser would."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from small_models import clip, meru

from meru_fast import checkpoint
from meru_fast.evaluation import figures, report
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.report import Gallery, Subject

SMALL = Path(__file__).parent / "small_meru.py"
VOID = {"meta", "img", "br", "link", "path", "rect", "use", "circle"}


class Page(HTMLParser):
    """Balanced tags, ids, addresses and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.words, self.images = [], [], [], [], 0
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.images += tag == "img"
        assert tag != "img" or values["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def gallery(demo_data):
    whole = Gallery.load(demo_data / "ladders.json")
    chosen = range(0, 797, 20)
    return Gallery([whole.images.paths[i] for i in chosen], [whole.ladders[i] for i in chosen])


def test_the_page_of_a_model_needs_nothing_but_itself(tmp_path, gallery):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,loss,contrastive_loss,note\n1,4.0,3.5,a\n2,3.0,2.5,b\n")
    (run / "config.yaml").write_text("model: {embed_dim: 32}\n")
    path = report.write(
        tmp_path / "report.html", [Subject("first", meru(), run=run)], gallery, title="A & B", facts=[("3", "sets", "")]
    )
    html = path.read_text()
    page = Page(html)
    text = " ".join(page.words)
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link", html)
    assert page.images > 40
    assert "A & B" in text
    for heading in ("Training", "Distance from the root", "The map", "Retrieval", "Traversals", "Interpolations"):
        assert heading in text
    for heading in ("Entailment", "Numbers", "Settings and versions", "embed_dim: 32"):
        assert heading in text
    assert html.count("<svg ") == 3


def test_two_models_stand_side_by_side(tmp_path, gallery):
    path = report.write(tmp_path / "report.html", [Subject("left", meru()), Subject("right", clip())], gallery)
    html = path.read_text()
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    headings = re.findall(r"<h3>(\w+)</h3>", html)
    # All sections but training (no runs here); entailment exists for the hyperbolic model only.
    assert (headings.count("left"), headings.count("right")) == (8, 7)
    assert "Poincaré disk" in html
    assert "Sphere, seen from its root" in html
    assert "(radians)" in html


def test_plain_captions_are_ladders_of_one_rung(tmp_path, demo_data):
    gallery = Gallery.load(demo_data / "scenes.json")
    small = Gallery(gallery.images.paths[:12], gallery.ladders[:12])
    html = report.write(tmp_path / "report.html", [Subject("one", meru())], small).read_text()
    Page(html)
    assert "own caption" in html
    assert "tree-induced" not in html


def test_captions_are_text_and_never_markup(tmp_path, demo_data):
    scenes = sorted((demo_data / "scenes").glob("*.png"))[:4]
    ladders = [["<b>bold</b>", f'<script>alert({number})</script> & "quoted"'] for number in range(4)]
    html = report.write(tmp_path / "report.html", [Subject("<i>", meru())], Gallery(scenes, ladders)).read_text()
    Page(html)
    assert "<script" not in html
    assert "<b>bold" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_numbers_are_those_of_the_embeddings(gallery, device):
    with torch.inference_mode():
        portrait = report.Portrait(Subject("", meru().to(device)), gallery, gallery.captions, 0)
        html = portrait.numbers().html
        assert "Poincaré" in portrait.disk().caption
        assert "images" in portrait.radius_histogram().caption
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', html))
    radius = portrait.captions.norm(dim=-1)  # grows with the distance
    steps = {step for rungs in gallery.rungs for step in pairwise(rungs)}
    right = sum(radius[upper].item() < radius[lower].item() for upper, lower in steps) / len(steps)
    assert rows["more general caption is nearer to the root"] == f"{right:.1%}"
    own = [rungs[-1] for rungs in gallery.rungs]
    nearer = (radius[own] < portrait.images.norm(dim=-1)).double().mean().item()
    assert rows["specific caption is nearer to the root than its image"] == f"{nearer:.1%}"


def test_samples_are_distinct_and_spread():
    gallery = Gallery([f"{number}.png" for number in range(100)], [["all", f"kind {n // 10}"] for n in range(100)])
    chosen = gallery.sample(10)
    assert len({index // 10 for index in chosen}) == 10
    assert gallery.sample(50) == sorted(gallery.sample(50))
    assert len(gallery.sample(50)) == 10


def test_galleries_that_cannot_be_read(tmp_path):
    path = tmp_path / "gallery.json"
    path.write_text(json.dumps([{"image": "a.png", "captions": ["x"]}, {"image": "b.png"}]))
    with pytest.raises(DatasetError, match="row 2 has neither caption nor captions"):
        Gallery.load(path)
    with pytest.raises(DatasetError, match="cannot read the manifest"):
        Gallery.load(tmp_path / "nowhere.csv")
    path.write_text(json.dumps([{"image": "a.png", "captions": "x"}]))
    with pytest.raises(DatasetError, match="two images or more, has 1"):
        Gallery.load(path)
    path.write_text(json.dumps([{"image": f"{i}.png", "captions": c} for i, c in enumerate((["x", "y"], ["y", "x"]))]))
    with pytest.raises(DatasetError, match="not all from general to specific: the tree has a cycle: 'x'"):
        Gallery.load(path)


@pytest.mark.parametrize("seed", range(4))
def test_spread_is_the_nearest_arrangement_with_the_gap(seed):
    wanted = np.sort(np.random.default_rng(seed).uniform(-1, 1, 25))
    placed = np.array(figures._spread(wanted.tolist(), gap=0.1))
    assert (np.diff(placed) >= 0.1 - 1e-9).all()
    shifts = np.arange(25) * 0.1
    best = IsotonicRegression().fit_transform(np.arange(25), wanted - shifts) + shifts
    np.testing.assert_allclose(placed, best, atol=1e-9)


def test_the_command_compares_checkpoints(tmp_path, demo_data, capsys):
    rows = json.loads((demo_data / "ladders.json").read_text())[::80]
    manifest = demo_data / "few.json"
    manifest.write_text(json.dumps(rows))
    for name, seed in (("a", 0), ("b", 1)):
        checkpoint.save_published(tmp_path / f"{name}.pth", meru(seed).state_dict())
    output = tmp_path / "pages" / "both.html"
    arguments = ["--train-config", str(SMALL), "--gallery", str(manifest), "--output", str(output)]
    report.main(
        [*arguments, "--checkpoint-path", str(tmp_path / "a.pth"), "--checkpoint-path", str(tmp_path / "b.pth")]
    )
    assert capsys.readouterr().out.strip() == str(output)
    assert {"a", "b"} == set(re.findall(r"<h3>(\w+)</h3>", output.read_text()))
    with pytest.raises(SystemExit, match=r"error: .*c\.pth: no such file"):
        report.main([*arguments, "--checkpoint-path", str(tmp_path / "c.pth")])
