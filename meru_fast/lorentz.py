"""Reference geometry of the Lorentz model: pure PyTorch, any device, any float dtype, any number of derivatives.

A point is given by its space components ``x`` [..., D]; its time component is ``x_time = sqrt(1/curv + |x|^2)`` and the
hyperboloid has curvature ``-curv``, ``curv > 0``. Names, argument order and defaults are those of MERU (Desai et al.,
"Hyperbolic Image-Text Representations", arXiv 2304.09172); the formulas are rewritten so that nothing cancels,
overflows or divides by zero: values and gradients are finite for norms from 0 to 1e18 in fp32, for equal and for
opposite points.
Derivations and pictures: docs/geometry.md; measured errors: docs/numerics.md.

All formulas live on the unit hyperboloid: ``u = sqrt(curv) x`` enters, lengths leave divided by ``sqrt(curv)``.

- Precision: fp16 and bf16 inputs are computed and returned in fp32, fp64 ones in fp64, also inside ``torch.autocast``.
- ``curv`` is a positive number or a tensor of one element; gradients flow to it.
- ``eps`` belongs to the published signatures. Only ``half_aperture`` still needs it.
- Wrong shapes or values raise ``ValueError``, integer points ``TypeError``.
"""

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor

__all__ = [
    "elementwise_dist",
    "elementwise_inner",
    "exp_map0",
    "half_aperture",
    "log_map0",
    "oxy_angle",
    "pairwise_dist",
    "pairwise_inner",
    "pairwise_oxy_angle",
]

LIFT_MAX = math.asinh(2.0**15)  # exp_map0 saturates here, as published: space norms end at 2^15 / sqrt(curv)
FAR = 2.0**60  # beyond this norm products of two points would leave the range of fp32

# Taylor coefficients in s^2 of sinh(s)/s, used for s < 1, and of asinh(s)/s, used for s < 1/4: exact in fp64.
_SINH_SERIES = [1 / math.factorial(2 * n + 1) for n in range(10)]
_ASINH_SERIES = [(-1) ** n * math.comb(2 * n, n) / (4**n * (2 * n + 1)) for n in range(14)]


def pairwise_inner(x: Tensor, y: Tensor, curv: Scalar = 1.0) -> Tensor:
    """Lorentz inner product ``<x_i, y_j> - x_time_i y_time_j`` of all pairs (MERU eq. 1).

    [B1, D], [B2, D] -> [B1, B2].

    Raises:
        TypeError: integer points.
        ValueError: no matrices, widths or devices that differ, or a `curv` that is not one positive number.
    """
    check_pairwise(x, y)
    root, x, y = _prepare(curv, x, y)
    return gram(x, y) - time(norm(x), 1 / root) * time(norm(y), 1 / root).T


def elementwise_inner(x: Tensor, y: Tensor, curv: Scalar = 1.0) -> Tensor:
    """Lorentz inner product of given pairs: [..., D], [..., D] (broadcast) -> [...].

    Raises:
        TypeError: integer points.
        ValueError: no components, widths or devices that differ, or a `curv` that is not one positive number.
    """
    root, x, y = _prepare(curv, x, y)
    return (x * y).sum(-1) - (time(norm(x), 1 / root) * time(norm(y), 1 / root)).squeeze(-1)


