"""The functions that the published code bases have under these names."""

import published_formulas as plain
import torch


def pairwise_inner(x, y, curv=1.0):
    return plain.pairwise_inner(x, y, torch.as_tensor(curv))


def pairwise_dist(x, y, curv=1.0, eps=1e-8):
    return plain.pairwise_dist(x, y, torch.as_tensor(curv))


def exp_map0(x, curv=1.0, eps=1e-8):
    return plain.exp_map0(x, torch.as_tensor(curv))


def log_map0(x, curv=1.0, eps=1e-8):
    root = torch.as_tensor(curv) ** 0.5
    norm = root * x.norm(dim=-1, keepdim=True)
    return torch.acosh((1 + norm**2).sqrt().clamp(min=1 + eps)) * x / norm.clamp(min=eps)


def half_aperture(x, curv=1.0, min_radius=0.1, eps=1e-8):
    return plain.half_aperture(x, torch.as_tensor(curv), min_radius)


def oxy_angle(x, y, curv=1.0, eps=1e-8):
    return plain.oxy_angle(x, y, torch.as_tensor(curv))


def oxy_angle_eval(x, y, curv=1.0, eps=1e-8):
    return -torch.stack([oxy_angle(x, row, curv) for row in y])


def pairwise_oxy_angle(x, y, curv=1.0, eps=1e-8):
    return oxy_angle(x[:, None], y[None], curv)


def elementwise_inner(x, y, curv=1.0):
    return (x * y).sum(-1) - plain.time(x, curv) * plain.time(y, curv)


def elementwise_dist(x, y, curv=1.0, eps=1e-8):
    return torch.acosh((-curv * elementwise_inner(x, y, curv)).clamp(min=1 + eps)) / curv**0.5


def _per_factor(function, x, *others, curv):
    return torch.stack([function(x[:, n], *(y[:, n] for y in others), curv[n]) for n in range(x.shape[1])])


def pairwise_inner_batch(x, y, curv):
    return _per_factor(pairwise_inner, x, y, curv=curv)


def pairwise_dist_batch(x, y, curv, eps=1e-8):
    return _per_factor(pairwise_dist, x, y, curv=curv)


def exp_map0_batch(x, curv, eps=1e-8):
    return _per_factor(exp_map0, x, curv=curv).transpose(0, 1)


def log_map0_batch(x, curv, eps=1e-8):
    return _per_factor(log_map0, x, curv=curv).transpose(0, 1)


def half_aperture_batch(x, curv, min_radius=0.1, eps=1e-8):
    return _per_factor(half_aperture, x, curv=curv)


def oxy_angle_batch(x, y, curv, eps=1e-8):
    return _per_factor(oxy_angle, x, y, curv=curv)


def get_space_norm(x):
    return (x**2).sum(-1, keepdim=True).sqrt()


def get_distance_from_origin(x, curv):
    return _per_factor(lambda z, c: elementwise_dist(z, 0 * z, c), x, curv=curv).T[..., None]
