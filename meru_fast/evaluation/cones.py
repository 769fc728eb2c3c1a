"""Where embeddings lie: distance from the root, entailment cones, and ranking by the exterior angle.

Everything takes projected features (``encode_*(project=True)``). For models on a sphere the root is a point of the
sphere (published CLIP checkpoints bring one); without one, the mean direction of all embeddings serves.
"""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from meru_fast import lorentz

if TYPE_CHECKING:
    from meru_fast.models import CLIP, MERU

CHUNK = 1024


def root_of(model: "CLIP", *features: Tensor, root: Tensor | None = None) -> Tensor:
    """The root [D]: the origin for hyperbolic models, else `root`, else the mean direction of `features` [N, D]."""
    if model.geometry == "lorentz":
        return torch.zeros_like(features[0][0])
    if root is not None:
        return F.normalize(root.to(features[0]), dim=-1)
    return F.normalize(torch.stack([part.mean(dim=0) for part in features]).mean(dim=0), dim=-1)


def curvature(model: "CLIP") -> float:
    """The c of a hyperbolic model (its hyperboloid has curvature -c)."""
    return model.scalar("curv").item()


def radii(model: "CLIP", features: Tensor, root: Tensor) -> Tensor:
    """Distance [N] from the root: geodesic for hyperbolic models, the angle in radians on the sphere."""
    if model.geometry == "lorentz":
        return lorentz.log_map0(features, curvature(model)).norm(dim=-1)
    return torch.acos((features @ root).clamp(-1, 1))


def directions(model: "CLIP", features: Tensor, root: Tensor) -> Tensor:
    """Where each point lies as seen from the root: vectors [N, D] of the tangent space, as long as their distance."""
    if model.geometry == "lorentz":
        return lorentz.log_map0(features, curvature(model))
    across = features - (features @ root)[:, None] * root
    return F.normalize(across, dim=-1) * radii(model, features, root)[:, None]


def cone_statistics(model: "CLIP", texts: Tensor, images: Tensor) -> dict[str, float]:
    """How well the cones of texts hold their images. ``texts[i]`` belongs to ``images[i]``; both [N, D], N >= 2.

    Returns:
        ``inside``: share of the pairs with the image in the cone of its text; ``inside_mismatched``: the same for each
        text with the next pair's image (low is good: the cone holds its own); ``aperture`` and ``exterior_angle``:
        means in degrees over the pairs; ``full_cones``: share of texts so near the root that their half aperture is the
        largest there is, 90 degrees.

    Raises:
        ValueError: a model without cones, or unpaired features.
    """
    if model.geometry != "lorentz":
        raise ValueError(f"entailment cones exist in hyperbolic models, not in {type(model).__name__}")
    if texts.shape != images.shape or len(texts) < 2:
        raise ValueError(
            f"expected paired texts and images [N, D], N >= 2, got {tuple(texts.shape)}, {tuple(images.shape)}"
        )
    curv = curvature(model)
    aperture = lorentz.half_aperture(texts, curv, cast("MERU", model).min_radius)
    angle = lorentz.oxy_angle(texts, images, curv)
    mismatched = lorentz.oxy_angle(texts, images.roll(-1, dims=0), curv)
    return {
        "inside": (angle <= aperture).double().mean().item(),
        "inside_mismatched": (mismatched <= aperture).double().mean().item(),
        "aperture": aperture.rad2deg().double().mean().item(),
        "exterior_angle": angle.rad2deg().double().mean().item(),
        "full_cones": (aperture >= torch.pi / 2 - 1e-6).double().mean().item(),
    }


def nearest_by_angle(model: "CLIP", texts: Tensor, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each text the k images most deeply inside (or least outside) its cone.

    Ranks by the exterior angle at the text. That asks whether the text entails the image, however far out it lies.

    Args:
        texts: [T, D], images: [I, D] projected features of a hyperbolic model; k <= I.

    Returns:
        Exterior angles in radians, smallest first, and image positions, both [T, k]. Memory is O(I) for 1,024 texts.
    """
    curv = curvature(model)
    found = [
        lorentz.pairwise_oxy_angle(chunk, images, curv).topk(k, dim=1, largest=False) for chunk in texts.split(CHUNK)
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def disk_positions(model: "CLIP", root: Tensor, *features: Tensor) -> list[Tensor]:
    """Points [N, 2] of the unit disk for each of `features` [N, D]: a map that keeps the distance from the root exact.

    The angle is that of the two directions in which the embeddings, as seen from the root, vary most. The radius is
    that of the Poincare disk, ``tanh(sqrt(c) d / 2)`` at distance d, or on a sphere the share of the half turn.
    """
    seen = [directions(model, part, root) for part in features]
    units = torch.cat([F.normalize(part, dim=-1) for part in seen]).double()
    axes = torch.linalg.svd(units - units.mean(dim=0), full_matrices=False).Vh[:2].T
    found = []
    for part, vectors in zip(features, seen, strict=True):
        flat = F.normalize(F.normalize(vectors, dim=-1).double() @ axes, dim=-1)
        found.append(flat * disk_radius(model, radii(model, part, root).double())[:, None])
    return found


def disk_radius(model: "CLIP", distance: Tensor) -> Tensor:
    """Radius on the map of ``disk_positions`` for a distance from the root."""
    if model.geometry == "lorentz":
        return torch.tanh(curvature(model) ** 0.5 * distance / 2)
    return distance / torch.pi
