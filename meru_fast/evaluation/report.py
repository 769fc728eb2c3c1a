"""One self-contained HTML page of what a model, or two side by side, made of a set of images and captions."""

import argparse
import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from meru_fast.evaluation import checkpoints, cones
from meru_fast.evaluation.features import Loading, image_features, input_size, text_features
from meru_fast.evaluation.hierarchy import Hierarchy, hierarchical_metrics
from meru_fast.evaluation.protocol import DatasetError
from meru_fast.evaluation.ranking import nearest
from meru_fast.evaluation.sources import ImageFiles, manifest_rows
from meru_fast.evaluation.transforms import EvalTransform
from meru_fast.evaluation.traversal import ROOT, Stop, load_pool, traverse
from meru_fast.versions import installed

if TYPE_CHECKING:
    from meru_fast.models import CLIP

PACKAGES = ("meru_fast", "torch", "triton", "deepspeed", "timm", "numpy")
GOLDEN = (5**0.5 - 1) / 2
LABEL = 28  # longest text in the map, in characters
THUMBNAIL = 160  # longer side in pixels of a picture in the page


@dataclass(frozen=True)
class Subject:
    """A model to report on.

    Attributes:
        root: of a CLIP checkpoint that brings one.
        run: the run folder, for loss curves and settings, if there is one.
    """

    title: str
    model: "CLIP"
    root: Tensor | None = None
    run: Path | None = None


class Gallery:
    """Images, each with a ladder of captions from general to specific (one caption is a ladder too).

    Attributes:
        captions: all distinct captions.
        rungs: for each image the positions of its captions.
        tree: the hierarchy that the ladders form.

    Raises:
        DatasetError: fewer than two images, or a caption that is both above and below another.
    """

    def __init__(self, images: Sequence[Path], ladders: Sequence[Sequence[str]]):
        self.images = ImageFiles(images)
        self.ladders = ladders
        self.captions = list(dict.fromkeys(caption for ladder in ladders for caption in ladder))
        position = {caption: number for number, caption in enumerate(self.captions)}
        self.rungs = [[position[caption] for caption in ladder] for ladder in ladders]
        parents: dict[str, list[str]] = {}
        for upper, lower in dict.fromkeys(step for ladder in ladders for step in pairwise(ladder)):
            parents.setdefault(lower, []).append(upper)
        try:
            self.tree = Hierarchy(parents)
        except ValueError as error:
            raise DatasetError(f"gallery: the captions are not all from general to specific: {error}") from error
        if len(images) < 2:
            raise DatasetError(f"gallery: needs two images or more, has {len(images)}")

    @classmethod
    def load(cls, path: str | Path) -> "Gallery":
        """Read a manifest (JSON, JSON lines, CSV): ``image``, and ``captions`` (general to specific) or ``caption``.

        Raises DatasetError.
        """
        path = Path(path)
        rows = manifest_rows("gallery", path, ("image",))
        ladders = []
        for number, row in enumerate(rows, start=1):
            captions = row.get("captions") or row.get("caption")
            if not captions:
                raise DatasetError(f"gallery: {path}, row {number} has neither caption nor captions")
            ladders.append([captions] if isinstance(captions, str) else list(captions))
        return cls([path.parent / row["image"] for row in rows], ladders)

    def picture(self, index: int) -> Image.Image:
        return self.images[index][0].convert("RGB")

    def sample(self, count: int) -> list[int]:
        """Positions of `count` images (or all), spread evenly, no two with the same most specific caption."""
        chosen: dict[int, int] = {}
        for step in range(len(self.rungs)):  # multiples of the golden ratio fall evenly however many are taken
            index = int(step * GOLDEN % 1 * len(self.rungs))
            if len(chosen) < count:
                chosen.setdefault(self.rungs[index][-1], index)
        return sorted(chosen.values())


@dataclass
class Panel:
    """A figure of one model (its `name`): HTML, and what it shows in words."""

    html: str
    caption: str
    name: str = ""


@dataclass
class Section:
    """A heading, a paragraph, and a panel for each model."""

    title: str
    lead: str
    panels: list[Panel]


