"""Give an installed copy of MERU or HyCoCLIP the fused geometry and losses, without touching its files.

    import meru_fast.patch
    meru_fast.patch.meru()          # or .hycoclip(), before or after the models are built

Function names, arguments, shapes and logged names stay as they are. What changes: no B x B tensor is kept for the
backward pass, gradients are finite everywhere, geometry is fp32 under any autocast.

The second half of this module holds, under their names, the operations that descendants of the code base add to its
``lorentz`` module (PHyCLIP's per-factor curvature, HyCoCLIP's ranking angle, HySAC's elementwise ones); they replace
those of the patched package wherever it has them.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from meru_fast import ops
from meru_fast.distributed import get_world_size, mean_over_ranks, scale_gradient, sum_gradient
from meru_fast.models.clip import full_precision, joint_group, no_autocast
from meru_fast.models.losses import one_way_contrastive_loss
from meru_fast.ops import (
    elementwise_dist,
    elementwise_inner,
    exp_map0,
    half_aperture,
    log_map0,
    oxy_angle,
    pairwise_dist,
    pairwise_inner,
    pairwise_oxy_angle,
)

MAX_LOGIT_SCALE = 4.6052  # as published: log(100)
INTER_APERTURE, INTRA_APERTURE = 0.7, 1.2  # HyCoCLIP: text to image, and part to whole


class Patch:
    """What was replaced. ``undo()`` puts it back; as a context manager it does so at the end of the block.

    Attributes:
        replaced: dotted names of everything that was replaced.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def set(self, owner: ModuleType | type, name: str, value: Callable) -> None:
        prefix = f"{owner.__module__}." if isinstance(owner, type) else ""
        self.replaced.append(f"{prefix}{owner.__name__}.{name}")
        self._originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._originals:
            owner, name, value = self._originals.pop()
            setattr(owner, name, value)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo()


def meru(package: str = "meru") -> Patch:
    """Patch the installed MERU code base.

    Args:
        package: import name of the copy, with the modules ``lorentz`` and ``models``.

    Raises:
        ImportError: there is no such package, or it has no such modules.
        AttributeError: its models are others.
    """
    return _patched(package, {"CLIPBaseline": _clip_forward, "MERU": _meru_forward})


def hycoclip(package: str = "hycoclip") -> Patch:
    """Patch the installed HyCoCLIP code base: as ``meru()``, and its four-term entailment and box contrast.

    Raises:
        ImportError, AttributeError: as ``meru``.
    """
    forwards = {"CLIPBaseline": _clip_forward, "MERU": _meru_forward, "HyCoCLIP": _hycoclip_forward}
    return _patched(package, forwards)


def _patched(package: str, forwards: Mapping[str, Callable]) -> Patch:
    """Replace the geometry and the forward passes of these models; all or, after an error, nothing."""
    try:
        lorentz, models = (importlib.import_module(f"{package}.{name}") for name in ("lorentz", "models"))
    except ImportError as error:
        raise ImportError(
            f"cannot patch {package!r} ({error}): install that code base, or pass the import name of your copy"
        ) from error
    lacking = [name for name in forwards if not hasattr(models, name)]
    if lacking:
        raise AttributeError(f"cannot patch {package!r}: {package}.models has no {', '.join(lacking)}")
    patch = Patch()
    _replace_geometry(patch, package, lorentz)
    for name, forward in forwards.items():
        patch.set(getattr(models, name), "forward", forward)
    return patch


def _replace_geometry(patch: Patch, package: str, lorentz: ModuleType) -> None:
    for name in GEOMETRY:
        original = getattr(lorentz, name, None)
        if original is None or original is GEOMETRY[name]:
            continue
        # Also where another module of the package imported the function by name.
        for module in [m for key, m in sys.modules.items() if key == package or key.startswith(f"{package}.")]:
            for alias in [key for key, value in vars(module).items() if value is original]:
                patch.set(module, alias, GEOMETRY[name])


def _fp32(forward: Callable) -> Callable:
    """Run the loss outside autocast; the encoders see it as it was."""

    @functools.wraps(forward)
    def outside(self: nn.Module, *features: Tensor) -> dict:
        with no_autocast(features[0]):
            return forward(self, *(scale_gradient(full_precision(x), get_world_size()) for x in features))

    return outside


