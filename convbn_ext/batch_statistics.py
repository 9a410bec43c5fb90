"""Live statistics (spec S12): what x itself says about the mean and variance that BN took in training mode.

x = γ (y − μ)/√(σ² + ε) + β with μ, σ² of y = Conv(z) over the batch implies, per channel, mean(x) = β and
v = var((x − β)/γ) = σ²/(σ² + ε) < 1, hence σ² = ε v/(1 − v). μ is free: y and y + constant give the same x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .operator import check_batch_norm


@dataclass(frozen=True)
class LiveStatistics:
    """Statistics that x implies, and the channels in which no statistics can.

    Attributes:
        mean: (C,) float64, the gauge: running_mean, or zeros where bn keeps none.
        var: (C,) float64, ε v/(1 − v).
        inconsistent: per impossible channel a few words on why.
    """

    mean: Tensor
    var: Tensor
    inconsistent: dict[int, str]


def live_statistics(bn: Any, x: Tensor, rtol: float) -> LiveStatistics:
    """Read σ² off a training-mode output, differentiably.

    Args:
        bn: the batch normalisation, eps > 0.
        x: (N, C, *out), finite.
        rtol: how far, relative to the channel's root mean square, mean(x) may be from β.

    Raises:
        TypeError: bn is no batch normalisation.
        ValueError: eps = 0, so that x does not determine σ².
    """
    check_batch_norm(bn, x.shape[1], "solve")
    if not bn.eps > 0:
        raise ValueError(f'solve: stats="batch" needs eps > 0 to determine the variance from x, got {bn.eps}')
    given = x.double()
    axes = [0, *range(2, x.dim())]
    C = x.shape[1]
    beta = given.new_zeros(C) if bn.bias is None else bn.bias.detach().double()
    gamma = given.new_ones(C) if bn.weight is None else bn.weight.double()
    mean = given.mean(axes)
    v = given.var(axes, correction=0) / gamma**2
    rounding = torch.finfo(x.dtype).eps
    tolerance = max(rtol, 16 * rounding)
    rms = given.square().mean(axes).sqrt()
    inconsistent = {}
    for c in range(C):
        if gamma[c] == 0:
            continue  # singular, which is reported as such
        if abs(mean[c] - beta[c]) > tolerance * rms[c]:
            inconsistent[c] = f"channel {c}: mean(x) = {float(mean[c].detach()):.6g}, but β = {float(beta[c]):.6g}"
        elif v[c] >= 1 + tolerance:
            inconsistent[c] = f"channel {c}: var((x − β)/γ) = {float(v[c].detach()):.6g} is not below 1"
    # where rounding of x hides 1 − v, any σ² ≫ ε gives this x: the largest that can be told apart is taken
    var = bn.eps * v / (1 - v).clamp_min(4 * rounding)
    var = torch.where(gamma == 0, torch.ones_like(var), var)
    gauge = torch.zeros_like(mean) if bn.running_mean is None else bn.running_mean.double()
    return LiveStatistics(gauge, var, inconsistent)


def forward_live(z: Tensor, conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """BN(Conv(z)) in training mode and var(Conv(z)), float64, without touching running statistics.

    Returns:
        (N, C, *out) and (C,).
    """
    weight = conv.weight.detach().double()
    y = conv._conv_forward(z.double(), weight, None) if hasattr(conv, "_conv_forward") else z.double() @ weight.T
    gamma, beta = (None if p is None else p.detach().double() for p in (bn.weight, bn.bias))
    axes = [0, *range(2, y.dim())]
    out = torch.nn.functional.batch_norm(y, None, None, gamma, beta, training=True, eps=bn.eps)
    return out, y.var(axes, correction=0)
