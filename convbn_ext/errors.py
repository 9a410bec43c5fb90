"""How well z solves x = BN(Conv(z)): the three errors of spec S13 in three norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .operator import Stats, frozen_statistics

NORMS = (1.0, 2.0, float("inf"))


class Errors(NamedTuple):
    """Each error as (1-norm, 2-norm, max-norm) over the whole batch."""

    error1: tuple[float, ...]  # ‖z_true − z‖ / ‖z_true‖
    error2: tuple[float, ...]  # ‖BN(Conv(z)) − x‖
    error3: tuple[float, ...]  # error2 / ‖x‖

    def __str__(self) -> str:
        rows = [f"{'':8}{'1-norm':>12}{'2-norm':>12}{'max-norm':>12}"]
        rows += [f"{name:8}" + "".join(f"{value:12.3e}" for value in row) for name, row in self._asdict().items()]
        return "\n".join(rows)


def forward(z: Tensor, conv: Any, bn: Any, *, stats: Stats = "running") -> Tensor:
    """BN(Conv(z)) in float64 with frozen statistics, by torch's own functions.

    Equals ``bn.eval()(conv(z))`` for ``stats="running"``.

    Args:
        z: (N, C_in, *spatial).
        conv: convolution or linear layer.
        bn: batch normalisation.
        stats: "running" or (mean, var).

    Returns:
        (N, C_out, *out), float64.
    """
    weight, bias = conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()
    mean, var = frozen_statistics(bn, stats, len(weight), "errors")
    gamma, beta = (None if p is None else p.detach().double() for p in (bn.weight, bn.bias))
    y = (
        conv._conv_forward(z.double(), weight, bias)
        if hasattr(conv, "_conv_forward")
        else F.linear(z.double(), weight, bias)
    )
    return F.batch_norm(y, mean.to(y.device), var.to(y.device), gamma, beta, training=False, eps=bn.eps)


def errors(z_true: Tensor, z: Tensor, x: Tensor, conv: Any, bn: Any, *, stats: Stats = "running") -> Errors:
    """Errors of a solution of x = BN(Conv(z)), computed in float64 with frozen statistics.

    A small error3 is not a recovered z: error1 is larger by up to the condition number of the layer.

    Args:
        z_true: (N, C_in, *spatial), what x was made from.
        z: (N, C_in, *spatial), the solution.
        x: (N, C_out, *out), the layer's output.
        conv: convolution or linear layer.
        bn: batch normalisation, used with frozen statistics whatever its mode.
        stats: "running" or (mean, var), as given to ``solve``.

    Returns:
        A named tuple of error1, error2, error3, each (1-norm, 2-norm, max-norm); ``print`` shows it as a table.

    Raises:
        ValueError: z_true and z, or x and BN(Conv(z)), differ in shape.
    """
    if z_true.shape != z.shape:
        raise ValueError(f"errors: z_true and z must have one shape, got {tuple(z_true.shape)} and {tuple(z.shape)}")
    with torch.no_grad():
        residual = forward(z, conv, bn, stats=stats)
        if residual.shape != x.shape:
            raise ValueError(f"errors: x must have shape {tuple(residual.shape)}, got {tuple(x.shape)}")
        residual = residual - x.double()
        truth, difference, given = z_true.double(), z_true.double() - z.double(), x.double()

        def norms(v: Tensor) -> list[float]:
            return [float(torch.linalg.vector_norm(v, p)) for p in NORMS]

        def ratio(a: list[float], b: list[float]) -> tuple[float, ...]:
            return tuple(x / y if y else (0.0 if x == 0 else float("inf")) for x, y in zip(a, b, strict=True))

        error2 = norms(residual)
        return Errors(ratio(norms(difference), norms(truth)), tuple(error2), ratio(error2, norms(given)))