def _clamp(model: nn.Module) -> None:
    model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
    if hasattr(model, "curv"):
        model.curv.data.clamp_(**model._curv_minmax)
        model.visual_alpha.data.clamp_(max=0.0)
        model.textual_alpha.data.clamp_(max=0.0)


def _clip_forward(self: nn.Module, images: Tensor, tokens: list[Tensor]) -> dict:
    _clamp(self)
    return _clip_loss(self, self.encode_image(images, project=False), self.encode_text(tokens, project=False))


@_fp32
def _clip_loss(self: nn.Module, image: Tensor, text: Tensor) -> dict:
    image, text = (nn.functional.normalize(x, dim=-1) for x in (image, text))
    scale = self.logit_scale.exp()
    loss = ops.contrastive_loss(image, text, 1.0, scale, geometry="cosine", group=joint_group())
    return {"loss": loss, "logging": {"contrastive_loss": loss.detach(), "logit_scale": scale.detach()}}


def _meru_forward(self: nn.Module, images: Tensor, tokens: list[Tensor]) -> dict:
    _clamp(self)
    return _meru_loss(self, self.encode_image(images, project=False), self.encode_text(tokens, project=False))


@_fp32
def _meru_loss(self: nn.Module, image: Tensor, text: Tensor) -> dict:
    scalars = {name: getattr(self, name).exp() for name in ("visual_alpha", "textual_alpha", "curv", "logit_scale")}
    loss, contrastive, entailment = ops.meru_loss(
        image, text, **scalars, entail_weight=self.entail_weight, group=joint_group()
    )
    return _output(loss, contrastive, entailment, scalars["logit_scale"], scalars["curv"])


def _hycoclip_forward(
    self: nn.Module, images: Tensor, box_images: Tensor, tokens: list[Tensor], box_tokens: list[Tensor]
) -> dict:
    _clamp(self)
    image, box_image = (self.encode_image(x, project=False) for x in (images, box_images))
    text, box_text = (self.encode_text(x, project=False) for x in (tokens, box_tokens))
    return _hycoclip_loss(self, image, box_image, text, box_text)


@_fp32
def _hycoclip_loss(self: nn.Module, image: Tensor, box_image: Tensor, text: Tensor, box_text: Tensor) -> dict:
    """Compositional entailment learning (arXiv:2410.06912, eqs. 5 to 8)."""
    group = joint_group()
    curv, scale = self.curv.exp(), self.logit_scale.exp()
    scalars = torch.stack([self.visual_alpha.exp(), self.textual_alpha.exp(), curv])
    visual_alpha, textual_alpha, own_curv = sum_gradient(scalars, group).unbind()  # they act on this rank's rows
    image, box_image = (exp_map0(x, own_curv, scale=visual_alpha) for x in (image, box_image))
    text, box_text = (exp_map0(x, own_curv, scale=textual_alpha) for x in (text, box_text))

    whole = ops.contrastive_loss(image, text, curv, scale, group=group)
    boxes = [
        one_way_contrastive_loss(part, other, curv, scale, group=group)
        for part, other in ((box_image, text), (box_text, image))
    ]
    contrastive = whole / 2 + sum(boxes) / 4
    terms = [
        (text, image, INTER_APERTURE),
        (box_text, box_image, INTER_APERTURE),
        (box_image, image, INTRA_APERTURE),
        (box_text, text, INTRA_APERTURE),
    ]
    cones = [ops.entailment_loss(apex, inside, own_curv, aperture_scale=width) for apex, inside, width in terms]
    entailment = mean_over_ranks(sum(cones) / 2, group)
    loss = contrastive + self.entail_weight * entailment if self.entail_weight > 0 else contrastive
    return _output(loss, contrastive, entailment, scale, curv)


def _output(loss: Tensor, contrastive: Tensor, entailment: Tensor, scale: Tensor, curv: Tensor) -> dict:
    logging = {"contrastive_loss": contrastive, "entailment_loss": entailment, "logit_scale": scale, "curv": curv}
    return {"loss": loss, "logging": {name: value.detach() for name, value in logging.items()}}


