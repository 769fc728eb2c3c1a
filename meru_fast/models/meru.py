"""MERU: image and text embeddings on a hyperboloid of learned curvature (arXiv:2304.09172)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meru_fast import lorentz, ops
from meru_fast.distributed import mean_over_ranks, sum_gradient
from meru_fast.models.clip import (
    CLIP,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIGMOID_LOGIT,
    SIGMOID_SCALE,
    full_precision,
    joint_group,
    no_autocast,
)
from meru_fast.models.recipe import from_recipe, recipe_of


class MERU(CLIP, coders={nn.Module: (recipe_of, from_recipe)}):
    """Encoders as in CLIP; their features are scaled, lifted to the hyperboloid and compared by geodesic distance.

    Args:
        visual, textual, embed_dim, pixel_mean, pixel_std, precision, pair_loss: see ``CLIP``.
        curv_init: initial curvature c (the hyperboloid has curvature -c); it stays within a factor 10 of this.
        learn_curv: whether the curvature is learned.
        entail_weight: weight of the entailment loss (eq. 8 of the paper); 0 leaves it out of the loss.
        min_radius: K of the half aperture (eq. 6), below which a point has no cone.
        final_curv: curvature at the end of training, geometrically interpolated (with ``learn_curv=False``).
        final_min_radius: ``min_radius`` at the end of training, linearly interpolated.

    Raises:
        ValueError: a curvature or radius that is not positive, ``final_curv`` of a learned curvature, or as ``CLIP``.
    """

    geometry = "lorentz"
    curv: Tensor
    visual_alpha: nn.Parameter
    textual_alpha: nn.Parameter

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
        pair_loss: str = "softmax",
        final_curv: float | None = None,
        final_min_radius: float | None = None,
    ):
        super().__init__(visual, textual, embed_dim, pixel_mean, pixel_std, precision, pair_loss)
        positive = {"curv_init": curv_init, "final_curv": final_curv}
        positive |= {"min_radius": min_radius, "final_min_radius": final_min_radius}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if final_curv is not None and learn_curv:
            raise ValueError(f"final_curv={final_curv} is a schedule: it needs learn_curv=False")
        self.entail_weight, self.min_radius = entail_weight, min_radius
        self._curv_range = curv_init, curv_init if final_curv is None else final_curv
        self._min_radius_range = min_radius, min_radius if final_min_radius is None else final_min_radius
        ends = [math.log(value) for value in self._curv_range]
        self._add_scalar("curv", ends[0], min(ends) - math.log(10), max(ends) + math.log(10), learn_curv)
        if pair_loss == "sigmoid":  # features start at right angles and radius 1: that far apart, SigLIP's first logit
            apart = math.acosh(math.cosh(curv_init**0.5) ** 2) / curv_init**0.5
            nn.init.constant_(self.logit_bias, SIGMOID_LOGIT + SIGMOID_SCALE * apart)
        self._add_scalar("visual_alpha", math.log(embed_dim**-0.5), high=0.0)
        self._add_scalar("textual_alpha", math.log(embed_dim**-0.5), high=0.0)

    def project_image(self, features: Tensor) -> Tensor:
        """Linear image features [..., D] scaled and lifted to the hyperboloid (space components)."""
        return self._lift(features, "visual_alpha")

    def project_text(self, features: Tensor) -> Tensor:
        """Linear text features [..., D] scaled and lifted to the hyperboloid (space components)."""
        return self._lift(features, "textual_alpha")

    def _lift(self, features: Tensor, alpha: str) -> Tensor:
        with no_autocast(features):
            return ops.exp_map0(full_precision(features), self.scalar("curv"), scale=self.scalar(alpha))

    def similarity(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        """Lorentz inner products [B1, B2] of lifted features: in the order of the distances, higher is closer."""
        with no_autocast(image_feats):
            return ops.pairwise_inner(image_feats, text_feats, self.scalar("curv"))

    @torch.no_grad()
    def set_progress(self, fraction: float) -> None:
        """Set what is scheduled to its value after this fraction (0 to 1) of the training."""
        start, end = self._min_radius_range
        self.min_radius = start + fraction * (end - start)
        start, end = self._curv_range
        if start != end:
            self.curv.fill_((1 - fraction) * math.log(start) + fraction * math.log(end))

    def loss(self, image_feats: Tensor, text_feats: Tensor) -> dict:
        """``forward`` from the linear features [B, D] of ``encode_*(project=False)``.

        Raises:
            ValueError: not as many images as captions.
        """
        scalars = {name: self.scalar(name) for name in self.scalar_bounds}
        with no_autocast(image_feats):
            image, text = self._for_engine(image_feats), self._for_engine(text_feats)
            if self.pair_loss == "softmax":
                loss, contrastive, entailment = ops.meru_loss(
                    image,
                    text,
                    **scalars,
                    entail_weight=self.entail_weight,
                    min_radius=self.min_radius,
                    precision=self.precision,
                    group=joint_group(),
                )
            else:
                loss, contrastive, entailment = self._unfused_loss(image, text, **scalars)
            values = {name: value.detach()[0] for name, value in scalars.items()}
            logging = {"contrastive_loss": contrastive.detach(), "entailment_loss": entailment.detach(), **values}
            logging |= self._bias() | self._geometry_of(
                full_precision(image_feats), full_precision(text_feats), **values
            )
        return {"loss": loss, "logging": logging}

    def _unfused_loss(self, image: Tensor, text: Tensor, **scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``ops.meru_loss`` with the pairwise loss of this model."""
        acting_on_own_rows = torch.cat([scalars[name] for name in ("visual_alpha", "textual_alpha", "curv")])
        visual_alpha, textual_alpha, own_curv = sum_gradient(acting_on_own_rows, joint_group()).unbind()
        image = ops.exp_map0(image, own_curv, scale=visual_alpha)
        text = ops.exp_map0(text, own_curv, scale=textual_alpha)
        contrastive = self._pair_loss(image, text, scalars["curv"], scalars["logit_scale"])
        entailment = mean_over_ranks(ops.entailment_loss(text, image, own_curv, self.min_radius), joint_group())
        loss = contrastive + self.entail_weight * entailment if self.entail_weight else contrastive
        return loss, contrastive, entailment

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
