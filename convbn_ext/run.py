"""Carry out a choice of method: prepare what it needs and call it, for A or for its transpose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .choice import Choice
from .direct import cached_factor
from .least_squares import least_squares
from .methods import KrylovOptions, Outcome, Target, gmres, refine
from .operator import ConvBNOperator
from .preconditioners import Correction, Preconditioned, precondition

_STEPS_ON_LU = 50  # GMRES steps per cycle with an LU factor as preconditioner


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
    if choice.method == "gmres":
        result = gmres(system, rhs, z0, target, options)
    else:
        result = refine(op.map, system, rhs, z0, target, options)
    return _with_note(result, system.note, singular=choice.method == "fft")


def run_transpose(op: ConvBNOperator, choice: Choice, rhs: Tensor, target: Target, options: KrylovOptions) -> Outcome:
    """Solve Aᵀ λ = rhs for a square operator with the transposed preconditioner or the same factor."""
    if choice.method == "direct":
        return _direct(op, choice, rhs, None, target, options, transpose=True)
    system, options = _system(op, choice.method, choice.preconditioner, options)
    left, system = system.left, system.transpose()
    if choice.method == "gmres":
        result = gmres(system, rhs, None, target, options)
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
    """LU in float32 with float64 residuals; what that cannot settle goes on with a factor in float64."""
    assert choice.layout is not None
    left, singular = op.channel_vector(1 / op.scale), False
    result = Outcome.unsolved(rhs, op.shape[1], "stagnation")
    rows = torch.arange(len(rhs), device=rhs.device)
    for dtype in (torch.float32, torch.float64):
        factor = cached_factor(op, choice.layout, dtype)
        if factor is None:
            singular = True
            continue
        system = Preconditioned(left, op.conv_map, factor, min(op.shape[1], _STEPS_ON_LU))
        if transpose:
            system = system.transpose()
        start = z0 if z0 is None else z0[rows]
        residual_map = system.matrix if transpose else op.map
        part = refine(residual_map, system, rhs[rows], start, target[rows], replace(options, dtype=dtype))
        result.extend(rows, part)
        open_rows = [i for i in rows.tolist() if result.status[i] != "converged"]
        if not open_rows:
            break
        rows, z0 = torch.tensor(open_rows, device=rhs.device), result.z
    if transpose:
        result.z *= left
    if singular:
        result.note = f"a pivot block of the {choice.layout} is singular"
    return result