def oxy_angle_eval(x: Tensor, y: Tensor, curv: Tensor | float = 1.0, eps: float = 1e-8) -> Tensor:
    """HyCoCLIP's ranking score: minus the exterior angle at x_i towards y_j, [B1, D], [B2, D] -> [B2, B1]."""
    return -pairwise_oxy_angle(x, y, curv).T


def pairwise_inner_batch(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """Lorentz inner products per factor (PHyCLIP): [B1, N, D], [B2, N, D], curv [N] -> [N, B1, B2].

    Raises ValueError for other shapes, as all of these do.
    """
    _roots(curv, x, y)
    return torch.stack([pairwise_inner(x[:, n], y[:, n], curv[n]) for n in range(x.shape[1])])


def pairwise_dist_batch(x: Tensor, y: Tensor, curv: Tensor, eps: float = 1e-8) -> Tensor:
    """Geodesic distances per factor (PHyCLIP): [B1, N, D], [B2, N, D], curv [N] -> [N, B1, B2]."""
    _roots(curv, x, y)
    return torch.stack([pairwise_dist(x[:, n], y[:, n], curv[n]) for n in range(x.shape[1])])


def _roots(curv: Tensor, *points: Tensor) -> Tensor:
    """``sqrt(curv)`` as [N, 1]. Raises ValueError unless the points are [B, N, D] and curv is [N]."""
    if any(part.dim() != 3 or part.shape[1:2] != curv.shape for part in points):
        shapes = ", ".join(str(list(part.shape)) for part in points)
        raise ValueError(f"expected points [B, N, D] and curv [N], got {shapes} and {list(curv.shape)}")
    return curv.sqrt()[:, None]


# A hyperboloid of curvature -c is that of curvature -1 shrunk by sqrt(c): so all factors go through one call.


def exp_map0_batch(x: Tensor, curv: Tensor, eps: float = 1e-8) -> Tensor:
    """Exponential map at the root per factor (PHyCLIP): [B, N, D], curv [N] -> [B, N, D]."""
    root = _roots(curv, x)
    return exp_map0(x * root, 1.0) / root


def log_map0_batch(x: Tensor, curv: Tensor, eps: float = 1e-8) -> Tensor:
    """Inverse of ``exp_map0_batch``."""
    root = _roots(curv, x)
    return log_map0(x * root, 1.0) / root


def half_aperture_batch(x: Tensor, curv: Tensor, min_radius: float = 0.1, eps: float = 1e-8) -> Tensor:
    """Half apertures per factor (PHyCLIP): [B, N, D], curv [N] -> [N, B]."""
    return half_aperture(x * _roots(curv, x), 1.0, min_radius).T


def oxy_angle_batch(x: Tensor, y: Tensor, curv: Tensor, eps: float = 1e-8) -> Tensor:
    """Exterior angles at x per factor (PHyCLIP): [B, N, D], [B, N, D], curv [N] -> [N, B]."""
    root = _roots(curv, x, y)
    return oxy_angle(x * root, y * root, 1.0).T


def get_space_norm(x: Tensor) -> Tensor:
    """Norm of the space components (PHyCLIP): [..., D] -> [..., 1]."""
    return x.norm(dim=-1, keepdim=True)


def get_distance_from_origin(x: Tensor, curv: Tensor) -> Tensor:
    """Geodesic distance from the root per factor (PHyCLIP): [B, N, D], curv [N] -> [B, N, 1]."""
    root = _roots(curv, x)
    return torch.asinh(get_space_norm(x) * root) / root


GEOMETRY: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        pairwise_inner,
        pairwise_dist,
        exp_map0,
        log_map0,
        half_aperture,
        oxy_angle,
        pairwise_oxy_angle,
        elementwise_inner,
        elementwise_dist,
        oxy_angle_eval,
        pairwise_inner_batch,
        pairwise_dist_batch,
        exp_map0_batch,
        log_map0_batch,
        half_aperture_batch,
        oxy_angle_batch,
        get_space_norm,
        get_distance_from_origin,
    )
}
