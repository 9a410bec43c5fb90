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
    """LU with float64 residuals, and GMRES steps on it where refinement alone is slow."""
    assert choice.layout is not None
    factor = cached_factor(op, choice.layout)
    if factor is None:
        which = "circulant" if op.has_symbol and op.input_shape == op.output_shape else "row"
        instead = Choice("gmres", which, "")
        if transpose:
            result = run_transpose(op, instead, rhs, target, options)
        else:
            result = run(op, instead, which, rhs, z0, target, options)
        return _with_note(result, f"a pivot block is singular: GMRES, preconditioner {which}, instead", singular=False)
    left = op.channel_vector(1 / op.scale)
    system = Preconditioned(left, op.conv_map, factor, min(op.shape[1], _STEPS_ON_LU))
    options = replace(options, dtype=torch.float64)
    if not transpose:
        return refine(op.map, system, rhs, z0, target, options)
    system = system.transpose()
    result = refine(system.matrix, system, rhs, None, target, options)
    result.z *= left
    return result
