"""Carry out a choice of method: prepare what it needs and call it, for A or for its transpose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import _C
from .choice import Choice
from .direct import cached_factor
from .least_squares import least_squares
from .methods import KrylovOptions, Outcome, Target, gmres, refine
from .operator import ConvBNOperator
from .preconditioners import Correction, Preconditioned, precondition

_STEPS_ON_LU = 50  # GMRES steps per cycle with an LU factor as preconditioner


def solve_at_once(op: ConvBNOperator, choice: Choice, x: Tensor, rtol: float, atol: float) -> _C.BlockSolution | None:
    """Blocks of rows on a CPU in one call, from x to rounded z with its true residual; None where there are none."""
    if choice.method != "direct" or choice.layout is None:
        return None
    factor = cached_factor(op, choice.layout)
    if not isinstance(factor.map, _C.BlockLU) or factor.note:
        return None
    return factor.map.solve(x.detach().flatten(1), op.scale, op.offset, rtol, atol)


def run(
    op: ConvBNOperator,
    choice: Choice,
    preconditioner: str | Correction,
    rhs: Tensor,
    z0: Tensor | None,
    target: Target,
    options: KrylovOptions,
) -> Outcome:
    """Solve A z = rhs as chosen; arguments as for ``gmres``."""
    if choice.method == "lsq":
        return least_squares(op, rhs, z0, target, options, choice.preconditioner == "circulant")
    if choice.method == "direct":
        return _direct(op, choice, rhs, z0, target, options, transpose=False)
    which = preconditioner if callable(preconditioner) else choice.preconditioner
    system, options = _system(op, choice.method, which, options)
    if choice.method in ("gmres", "block_gmres"):
        result = gmres(system, rhs, z0, target, replace(options, block=choice.method == "block_gmres"))
    else:
        result = refine(op.map, system, rhs, z0, target, options)
    return _with_note(result, system.note, singular=choice.method == "fft")


def run_transpose(
    op: ConvBNOperator,
    choice: Choice,
    preconditioner: str | Correction,
    rhs: Tensor,
    target: Target,
    options: KrylovOptions,
) -> Outcome:
    """Solve Aᵀ λ = rhs for a square operator with the transposed preconditioner or the same factor."""
    if choice.method == "direct":
        return _direct(op, choice, rhs, None, target, options, transpose=True)
    which = preconditioner if callable(preconditioner) else choice.preconditioner
    system, options = _system(op, choice.method, which, options)
    left, system = system.left, system.transpose()
    if choice.method in ("gmres", "block_gmres"):
        result = gmres(system, rhs, None, target, replace(options, block=choice.method == "block_gmres"))
    else:
        result = refine(system.matrix, system, rhs, None, target, options)
    result.z *= left
    return _with_note(result, system.note, singular=choice.method == "fft")


def _system(
    op: ConvBNOperator, method: str, which: str | Correction, options: KrylovOptions
) -> tuple[Preconditioned, KrylovOptions]:
    if method == "fft":
        return precondition(op, "circulant", torch.float64), replace(options, dtype=torch.float64)
    return precondition(op, which, options.dtype), options


def _with_note(result: Outcome, note: str, singular: bool) -> Outcome:
    """Pass the preconditioner's note on; where it is exact, a singular symbol means a singular layer."""
    if note and singular:
        result.status = [s if s == "converged" else "singular" for s in result.status]
    result.note = "; ".join(filter(None, [note, result.note]))
    return result


def _direct(
    op: ConvBNOperator,
    choice: Choice,
    rhs: Tensor,
    z0: Tensor | None,
    target: Target,
    options: KrylovOptions,
    transpose: bool,
) -> Outcome:
    """LU with float64 residuals, GMRES steps on it where refinement is slow, and without it where it is of no use."""
    assert choice.layout is not None
    factor = cached_factor(op, choice.layout)
    result, notes = Outcome.unsolved(rhs, op.shape[1], "breakdown"), ["a pivot block is singular"]
    settled = torch.zeros(len(rhs), dtype=torch.bool, device="cpu")  # as well as rounding allows
    if factor.map is not None:
        left = op.channel_vector(1 / op.scale)
        system = Preconditioned(left, op.conv_map, factor.map, min(op.shape[1], _STEPS_ON_LU))
        exact = replace(options, dtype=torch.float64)
        if transpose:
            system = system.transpose()
            result = refine(system.matrix, system, rhs, None, target, exact)
        else:
            result = refine(op.map, system, rhs, z0, target, exact)
        missed = torch.tensor([status != "converged" for status in result.status], dtype=torch.bool, device="cpu")
        if missed.any():
            settled[missed] = _limited_by_rounding(system, rhs[missed], result.z[missed], float(op.weight.norm()))
        notes = [factor.note, result.note]
        if transpose:
            result.z *= left
    failed = [i for i, status in enumerate(result.status) if status != "converged"]
    rows = torch.tensor([i for i in failed if not settled[i]], dtype=torch.long, device=rhs.device)
    if len(rows) < len(failed):
        notes.append("z is so large that its rounding in float64 alone exceeds the tolerance")
    if len(rows):
        which = "circulant" if op.has_symbol and op.input_shape == op.output_shape else "row"
        instead = Choice("block_gmres" if len(rows) > 1 else "gmres", which, "")
        if transpose:
            part = run_transpose(op, instead, which, rhs[rows], target[rows], options)
        else:
            part = run(op, instead, which, rhs[rows], z0 if z0 is None else z0[rows], target[rows], options)
        result.extend(rows, part)
        notes += [f"the factor is of no use: {instead.method}, preconditioner {which}, instead", part.note]
    result.note = "; ".join(filter(None, notes))
    return result


def _limited_by_rounding(system: Preconditioned, rhs: Tensor, z: Tensor, norm: float) -> Tensor:
    """Rows (B,) whose residual is that of a rounded z, ~ eps·‖W‖·‖z‖, and whose z another step would not change.

    No method can go below that. A z that does change is large by accident (W is numerically singular), and a smaller
    one may exist.
    """
    residual = system.left * rhs - system.matrix.apply(z)
    assert system.right is not None
    size, rest, step = (torch.linalg.vector_norm(v, dim=1) for v in (z, residual, system.right.apply(residual)))
    return ((rest <= 16 * torch.finfo(z.dtype).eps * norm * size) & (step <= 1e-2 * size)).cpu()