class Portrait:
    """The embeddings of one model on a gallery, and the figures made of them."""

    def __init__(self, subject: Subject, gallery: Gallery, pool: Sequence[str], number: int):
        self.subject, self.gallery, self.model = subject, gallery, subject.model
        self.salt = f"model{number}"
        transform = EvalTransform(input_size(self.model))
        self.images = image_features(self.model, gallery.images, transform, Loading(), "images").features
        self.captions = text_features(self.model, gallery.captions, "captions")
        self.pool = list(pool)
        self.pool_features = text_features(self.model, self.pool, "texts")
        self.root = cones.root_of(self.model, self.images, self.captions, root=subject.root)

    @property
    def hyperbolic(self) -> bool:
        return self.model.geometry == "lorentz"

    def caption_groups(self) -> dict[str, list[int]]:
        """Positions of the captions by their place in their ladder."""
        last = {rungs[-1] for rungs in self.gallery.rungs}
        if all(len(rungs) == 1 for rungs in self.gallery.rungs):
            return {"captions": sorted(last)}
        first = {rungs[0] for rungs in self.gallery.rungs} - last
        between = set(range(len(self.gallery.captions))) - first - last
        groups = {"general captions": first, "captions in between": between, "specific captions": last}
        return {name: sorted(group) for name, group in groups.items() if group}

    def radii(self, features: Tensor) -> Tensor:
        return cones.radii(self.model, features, self.root)

    def training(self) -> Panel | None:
        from meru_fast.evaluation import figures

        log = figures.read_log(self.subject.run) if self.subject.run else {}
        if not log:
            return None
        minutes = figures.training_minutes(log)
        duration = f" in {minutes:.1f} minutes" if minutes else ""
        text = f"{int(log['step'][-1]):,} steps{duration}. The loss at the logged steps (pale) and its running mean"
        curves = figures.loss_curves(log, salt=self.salt + "loss")
        if {"curv", "image_radius", "text_radius"} <= set(log):
            text += "; the learned curvature, and how far images and captions of a batch lie from the root"
            curves += figures.geometry_curves(log, salt=self.salt + "geometry")
        return Panel(f'<div class="pair">{curves}</div>', text + ".")

    def radius_histogram(self) -> Panel:
        from meru_fast.evaluation import figures

        distance = self.radii(self.captions).cpu()
        groups = {name: distance[group].numpy() for name, group in self.caption_groups().items()}
        images = self.radii(self.images).cpu().numpy()
        unit = "geodesic" if self.hyperbolic else "radians"
        means = ", ".join(f"{name} {values.mean():.2f}" for name, values in {**groups, "images": images}.items())
        return Panel(figures.radius_histogram(images, groups, unit, salt=self.salt + "radius"), f"Means: {means}.")

    def disk(self) -> Panel:
        from meru_fast.evaluation import figures

        images, captions = cones.disk_positions(self.model, self.root, self.images, self.captions)
        shown = self.gallery.sample(20)
        ladders = [self.gallery.rungs[index] for index in shown]
        named = dict.fromkeys(rung for ladder in ladders for rung in ladder[:3])
        farthest = max(self.radii(self.images).max().item(), self.radii(self.captions).max().item())
        step = 0.5 if farthest < 3 else 1.0
        distances = [step * number for number in range(1, int(farthest / step) + 1)]
        rings = {cones.disk_radius(self.model, torch.tensor(d)).item(): f"{d:g}" for d in distances}
        html = figures.poincare_disk(
            images.cpu().numpy(),
            captions.cpu().numpy(),
            [(index, self.gallery.picture(index)) for index in shown],
            ladders,
            {rung: shorten(self.gallery.captions[rung], LABEL, placeholder=" ...") for rung in named},
            rings,
            salt=self.salt + "disk",
        )
        kind = "Poincaré disk" if self.hyperbolic else "Sphere, seen from its root"
        return Panel(
            f'<div class="map">{html}</div>',
            f"{kind}: {len(images)} images and {len(captions)} captions. The distance from the centre is exact (see "
            "the rings), the angle shows the two directions of largest variation. Lines lead from the root over the "
            "captions of an image, general to specific, to the image.",
        )

    def retrieval(self, count: int = 6, k: int = 6) -> Panel:
        """The nearest images of some specific captions."""
        rows = []
        for index in self.gallery.sample(count):
            caption = self.gallery.rungs[index][-1]
            found = nearest(self.model, self.captions[[caption]], self.images, min(k, len(self.images)))[0].tolist()
            rows.append(
                (self.gallery.captions[caption], [(i, self.gallery.rungs[i][-1] == caption, "") for i in found])
            )
        return Panel(self._sheet(rows), "Best first. Framed: an image with this very caption.")

    def entailed(self, count: int = 4, k: int = 6) -> Panel | None:
        """The images deepest in the cones of some general captions."""
        if not self.hyperbolic:
            return None
        above = [rung for index in self.gallery.sample(3 * count) for rung in self.gallery.rungs[index][:-1]]
        above = list(dict.fromkeys(above))
        general = above[:: max(1, len(above) // count)][:count]
        if not general:
            return None
        angles, found = cones.nearest_by_angle(
            self.model, self.captions[general], self.images, min(k, len(self.images))
        )
        rows = []
        for caption, row_angles, row in zip(general, angles.rad2deg().tolist(), found.tolist(), strict=True):
            cells = [
                (i, caption in self.gallery.rungs[i], f"{angle:.0f}°") for i, angle in zip(row, row_angles, strict=True)
            ]
            rows.append((self.gallery.captions[caption], cells))
        return Panel(
            self._sheet(rows),
            "The images that lie deepest in the entailment cone of a caption, with the exterior angle at the caption. "
            "Framed: it is one of the image's own captions.",
        )

    def walk(self, index: int) -> list[Stop]:
        """The traversal of an image to the root."""
        return traverse(self.model, self.images[index], self.root, self.pool_features, self.pool, self.root)

    def traversals(self, count: int = 8) -> Panel:
        cards = []
        for index in self.gallery.sample(count):
            cards.append(render("walk.html", start=self._picture(index), end="", stops=self.walk(index), root=ROOT))
        return Panel(
            f'<div class="walks">{"".join(cards)}</div>',
            "From each image straight to the root: the texts that are nearest on the way, and how much of the way is "
            "gone when they first are.",
        )

    def interpolations(self, count: int = 4) -> Panel:
        shown = self.gallery.sample(2 * count)
        cards = []
        for start, end in zip(shown[::2], shown[1::2], strict=False):
            stops = traverse(self.model, self.images[start], self.images[end], self.pool_features, self.pool, self.root)
            cards.append(
                render("walk.html", start=self._picture(start), end=self._picture(end), stops=stops, root=ROOT)
            )
        return Panel(f'<div class="walks">{"".join(cards)}</div>', "From one image to another, by the same rule.")

    def numbers(self) -> Panel:
        """Cones, order of the ladders, and tree measures."""
        rows: list[tuple[str, str]] = []
        own = torch.tensor([rungs[-1] for rungs in self.gallery.rungs], device=self.images.device)
        first = torch.tensor([rungs[0] for rungs in self.gallery.rungs], device=self.images.device)
        steps = [step for rungs in self.gallery.rungs for step in pairwise(rungs)]
        if steps:
            distance = self.radii(self.captions)
            upper, lower = torch.tensor(sorted(set(steps)), device=distance.device).T
            right = (distance[upper] < distance[lower]).double().mean().item()
            rows.append(("more general caption is nearer to the root", f"{right:.1%}"))
        nearer = (self.radii(self.captions)[own] < self.radii(self.images)).double().mean().item()
        rows.append(("specific caption is nearer to the root than its image", f"{nearer:.1%}"))
        if self.hyperbolic:
            for name, texts in {"general": first, "specific": own}.items() if steps else {"own": own}.items():
                found = cones.cone_statistics(self.model, self.captions[texts], self.images)
                rows += [
                    (f"image inside the cone of its {name} caption", f"{found['inside']:.1%}"),
                    (f"another image inside the cone of the {name} caption", f"{found['inside_mismatched']:.1%}"),
                    (f"half aperture of the {name} captions, mean", f"{found['aperture']:.1f}°"),
                ]
        if steps:
            rows += self._tree_rows(sorted(set(own.tolist())))
        return Panel(render("table.html", rows=rows), "Over the whole gallery.")

    def _tree_rows(self, leaves: list[int]) -> list[tuple[str, str]]:
        """The nearest specific caption of each image, judged in the tree that the ladders form."""
        names, tree = self.gallery.captions, self.gallery.tree
        guesses = nearest(self.model, self.images, self.captions[leaves], 1)[:, 0].tolist()
        truth = [names[rungs[-1]] for rungs in self.gallery.rungs]
        pairs = [
            (names[leaves[guess]], true)
            for guess, true in zip(guesses, truth, strict=True)
            if tree.connected(names[leaves[guess]], true)
        ]
        rows = [("nearest caption belongs to the same tree", f"{len(pairs) / len(truth):.1%}")]
        if pairs:
            found = hierarchical_metrics(tree, *zip(*pairs, strict=True))
            titles = {
                "tie": "tree-induced error (edges), of these",
                "lca": "lowest common ancestor, of these",
                "jaccard": "Jaccard index of the ancestors, of these",
                "hierarchical_precision": "hierarchical precision, of these",
                "hierarchical_recall": "hierarchical recall, of these",
            }
            rows += [(titles[name], f"{value:.3f}") for name, value in found.items()]
        return rows

    def settings(self) -> Panel:
        rows = [("architecture", describe(self.model))]
        if self.hyperbolic:
            rows.append(("curvature c", f"{cones.curvature(self.model):.3f}"))
        rows.append(("temperature", f"{1 / self.model.scalar('logit_scale').item():.4f}"))
        rows += [(name, installed(name)) for name in PACKAGES]
        details = []
        for name in ("config.yaml", "environment.txt"):
            if self.subject.run is not None and (self.subject.run / name).is_file():
                details.append((name, (self.subject.run / name).read_text(encoding="utf-8")))
        return Panel(render("table.html", rows=rows, details=details), "")

    def _picture(self, index: int) -> str:
        return render("picture.html", source=data_uri(self.gallery.picture(index)), alt=self.gallery.ladders[index][-1])

    def _sheet(self, rows: Sequence[tuple[str, Sequence[tuple[int, bool, str]]]]) -> str:
        cells = [(title, [(self._picture(i), right, note) for i, right, note in found]) for title, found in rows]
        return render("sheet.html", rows=cells)


def sections(portraits: Sequence[Portrait]) -> list[Section]:
    """All sections of the page; those that no model has anything for are left out."""
    made = []
    for title, lead, make in (
        ("Training", "What the loss did, and where it moved the embeddings.", Portrait.training),
        (
            "Distance from the root",
            "A general caption fits many images. The entailment loss asks that it hold them all in its cone, and cones "
            "are wide only near the root: so captions settle inside, images outside.",
            Portrait.radius_histogram,
        ),
        ("The map", "Every image and caption, seen from the root.", Portrait.disk),
        ("Retrieval", "The nearest images of a caption, all held out.", Portrait.retrieval),
        (
            "Traversals",
            "Walking from an image towards the root, captions become more general until nothing is left to say.",
            Portrait.traversals,
        ),
        ("Interpolations", "Walking from one image to another.", Portrait.interpolations),
        (
            "Entailment",
            "The exterior angle asks whether a caption entails an image, however far out the image lies.",
            Portrait.entailed,
        ),
        ("Numbers", "Cones, and the tree that the captions form.", Portrait.numbers),
        ("Settings and versions", "", Portrait.settings),
    ):
        panels = []
        for portrait in portraits:
            panel = make(portrait)
            if panel is not None:
                panels.append(replace(panel, name=portrait.subject.title))
        if panels:
            made.append(Section(title, lead, panels))
    return made


def write(
    path: str | Path,
    subjects: Sequence[Subject],
    gallery: Gallery,
    pool: Sequence[str] | None = None,
    title: str = "Report",
    lead: str = "",
    facts: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """Write the page. It holds everything it shows; nothing is fetched when it is opened.

    Args:
        subjects: one model, or several to compare.
        pool: texts for traversals; default is all captions of the gallery.
        facts: (value, name, note) of the numbers at the top.

    Returns:
        `path`.
    """
    with torch.inference_mode():
        portraits = [
            Portrait(subject, gallery, pool or gallery.captions, number) for number, subject in enumerate(subjects)
        ]
        html = render(
            "report.html",
            title=title,
            lead=lead,
            facts=facts,
            sections=sections(portraits),
            names=[subject.title for subject in subjects],
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def render(template: str, **values: Any) -> str:
    """Fill one of the page's templates; figures and pictures are made here, so their HTML passes as it is."""
    import jinja2

    folder = resources.files("meru_fast.evaluation") / "templates"
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def data_uri(picture: Image.Image) -> str:
    """The picture, THUMBNAIL pixels at most, as a ``data:`` address."""
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def describe(model: "CLIP") -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {count / 1e6:.1f} M parameters, {model.embed_dim} dimensions"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``meru-fast report``."""
    args = _parse(argv)
    from meru_fast.checkpoint import CheckpointError
    from meru_fast.config import ConfigError

    try:
        gallery = Gallery.load(args.gallery)
        pool = load_pool(args.text_pool) if args.text_pool else None
        subjects = []
        for path, train_config in args.checkpoints:
            model, info = checkpoints.load_model(path, train_config, args.device)
            subjects.append(Subject(Path(path).stem, model, info.root, Path(path)))
        written = write(args.output, subjects, gallery, pool, title=args.title, lead=f"On {args.gallery}.")
    except (CheckpointError, ConfigError, DatasetError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(written)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="meru-fast report",
        description="One HTML page with pictures of what a model learned: radii, a map, retrieval, traversals, cones.",
        epilog="examples:\n"
        "  meru-fast report --checkpoint-path runs/meru --gallery my/captions.json\n"
        "  meru-fast report --checkpoint-path runs/meru --checkpoint-path runs/clip --gallery captions.csv\n\n"
        'The gallery is a list of {"image": "a.jpg", "captions": ["general", "specific"]}, as JSON, JSON lines or CSV.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    checkpoints.add_options(parser)
    add("--gallery", required=True, help="manifest of images and their captions, general to specific")
    add("--text-pool", help="texts for traversals: .txt or .json (default: the gallery's captions)")
    add("--output", default="report.html", help="file to write (default %(default)s)")
    add("--title", default="Report", help="title of the page")
    args = parser.parse_args(argv)
    args.checkpoints = checkpoints.named(parser, args)
    return args
