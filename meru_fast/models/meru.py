"""MERU: image and text embeddings on a hyperboloid of learned curvature (arXiv:2304.09172)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meru_fast import lorentz, ops
from meru_fast.models.clip import CLIP, IMAGENET_MEAN, IMAGENET_STD, _full_precision, _group, _no_autocast
from meru_fast.models.recipe import from_recipe, recipe_of


class MERU(CLIP, coders={nn.Module: (recipe_of, from_recipe)}):
    """Encoders as in CLIP; their features are scaled, lifted to the hyperboloid and compared by geodesic distance.

    Args:
        visual, textual, embed_dim, pixel_mean, pixel_std, precision: see ``CLIP``.
        curv_init: initial curvature c (the hyperboloid has curvature -c); it stays within a factor 10 of this.
        learn_curv: whether the curvature is learned.
        entail_weight: weight of the entailment loss (eq. 8 of the paper); 0 leaves it out of the loss.
        min_radius: K of the half aperture (eq. 6), below which a point has no cone.
    """

    geometry = "lorentz"

    def __init__(
        self,
        visual: nn.Module,
        textual: nn.Module,
        embed_dim: int,
        curv_init: float = 1.0,
        learn_curv: bool = True,
        entail_weight: float = 0.0,
        min_radius: float = 0.1,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        precision: str = "high",
    ):
        super().__init__(visual, textual, embed_dim, pixel_mean, pixel_std, precision)
        if curv_init <= 0:
            raise ValueError(f"curv_init must be positive, got {curv_init}")
        self.entail_weight, self.min_radius = entail_weight, min_radius
        center, decade = math.log(curv_init), math.log(10)
        self._add_scalar("curv", center, center - decade, center + decade)
        self.curv.requires_grad_(learn_curv)
        self._add_scalar("visual_alpha", math.log(embed_dim**-0.5), high=0.0)
        self._add_scalar("textual_alpha", math.log(embed_dim**-0.5), high=0.0)

    def project_image(self, features: Tensor) -> Tensor:
        """Linear image features [..., D] scaled and lifted to the hyperboloid (space components)."""
        return self._lift(features, "visual_alpha")

    def project_text(self, features: Tensor) -> Tensor:
        """Linear text features [..., D] scaled and lifted to the hyperboloid (space components)."""
        return self._lift(features, "textual_alpha")

    def _lift(self, features: Tensor, alpha: str) -> Tensor:
        with _no_autocast(features):
            return ops.exp_map0(_full_precision(features), self.scalar("curv"), scale=self.scalar(alpha))

    def similarity(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        """Lorentz inner products [B1, B2] of lifted features: in the order of the distances, higher is closer."""
        with _no_autocast(image_feats):
            return ops.pairwise_inner(image_feats, text_feats, self.scalar("curv"))

    def loss(self, image_feats: Tensor, text_feats: Tensor) -> dict:
        """``forward`` from the linear features [B, D] of ``encode_*(project=False)``."""
        scalars = {name: self.scalar(name) for name in self.scalar_bounds}
        with _no_autocast(image_feats):
            loss, contrastive, entailment = ops.meru_loss(
                self._for_engine(image_feats),
                self._for_engine(text_feats),
                **scalars,
                entail_weight=self.entail_weight,
                min_radius=self.min_radius,
                precision=self.precision,
                group=_group(),
            )
            values = {name: value.detach()[0] for name, value in scalars.items()}
            logging = {"contrastive_loss": contrastive.detach(), "entailment_loss": entailment.detach(), **values}
            logging |= self._geometry_of(_full_precision(image_feats), _full_precision(text_feats), **values)
        return {"loss": loss, "logging": logging}

    @torch.no_grad()
    def _geometry_of(
        self, image: Tensor, text: Tensor, visual_alpha: Tensor, textual_alpha: Tensor, curv: Tensor, **_unused: Tensor
    ) -> dict[str, Tensor]:
        """Mean geodesic distance from the root of both sides, and the share of images outside their caption's cone."""
        image, text = image * visual_alpha, text * textual_alpha
        radii = {"image_radius": image.norm(dim=-1).mean(), "text_radius": text.norm(dim=-1).mean()}
        image, text = lorentz.exp_map0(image, curv), lorentz.exp_map0(text, curv)
        angle = lorentz.oxy_angle(text, image, curv)
        aperture = lorentz.half_aperture(text, curv, self.min_radius)
        return radii | {"cone_violation": (angle > aperture).float().mean()}
