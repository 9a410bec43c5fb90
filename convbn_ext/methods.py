"""The methods behind ``solve``: each takes right-hand sides in rows and returns an Outcome, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from . import _C
from .preconditioners import Preconditioned

BASIS_BYTES = 1 << 30  # ceiling for the Krylov basis; larger batches are solved in parts
_GAIN = 4.0  # refinement steps that gain less are left to GMRES


@dataclass
class Outcome:
    """Results of B systems.

    Attributes:
        z: (B, n) float64.
        status: per row; "converged" here means that the method met its own target.
        iterations: (B,) Arnoldi steps.
        history: per row, relative residuals from the start on.
        note: what the caller should know, or "".
    """

    z: Tensor
    status: list[str]
    iterations: Tensor
    history: list[Tensor]
    note: str = ""

    @classmethod
    def unsolved(cls, like: Tensor, n: int, status: str) -> Outcome:
        """NaN for every row of ``like``."""
        B = len(like)
        return cls(
            like.new_full((B, n), math.nan),
            [status] * B,
            torch.zeros(B, dtype=torch.long, device="cpu"),
            [torch.empty(0, dtype=like.dtype, device="cpu")] * B,
        )

    def put(self, rows: Tensor, part: Outcome) -> None:
        """Take over the results of some rows."""
        self.z[rows] = part.z
        self.iterations[rows.cpu()] = part.iterations
        for i, row in enumerate(rows.tolist()):
            self.status[row], self.history[row] = part.status[i], part.history[i]
        self.note = part.note

    def extend(self, rows: Tensor, part: Outcome) -> None:
        """Take over what some rows became when they were continued from here."""
        past = [self.history[row] for row in rows.tolist()]
        part.iterations = part.iterations + self.iterations[rows.cpu()]
        part.history = [torch.cat([old, new[min(len(old), 1) :]]) for old, new in zip(past, part.history, strict=True)]
        self.put(rows, part)


class Histories(Sequence[Tensor]):
    """Histories of B rows, cut from a table (B, most steps + 1) when they are asked for."""

    def __init__(self, table: Tensor, steps: Tensor) -> None:
        self._table, self._steps = table, steps

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._table[index, : int(self._steps[index]) + 1]


@dataclass(frozen=True)
class Target:
    """Where a row counts as solved: ‖r‖ ≤ norm (B,), with relative residuals measured against scale (B,)."""

    norm: Tensor
    scale: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Target:
        return Target(self.norm[rows], self.scale[rows])


@dataclass(frozen=True)
class KrylovOptions:
    """restart and maxiter as in ``solve``; dtype of the Arnoldi vectors; on_step gets rows and relative residuals.

    With ``block`` all rows share one Krylov space, an iteration is a block step, and restart bounds the dimension.
    """

    dtype: torch.dtype
    restart: int | None = None
    maxiter: int | None = None
    on_step: Callable[[slice | Tensor, Tensor], None] | None = None
    block: bool = False


def gmres(system: Preconditioned, rhs: Tensor, z0: Tensor | None, target: Target, options: KrylovOptions) -> Outcome:
    """Solve A z = rhs by right-preconditioned GMRES in cycles, with float64 residuals between them.

    Each row is divided by its target, so that "solved" is ‖residual‖ ≤ 1 for all of them and a row's path does not
    depend on the others. Where M may differ from call to call: FGMRES, with twice the basis.

    A cycle may be twice as long as the steps that exact arithmetic needs (the basis grows as it is used); the batch is
    cut so that these fit in BASIS_BYTES, and where they do not fit even for one row, the note says so.

    Args:
        system: L A and M.
        rhs: (B, m) float64.
        z0: (B, n) float64 or None.
        target: for ‖rhs − A z‖.
        options: cycle length and limits.
    """
    B, n = rhs.shape
    expected = min(n, system.steps + 2 * B if options.block else system.steps)  # a block needs rank + 2 B dimensions
    restart = min(options.restart or 2 * expected, n)
    maxiter = options.maxiter or max(2 * n, 100)
    vector_bytes = n * options.dtype.itemsize * (2 if system.flexible else 1)
    part = B if options.block else max(1, min(B, BASIS_BYTES // ((min(restart, expected) + 1) * vector_bytes)))
    unit = target.norm * system.left.abs().min()  # ‖L r‖ ≤ unit implies ‖r‖ ≤ target
    unit = torch.where(unit > 0, unit, 1)[:, None]
    to_relative = target.norm / torch.where(target.scale > 0, target.scale, 1)
    result = Outcome.unsolved(rhs, n, "maxiter")
    notes = []
    for first in range(0, B, part):
        rows = slice(first, first + part)
        factor = to_relative[rows].cpu()

        def report(norms: Tensor, _: object, rows: slice = rows, factor: Tensor = factor) -> None:
            assert options.on_step is not None
            options.on_step(rows, norms * factor)

        solved = (_C.block_gmres if options.block else _C.gmres)(
            system.matrix,
            rhs[rows] * system.left / unit[rows],
            None if z0 is None else z0[rows] / unit[rows],
            system.right,
            rtol=0.0,
            atol=1.0,
            restart=restart,
            maxiter=maxiter,
            max_basis_bytes=max(BASIS_BYTES, 3 * vector_bytes),
            flexible=system.flexible,
            inner_dtype=options.dtype,
            on_step=report if options.on_step else None,
        )
        index = torch.arange(B, device="cpu")[rows]
        history = [
            torch.tensor(h, dtype=torch.float64, device="cpu") * f for h, f in zip(solved.history, factor, strict=True)
        ]
        iterations = torch.tensor(solved.iterations, dtype=torch.long, device="cpu")
        result.put(index, Outcome(solved.x * unit[rows], solved.status, iterations, history))
        if solved.basis_limited and solved.restart < min(restart, expected):
            notes.append(
                f"the basis is limited to {BASIS_BYTES >> 20} MiB, so restart is {solved.restart}, below the "
                f"{expected} steps that convergence may need"
            )
    if options.restart is not None and options.restart < expected:
        notes.append(f"restart {options.restart} is below the {expected} steps that convergence may need")
    result.note = "; ".join(dict.fromkeys(notes))
    return result


def refine(
    A: _C.LinearMap, system: Preconditioned, rhs: Tensor, z0: Tensor | None, target: Target, options: KrylovOptions
) -> Outcome:
    """Solve A z = rhs with an M ≈ (L A)⁻¹ so good that z ← z + M L (rhs − A z) converges; GMRES where it does not.

    Residuals are float64, M works in options.dtype. A row stays while each step gains a factor _GAIN, and goes on with
    a few GMRES steps from the best z it had otherwise. A step counts as an iteration.
    """
    B, n = rhs.shape
    M = system.right
    assert M is not None
    z = rhs.new_zeros(B, n) if z0 is None else z0.clone()
    residual = rhs.clone() if z0 is None else rhs - A.apply(z)
    norm = torch.linalg.vector_norm(residual, dim=1)
    scale = torch.where(target.scale > 0, target.scale, 1)
    history = [[v] for v in (norm / scale).tolist()]
    active = (norm > target.norm).nonzero().flatten()
    slow: list[Tensor] = []
    while len(active):
        part = active if len(active) < B else slice(None)  # no copies while every row is active
        unit = norm[part, None]  # rows of norm one: the scale of x must not matter in float32
        step = M.apply((system.left * residual[part] / unit).to(options.dtype)).to(rhs.dtype) * unit
        new_z = z[part] + step
        new_residual = rhs[part] - A.apply(new_z)
        new_norm = torch.linalg.vector_norm(new_residual, dim=1)
        better = new_norm < norm[part]
        fast = new_norm * _GAIN < norm[part]
        if len(active) == B and bool(better.all()):
            z, residual, norm = new_z, new_residual, new_norm
        else:
            kept = active[better]
            z[kept], residual[kept], norm[kept] = new_z[better], new_residual[better], new_norm[better]
        for row, value in zip(active.tolist(), (norm / scale)[active].tolist(), strict=True):
            history[row].append(value)
        if options.on_step is not None:
            options.on_step(slice(0, B), (norm / scale).cpu())
        open_rows = norm[active] > target.norm[active]
        slow.append(active[open_rows & ~fast])
        active = active[open_rows & fast]

    status = ["converged"] * B
    iterations = torch.tensor([len(h) - 1 for h in history], dtype=torch.long, device="cpu")
    result = Outcome(z, status, iterations, [torch.tensor(h, dtype=torch.float64, device="cpu") for h in history])
    rest = torch.cat(slow) if slow else active
    if len(rest):
        rest = rest.sort().values
        on_step = options.on_step
        part = None if on_step is None else (lambda rows, relative: on_step(rest[rows], relative))  # type: ignore[misc]
        more = gmres(system, rhs[rest], z[rest], target[rest], replace(options, on_step=part))
        result.extend(rest, more)
    return result
