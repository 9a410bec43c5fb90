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
    """The direct method on a CPU as one call, from x to rounded z with its true residual; None where there is none."""
    factor = cached_factor(op, choice.layout) if choice.method == "direct" and choice.layout is not None else None
    if not isinstance(factor, _C.BlockLU):
        return None
    return factor.solve(x.detach().flatten(1), op.scale, op.offset, rtol, atol)


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


def run_transpose(op: ConvBNOperator, choice: Choice, rhs: Tensor, target: Target, options: KrylovOptions) -> Outcome:
    """Solve Aᵀ λ = rhs for a square operator with the transposed preconditioner or the same factor."""
    if choice.method == "direct":
        return _direct(op, choice, rhs, None, target, options, transpose=True)
    system, options = _system(op, choice.method, choice.preconditioner, options)
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
    result, note = Outcome.unsolved(rhs, op.shape[1], "breakdown"), "a pivot block is singular"
    if factor is not None:
        left = op.channel_vector(1 / op.scale)
        system = Preconditioned(left, op.conv_map, factor, min(op.shape[1], _STEPS_ON_LU))
        exact = replace(options, dtype=torch.float64)
        if transpose:
            system = system.transpose()
            result = refine(system.matrix, system, rhs, None, target, exact)
            result.z *= left
        else:
            result = refine(op.map, system, rhs, z0, target, exact)
        note = "the LU factor is too inaccurate"
    failed = [i for i, status in enumerate(result.status) if status != "converged"]
    if failed:
        rows = torch.tensor(failed, device=rhs.device)
        which = "circulant" if op.has_symbol and op.input_shape == op.output_shape else "row"
        instead = Choice("block_gmres" if len(failed) > 1 else "gmres", which, "")
        if transpose:
            part = run_transpose(op, instead, rhs[rows], target[rows], options)
        else:
            part = run(op, instead, which, rhs[rows], z0 if z0 is None else z0[rows], target[rows], options)
        result.extend(rows, part)
        result.note = "; ".join(filter(None, [f"{note}: {instead.method}, preconditioner {which}, instead", part.note]))
    return result
