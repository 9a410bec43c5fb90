"""Layers with more inputs than outputs, or fewer: minimum norm and least squares by GMRES on A and its adjoint (S16).

    fewer outputs (m ≤ n):  A Aᵀ u = r,  z = z₀ + Aᵀ u     the solution of A z = rhs that is nearest to z₀
    more outputs  (m > n):  Aᵀ A d = Aᵀ r,  z = z₀ + d     the z of least ‖rhs − A z‖

(AB- and BA-GMRES; Hayami, Yin & Ito, 2010.) Off the border A Aᵀ is a convolution of the output grid at any stride
and Aᵀ A one of the input grid for stride 1; their stencils are the autocorrelations of the kernel; the circular
convolutions with these stencils are the preconditioners.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from . import _C
from .cache import remember
from .methods import KrylovOptions, Outcome, Target, gmres
from .operator import ConvBNOperator
from .preconditioners import Preconditioned, circulant_map

_TIGHTENINGS = 6  # times that the target for Aᵀr is lowered by 10 when r is not yet small enough


def autocorrelation_inverse(op: ConvBNOperator, outputs: bool) -> _C.CirculantMap | None:
    """Inverse of the circulant W Wᵀ (outputs) or Wᵀ W; None where that is no convolution (Wᵀ W with a stride)."""
    g = op.geometry
    if not outputs and any(s != 1 for s in g.stride):
        return None
    key = ("autocorrelation", g, op.input_shape, outputs)
    return remember(key, op.weight, lambda: _autocorrelation_inverse(op, outputs))


def _autocorrelation_inverse(op: ConvBNOperator, outputs: bool) -> _C.CirculantMap:
    g = op.geometry
    spatial = (op.output_shape if outputs else op.input_shape)[1:] or (1,)
    stride = g.stride if outputs else (1,) * len(g.stride)
    weight = op.weight.reshape(g.groups, op.weight.shape[0] // g.groups, op.weight.shape[1], -1)
    products = torch.einsum("goit,gpis->gopts" if outputs else "goit,gojs->gijts", weight, weight)
    # (tap, tap) -> position on the grid, −1 off the stride's grid
    lag = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    valid = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for k, d, s, size in zip(g.kernel, g.dilation, stride, spatial, strict=False):
        tap = torch.arange(k, device="cpu") * d
        difference = tap[:, None] - tap[None, :]
        lag = (lag[:, None, :, None] * size + (difference // s % size)[None, :, None, :]).flatten(2).flatten(0, 1)
        valid = (valid[:, None, :, None] & (difference % s == 0)[None, :, None, :]).flatten(2).flatten(0, 1)
    groups, rows, columns = products.shape[:3]
    stencil = products.new_zeros(groups * rows * columns, math.prod(spatial))
    keep = valid.flatten().to(products.device)
    stencil.index_add_(1, lag.flatten().to(products.device)[keep], products.reshape(len(stencil), -1)[:, keep])
    spectrum = torch.fft.rfftn(stencil.reshape(-1, *spatial), dim=tuple(range(1, len(spatial) + 1)))
    blocks = spectrum.reshape(groups, rows, columns, -1).permute(3, 0, 1, 2)
    # w[t] w[s]ᵀ couples output i with output i + (t − s)d/stride; Aᵀ A couples inputs the other way round
    return circulant_map(blocks if not outputs else blocks.conj(), spatial, torch.float64)[0]


def least_squares(
    op: ConvBNOperator, rhs: Tensor, z0: Tensor | None, target: Target, options: KrylovOptions, precondition: bool
) -> Outcome:
    """Minimum-norm or least-squares z, row by row; arguments as for ``gmres``, always in float64.

    Returns:
        An Outcome whose status is "inconsistent" for a row at its least-squares solution with a residual that no z
        can lower to the target.
    """
    options = replace(options, dtype=torch.float64)
    z = rhs.new_zeros(len(rhs), op.shape[1]) if z0 is None else z0
    residual = rhs.clone() if z0 is None else rhs - op.map.apply(z)
    if op.shape[0] <= op.shape[1]:
        return _minimum_norm(op, residual, z, target, options, precondition)
    return _least_squares(op, residual, z, target, options, precondition)


def _minimum_norm(
    op: ConvBNOperator, residual: Tensor, z: Tensor, target: Target, options: KrylovOptions, precondition: bool
) -> Outcome:
    adjoint = _C.AdjointMap(op.conv_map)
    M = autocorrelation_inverse(op, outputs=True) if precondition else None
    system = Preconditioned(op.channel_vector(1 / op.scale), _normal_map(op.conv_map, True), M, op.shape[0])
    outcome = gmres(system, residual, None, target, options)
    outcome.z = z + adjoint.apply(outcome.z)
    return outcome


def _least_squares(
    op: ConvBNOperator, residual: Tensor, z: Tensor, target: Target, options: KrylovOptions, precondition: bool
) -> Outcome:
    adjoint = _C.AdjointMap(op.map)
    M = autocorrelation_inverse(op, outputs=False) if precondition else None
    ones = residual.new_ones(op.shape[1])
    system = Preconditioned(ones, _normal_map(op.map, False), M, op.shape[1])
    outcome = Outcome.unsolved(residual, op.shape[1], "maxiter")
    outcome.z = z.clone()
    rows = torch.arange(len(z), device=z.device)
    gradient = adjoint.apply(residual)
    goal = torch.linalg.vector_norm(gradient, dim=1) * (target.norm / target.scale)
    for _ in range(_TIGHTENINGS):
        part = gmres(system, gradient[rows], None, Target(goal[rows], goal[rows]), options)
        part.z += outcome.z[rows]
        before = torch.linalg.vector_norm(residual[rows], dim=1)
        residual[rows] -= op.map.apply(part.z - outcome.z[rows])
        after = torch.linalg.vector_norm(residual[rows], dim=1)
        outcome.extend(rows, part)
        gradient = adjoint.apply(residual)
        still = []
        for i, row in enumerate(rows.tolist()):
            if after[i] <= target.norm[row]:
                outcome.status[row] = "converged"
            elif part.status[i] == "converged" and after[i] > 0.99 * before[i]:
                outcome.status[row] = "inconsistent"
            elif part.status[i] == "converged":
                still.append(row)
        rows = torch.tensor(still, dtype=torch.long, device=z.device)
        goal = goal / 10
        if not still:
            break
    return outcome


def solve_normal_equations(
    op: ConvBNOperator, rhs: Tensor, *, outputs: bool, precondition: bool, rtol: float
) -> Outcome:
    """(A Aᵀ) u = rhs (outputs) or (Aᵀ A) w = rhs, float64, to ‖residual‖ ≤ rtol·‖rhs‖; for the adjoint of ``lsq``."""
    norm = torch.linalg.vector_norm(rhs, dim=1)
    options = KrylovOptions(torch.float64)
    M = autocorrelation_inverse(op, outputs) if precondition else None
    if not outputs:
        system = Preconditioned(rhs.new_ones(op.shape[1]), _normal_map(op.map, outputs), M, op.shape[1])
        return gmres(system, rhs, None, Target(rtol * norm, norm), options)
    left = op.channel_vector(1 / op.scale)  # A Aᵀ u = Γ (W Wᵀ) (Γ u)
    system = Preconditioned(left, _normal_map(op.conv_map, outputs), M, op.shape[0])
    outcome = gmres(system, rhs, None, Target(rtol * norm, norm), options)
    outcome.z *= left
    return outcome


def _normal_map(linear_map: _C.LinearMap, outputs: bool) -> _C.LinearMap:
    adjoint = _C.AdjointMap(linear_map)
    return _C.ComposedMap(linear_map, adjoint) if outputs else _C.ComposedMap(adjoint, linear_map)