def pairwise_dist(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Geodesic distance of all pairs (MERU eq. 4): [B1, D], [B2, D] -> [B1, B2].

    ``cosh(d) - 1`` is summed from shifted times, so that small norms keep their digits. It is a difference all the
    same: in fp32 distances below about ``5e-4 |x|`` are noise. ``elementwise_dist`` has no such floor.

    Raises:
        TypeError: integer points.
        ValueError: no matrices, widths or devices that differ, or a `curv` that is not one positive number.
    """
    check_pairwise(x, y)
    root, u, v = _unit(curv, x, y)
    (u, u_extra), (v, v_extra) = _pull_in(u), _pull_in(v)
    xu, xv = shifted_time(norm(u)), shifted_time(norm(v)).T
    delta = xu + xv + xu * xv - gram(u, v)
    apart = delta > 0
    delta = torch.where(apart, delta, 1.0)
    arc = torch.log1p(delta + delta.sqrt() * (delta + 2).sqrt())  # acosh(1 + delta)
    return (torch.where(apart, arc, 0.0) + u_extra + v_extra.T) / root


def elementwise_dist(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Geodesic distance of given pairs: [..., D], [..., D] (broadcast) -> [...].

    Right to the last digits at any distance; zero with zero gradient where the points are equal.

    Raises:
        TypeError: integer points.
        ValueError: no components, widths or devices that differ, or a `curv` that is not one positive number.
    """
    root, x, y = _prepare(curv, x, y)
    return 2 * _asinh(_chord(x, y, root).squeeze(-1) / 2) / root


def exp_map0(x: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Exponential map at the root, ``sinh(s)/s * x`` with ``s = sqrt(curv) |x|`` (MERU eq. 5): [..., D] -> [..., D].

    ``s`` saturates at ``asinh(2^15)``, as published: space norms never exceed ``2^15 / sqrt(curv)``.

    Raises:
        TypeError: integer points.
        ValueError: no components, or a `curv` that is not one positive number.
    """
    root, x = _prepare(curv, x)
    s = root * norm(x)
    near = _series(_SINH_SERIES, s.clamp(max=1) ** 2)
    far = torch.sinh(s.clamp(0.5, LIFT_MAX)) / s.clamp(min=0.5)  # clamped below 1, where both meet: no ties
    return torch.where(s < 1, near, far) * x


def log_map0(x: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Inverse of ``exp_map0``: ``asinh(s)/s * x`` with ``s = sqrt(curv) |x|``: [..., D] -> [..., D].

    Raises:
        TypeError: integer points.
        ValueError: no components, or a `curv` that is not one positive number.
    """
    root, x = _prepare(curv, x)
    s = root * norm(x)
    near = _series(_ASINH_SERIES, s.clamp(max=0.25) ** 2)
    far = _asinh(s.clamp(min=0.125)) / s.clamp(min=0.125)
    return torch.where(s < 0.25, near, far) * x


def half_aperture(x: Tensor, curv: Scalar = 1.0, min_radius: float = 0.1, eps: float = 1e-8) -> Tensor:
    """Half aperture of the cone at x, ``asin(2 min_radius / (sqrt(curv) |x|))`` (MERU eq. 7): [..., D] -> [...].

    Inside the rim ``sqrt(curv) |x| <= 2 min_radius`` the cone is a half space: pi/2 with zero gradient. Just outside
    the true slope is unbounded; it is cut where ``x`` is within a relative ``eps`` of the rim.

    Raises:
        TypeError: integer points.
        ValueError: no components, a `curv` that is not one positive number, or a negative `min_radius`.
    """
    if not min_radius >= 0:
        raise ValueError(f"min_radius must not be negative, got {min_radius}")
    root, x = _prepare(curv, x)
    return aperture(root * norm(x), min_radius, eps).squeeze(-1)


def oxy_angle(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Exterior angle at x of the triangle (root, x, y) (MERU eq. 8): [..., D], [..., D] (broadcast) -> [...].

    0 when y lies straight behind x, pi when it lies towards the root. Where the angle is undefined it has a value and a
    zero gradient: pi/2 for ``x = 0`` (the mean over all directions), 0 for ``x = y`` (a cone contains its apex).

    Raises:
        TypeError: integer points.
        ValueError: no components, widths or devices that differ, or a `curv` that is not one positive number.
    """
    root, x, y = _prepare(curv, x, y)
    return angle_of_parts(root, *split(x, y)).squeeze(-1)


def pairwise_oxy_angle(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Exterior angle at x_i towards y_j for all pairs: [B1, D], [B2, D] -> [B1, B2].

    One matrix product instead of a [B1, B2, D] tensor. That product is a difference of nearly equal numbers for nearly
    parallel rows, so it is computed in fp64 (where the device has it), and pairs nearer than its resolution count as
    equal: ``x_i = y_j`` gives 0 as in ``oxy_angle``.

    Raises:
        TypeError: integer points.
        ValueError: no matrices, widths or devices that differ, or a `curv` that is not one positive number.
    """
    check_pairwise(x, y)
    _, narrow, _ = _prepare(curv, x, y)
    if x.device.type != "mps":
        x, y = x.double(), y.double()
    _, u, v = _unit(curv, x, y)
    (ru, direction), rv = _polar(u), norm(v).T
    along = gram(direction, v)
    across_square, ahead = (rv - along) * (rv + along), along - ru
    apart = across_square + ahead**2 > 64 * torch.finfo(u.dtype).eps * rv**2
    across = _sqrt(torch.where(apart, across_square, 0.0))
    angle = _exterior_angle(ru, ru, torch.where(apart, ahead, 0.0), across, time(rv))
    return angle.to(narrow.dtype)


# --- preparation of the arguments -------------------------------------------------------------------------------------


def _prepare(curv: Scalar, *points: Tensor) -> tuple:
    """Check, bring everything to one dtype of at least fp32; returns (sqrt(curv), *points)."""
    check_points(*points)
    dtype = functools.reduce(torch.promote_types, (point.dtype for point in points), torch.float32)
    root: Scalar
    if isinstance(curv, Tensor):
        if curv.numel() != 1:
            raise ValueError(f"curv must be one number, got a tensor of shape {tuple(curv.shape)}")
        root = curv.reshape(()).to(dtype).sqrt()
    elif not curv > 0:
        raise ValueError(f"curv must be positive, got {curv}")
    else:
        root = math.sqrt(curv)
    return root, *(point.to(dtype) for point in points)


def _unit(curv: Scalar, *points: Tensor) -> tuple:
    """``_prepare``, then move the points to the unit hyperboloid."""
    root, *wide = _prepare(curv, *points)
    return root, *(root * point for point in wide)


def check_points(*points: Tensor) -> None:
    """Floating tensors of one width, on one device.

    Raises:
        TypeError: integer points.
        ValueError: no components, or widths or devices that differ.
    """
    for point in points:
        if not point.is_floating_point():
            raise TypeError(f"points must be floating tensors, got {point.dtype}")
        if point.dim() == 0 or point.shape[-1] == 0:
            raise ValueError(f"points must have at least one component, got shape {tuple(point.shape)}")
    if len({point.shape[-1] for point in points}) > 1:
        raise ValueError(f"points must agree in the last dimension, got shapes {[tuple(p.shape) for p in points]}")
    if len({point.device for point in points}) > 1:
        raise ValueError(f"points must be on one device, got {[str(point.device) for point in points]}")


def check_pairwise(x: Tensor, y: Tensor) -> None:
    """Both points are matrices. Raises ValueError: one of them is not."""
    if x.dim() != 2 or y.dim() != 2:
        raise ValueError(f"pairwise functions take [B1, D] and [B2, D], got {tuple(x.shape)} and {tuple(y.shape)}")


# --- building blocks on the unit hyperboloid --------------------------------------------------------------------------


def norm(u: Tensor) -> Tensor:
    """Norm over the last dimension, kept: right from the smallest to the largest float, zero gradient at zero."""
    unit = peak(u)
    return unit * torch.linalg.vector_norm(u * (1 / unit), dim=-1, keepdim=True)


def _polar(u: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(u)`` and the unit vector of u; the zero vector, with zero gradient, has direction zero."""
    unit = peak(u)
    v = u * (1 / unit)
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    zero = length == 0
    return unit * length, v * torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, length))


def peak(u: Tensor) -> Tensor:
    """The largest power of two below the largest component: scaling by it neither rounds nor overflows."""
    largest = u.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    integer, exponent = (torch.int64, 0x7FF << 52) if u.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (largest.view(integer) & exponent).view(u.dtype)


def gram(u: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(u.device.type, enabled=False):  # autocast would take the product in 16 bits
        return u @ v.T


def time(r: Tensor, rest: Scalar = 1.0) -> Tensor:
    """``sqrt(rest^2 + r^2)``."""
    return torch.hypot(r, rest if isinstance(rest, Tensor) else torch.full_like(r, rest))


def shifted_time(r: Tensor) -> Tensor:
    """``sqrt(1 + r^2) - 1``."""
    return r * (r / (1 + time(r)))


def _asinh(s: Tensor) -> Tensor:
    """asinh for s >= 0 whose gradient does not overflow at 1e19, and 30 times faster than torch's on CPUs."""
    return torch.log1p(s + shifted_time(s))


def _sqrt(z: Tensor) -> Tensor:
    """Square root, 0 with zero gradient where z <= 0."""
    positive = z > 0
    return torch.where(positive, torch.where(positive, z, 1.0).sqrt(), 0.0)


def _series(coefficients: list[float], z: Tensor) -> Tensor:
    total = torch.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * z + coefficient
    return total


def _pull_in(u: Tensor) -> tuple[Tensor, Tensor]:
    """Bring rows beyond FAR back to FAR: returns (rows, the distance to add to every pair of that row)."""
    excess = (norm(u) / FAR).detach().clamp(min=1)
    return u / excess, excess.log()


def _chord(x: Tensor, y: Tensor, root: Scalar) -> Tensor:
    """Lorentz chord ``|u - v|_L = 2 sinh(d / 2)``, [..., 1], without a difference of large numbers but ``x - y``.

    ``x - y`` is split along and across ``x + y`` before scaling by ``root``: that rounds, and would tilt close pairs.
    """
    ru, rv = root * norm(x), root * norm(y)
    unit = 1 / torch.maximum(ru, rv).detach().clamp(min=1)  # keeps products of two large norms in range
    u_time, v_time = unit * time(ru), unit * time(rv)
    inner = ((root * unit * x) * (root * unit * y)).sum(-1, keepdim=True)
    acute = inner > -(unit**2)

    m, w = x + y, x - y
    axis = _polar(m)[1]
    par = (w * axis).sum(-1, keepdim=True)
    width, par = root * norm(w - par * axis), root * par
    near = torch.where(acute, inner, 0.0)
    total = (2 * (unit**2 + u_time * v_time + near) + (unit * width) ** 2).sqrt()
    a, b = width * ((u_time + v_time) / total), 2 * par * (unit / total)
    zero = (a == 0) & (b == 0)
    acute_chord = torch.where(zero, 0.0, torch.hypot(torch.where(zero, 1.0, a), b))

    xu, xv = unit * shifted_time(ru), unit * shifted_time(rv)
    obtuse_chord = _sqrt(2 * ((xu + xv) * unit + xu * xv - torch.where(acute, 0.0, inner))) / unit
    return torch.where(acute, acute_chord, obtuse_chord)


def aperture(s: Tensor, min_radius: float, eps: float = 1e-8) -> Tensor:
    """``half_aperture`` at the norm s on the unit hyperboloid."""
    rim = 2 * min_radius
    outside = s > rim
    s = torch.where(outside, s, 1 + rim)
    side = (s - rim).clamp(min=eps * rim).sqrt() * (s + rim).sqrt()
    return torch.where(outside, torch.atan2(torch.full_like(s, rim), side), math.pi / 2)


def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|x|, |y| and the components of ``y - x`` along and across x: [..., D], [..., D] -> four [..., 1]."""
    length, direction = _polar(x)
    w = y - x  # unscaled: scaling rounds, and would tilt close pairs
    ahead = (direction * w).sum(-1, keepdim=True)  # <direction, y> - |x|, without the cancellation
    return length, norm(y), ahead, norm(w - ahead * direction)


def angle_of_parts(root: Scalar, x_norm: Tensor, y_norm: Tensor, ahead: Tensor, across: Tensor) -> Tensor:
    """``oxy_angle`` from the parts that ``split`` gives."""
    ru, rv = root * x_norm, root * y_norm
    scale = rv.detach().clamp(min=1)  # the angle depends on v through ratios only
    unit = root / scale
    return _exterior_angle(ru, ru / scale, unit * ahead, unit * across, time(rv) / scale)


def _exterior_angle(ru: Tensor, near: Tensor, ahead: Tensor, across: Tensor, v_time: Tensor) -> Tensor:
    """Angle from the radial direction at u to the geodesic towards v.

    ``near + ahead`` and ``across`` are the components of v along and across u, in units in which its time component is
    ``v_time`` and u itself lies at ``near``. The tangent at u towards v has the components ``across`` and
    ``u_time along - r v_time``; the latter is rewritten where it would cancel.
    """
    u_time, along = time(ru), near + ahead
    acute = along > 0
    total = torch.where(acute, u_time * along + ru * v_time, 1.0)
    rise = ahead * ((along + near) / total) - (ru * across) * (ru * across / total)
    forward = torch.where(acute, rise, u_time * along - ru * v_time)
    size = torch.maximum(across, forward.abs()).detach()
    zero = size == 0
    size = torch.where(zero, 1.0, size)  # atan2 squares its arguments in backward
    return torch.atan2(across / size, torch.where(zero, 1.0, forward / size))
