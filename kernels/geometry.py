"""Device functions of the Lorentz model, shared by all kernels.

Everything happens on the *unit* hyperboloid: a point ``x`` of curvature ``-c`` enters as ``u = sqrt(c) x``, lengths
leave divided by ``sqrt(c)``. ``r = |u|``, the time component is ``sqrt(1 + r^2)`` and the shifted time
``xi = sqrt(1 + r^2) - 1``. The formulas are those of ``meru_fast.lorentz`` (derivations: docs/geometry.md); all
arithmetic is fp32 and safe for ``r`` from 0 to 1e18.

Two dialects of the elementary functions: libdevice on a GPU, numpy in Triton's interpreter (``TRITON_INTERPRET=1``),
which has none. ``tl.exp2``, ``tl.sqrt``, ``tl.rsqrt`` exist in both and need no shim.
Rules for callers: cast bf16 and fp16 with ``.to(tl.float32)`` right after the load (the interpreter computes garbage on
raw bf16), and pass tiles of whole rows, zero where masked.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRET: bool = triton.knobs.runtime.interpret  # fixed when the kernels are imported

WARPS = 4  # of a program, in the kernels of exp_map, distance, entailment and topk
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": True}  # FMA keeps digits; its default differs between Tritons

TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal fp32
EXPONENT = tl.constexpr(0x7F800000)  # its bits
FAR = tl.constexpr(16777216.0)  # beyond 2^24 the 1 in 1 + r^2 is below fp32 resolution
LIFT_MAX = tl.constexpr(11.09035488895912)  # asinh(2^15): published saturation of the exponential map
LIFT_CAP = tl.constexpr(32768.0)

if INTERPRET:
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def _numpy(function):
        def call(*args):
            with np.errstate(all="ignore"):
                data = function(*(arg.handle.data for arg in args))
            return tl.tensor(TensorHandle(data.astype(args[0].handle.data.dtype), args[0].dtype), args[0].type)

        return call

    asin, asinh, atan2 = _numpy(np.arcsin), _numpy(np.arcsinh), _numpy(np.arctan2)
    sinh, cosh, log1p = _numpy(np.sinh), _numpy(np.cosh), _numpy(np.log1p)
    fast_log2 = _numpy(np.log2)
else:
    asin, asinh, atan2 = libdevice.asin, libdevice.asinh, libdevice.atan2
    sinh, cosh, log1p = libdevice.sinh, libdevice.cosh, libdevice.log1p
    fast_log2 = libdevice.fast_log2f  # one MUFU; absolute error 2^-22 near 1, so never of 1 + a small number


@triton.jit
def safe_inverse(x):
    """1 / x, and 0 at x = 0: turns a singular direction into the zero vector."""
    return tl.where(x > 0.0, 1.0 / tl.maximum(x, TINY), 0.0)


@triton.jit
def hypot(a, b):
    """sqrt(a^2 + b^2) without overflow or underflow."""
    a = tl.abs(a)
    b = tl.abs(b)
    big = tl.maximum(tl.maximum(a, b), TINY)
    ratio = tl.minimum(a, b) / big
    return tl.where(tl.maximum(a, b) > 0.0, big * tl.sqrt_rn(1.0 + ratio * ratio), 0.0)


@triton.jit
def unit_time(r):
    """sqrt(1 + r^2), the time component of a point of norm r."""
    near = tl.minimum(r, FAR)
    return tl.where(r < FAR, tl.sqrt_rn(1.0 + near * near), r)


@triton.jit
def shifted_time(r):
    """sqrt(1 + r^2) - 1 without cancellation."""
    return r * (r / (1.0 + unit_time(r)))


@triton.jit
def row_norm(u):
    """Euclidean norm of each row of a tile [R, D] -> [R], right from 1e-38 to 1e38."""
    peak = tl.maximum(tl.max(tl.abs(u), axis=1), TINY)
    peak = (peak.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)  # a power of two: exact
    u = u * (1.0 / peak)[:, None]
    return peak * tl.sqrt_rn(tl.sum(u * u, axis=1))


@triton.jit
def arcosh1p(delta):
    """acosh(1 + delta) for delta >= 0, to the last digits at both ends."""
    delta = tl.maximum(delta, 0.0)
    return log1p(delta + tl.sqrt(delta) * tl.sqrt(delta + 2.0))


@triton.jit
def exp_factors(s):
    """Exponential map at the origin: f = sinh(s)/s scales the vector, k = df/dlog(s) = cosh(s) - f."""
    s2 = tl.minimum(s, 1.0) * tl.minimum(s, 1.0)
    f_near = 1.0 + s2 * (1 / 6 + s2 * (1 / 120 + s2 * (1 / 5040 + s2 * (1 / 362880 + s2 * (1 / 39916800)))))
    k_near = s2 * (1 / 3 + s2 * (1 / 30 + s2 * (1 / 840 + s2 * (1 / 45360 + s2 * (1 / 3991680)))))
    mid = tl.minimum(tl.maximum(s, 1.0), LIFT_MAX)
    f_mid = sinh(mid) / mid
    k_mid = cosh(mid) - f_mid
    f_far = LIFT_CAP / tl.maximum(s, 1.0)
    f = tl.where(s < 1.0, f_near, tl.where(s < LIFT_MAX, f_mid, f_far))
    k = tl.where(s < 1.0, k_near, tl.where(s < LIFT_MAX, k_mid, -f_far))
    return f, k


@triton.jit
def log_factors(s):
    """Logarithmic map at the origin: f = asinh(s)/s and k = df/dlog(s) = 1/sqrt(1 + s^2) - f."""
    s2 = tl.minimum(s, 0.25) * tl.minimum(s, 0.25)
    f_near = 1.0 + s2 * (-1 / 6 + s2 * (3 / 40 + s2 * (-5 / 112 + s2 * (35 / 1152 + s2 * (-63 / 2816)))))
    k_near = s2 * (-1 / 3 + s2 * (3 / 10 + s2 * (-15 / 56 + s2 * (35 / 144 + s2 * (-315 / 1408)))))
    far = tl.maximum(s, 0.25)
    f_far = asinh(far) / far
    k_far = 1.0 / unit_time(far) - f_far
    return tl.where(s < 0.25, f_near, f_far), tl.where(s < 0.25, k_near, k_far)


@triton.jit
def chord(x, y, root):
    """Lorentz chord |u - v|_L = 2 sinh(d / 2) of the rows of two tiles [R, D], u = root x, v = root y, at any norm.

    Returns (chord [R], perp [R, D], par [R], axis [R, D]): ``u - v = perp + par * axis``, axis = (u + v) / |u + v|.
    Pairs with <u,v> > -1 use ``(T^2 |perp|^2 + 4 par^2) / (2 (1 + u_t v_t + <u,v>) + |perp|^2)``, ``T = u_t + v_t``,
    the others ``2 (xi_u + xi_v + xi_u xi_v - <u,v>)``. No difference of large numbers in either but ``x - y``, which is
    taken before the scaling: that rounds, and would tilt close pairs.
    """
    ru = root * row_norm(x)
    rv = root * row_norm(y)
    unit = 1.0 / tl.maximum(1.0, tl.maximum(ru, rv))  # keeps products of two huge norms in range
    tu = unit_time(ru) * unit
    tv = unit_time(rv) * unit
    inner = tl.sum((x * (root * unit)[:, None]) * (y * (root * unit)[:, None]), axis=1)
    acute = inner > -unit * unit
    m = x + y
    axis = m * safe_inverse(row_norm(m))[:, None]
    w = x - y
    par = tl.sum(w * axis, axis=1)
    perp = root * (w - par[:, None] * axis)
    par *= root
    width = row_norm(perp)
    near = tl.where(acute, inner, 0.0)
    total = tl.sqrt_rn(2.0 * (unit * unit + tu * tv + near) + (width * unit) * (width * unit))
    acute_chord = hypot(width * ((tu + tv) / total), 2.0 * par * (unit / total))
    xu = shifted_time(ru) * unit
    xv = shifted_time(rv) * unit
    obtuse_chord = tl.sqrt_rn(2.0 * ((xu + xv) * unit + xu * xv - tl.where(acute, 0.0, inner))) / unit
    return tl.where(acute, acute_chord, obtuse_chord), perp, par, axis
