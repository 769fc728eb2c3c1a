"""Other people's packages, called the way their documentation says. Each is imported only when it is measured."""

import torch
from torch import Tensor


def open_clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one process."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(image, text, logit_scale)


def inf_cl_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Inf-CL's loss, both directions. The scale is folded in: their own `scale` argument needs a process group."""
    from inf_cl import cal_inf_loss

    return (cal_inf_loss(logit_scale * image, text) + cal_inf_loss(logit_scale * text, image)) / 2


def _with_time(x: Tensor, curv: Tensor) -> Tensor:
    """[..., D] to geoopt's [..., 1 + D], time component first; geoopt's k is 1 / curv."""
    return torch.cat([(1 / curv + (x**2).sum(-1, keepdim=True)).sqrt(), x], dim=-1)


def geoopt_exp_map0(x: Tensor, curv: Tensor) -> Tensor:
    from geoopt.manifolds.lorentz import math

    return math.expmap0(torch.cat([torch.zeros_like(x[..., :1]), x], dim=-1), k=1 / curv)[..., 1:]


def geoopt_pairwise_dist(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """geoopt has no pairwise form: broadcasting builds [B1, B2, 1 + D]."""
    from geoopt.manifolds.lorentz import math

    return math.dist(_with_time(x, curv)[:, None], _with_time(y, curv)[None], k=1 / curv)


def hypll_exp_map0(x: Tensor, curv: Tensor) -> Tensor:
    """hypll's ball; the point is carried to the hyperboloid by the isometry, which is part of the time."""
    from hypll.manifolds.poincare_ball.math.diffgeom import expmap0

    ball = expmap0(x / 2, curv)  # the ball's metric at the origin is four times the hyperboloid's
    return 2 * ball / (1 - curv * (ball**2).sum(-1, keepdim=True))


def hypll_pairwise_dist(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """hypll's cdist between the same points on the Poincare ball."""
    from hypll.manifolds.poincare_ball.math.diffgeom import cdist

    def to_ball(point: Tensor) -> Tensor:
        return point / (1 + (1 + curv * (point**2).sum(-1, keepdim=True)).sqrt())

    return cdist(to_ball(x)[None], to_ball(y)[None], curv)[0]
