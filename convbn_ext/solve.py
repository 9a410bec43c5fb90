"""Solve x = BN(Conv(z)) for z: which method, how far, and what came of it, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .batch_statistics import LiveStatistics, forward_live, live_statistics
from .choice import Choice, choose
from .geometry import Geometry
from .methods import Histories, KrylovOptions, Outcome, Target
from .operator import ConvBNOperator, Stats
from .preconditioners import Correction
from .progress import Progress
from .run import run, solve_at_once

METHODS = ("auto", "fft", "direct", "gmres", "block_gmres", "lsq")
PRECONDITIONERS = ("auto", "circulant", "row", "none")


@dataclass(frozen=True)
class SolveResult:
    """What ``solve`` found.

    Attributes:
        z: (N, C_in, *spatial); NaN in samples that are nonfinite or singular.
        status: per sample, one of converged, maxiter, stagnation, breakdown, singular, inconsistent, nonfinite.
        iterations: (N,) Arnoldi steps; a block step, or a refinement step of a direct method, counts as one.
        residual: (N,) float64, ‖x − BN(Conv(z))‖₂ / ‖x‖₂ of the z returned, computed in float64 (error3 of spec S13;
            for x = 0 relative to ‖BN(Conv(0))‖).
        history: per sample, the relative residual before the first step and after each step, as the method sees it: an
            upper bound where γ/√(σ² + ε) differs from channel to channel.
        method: the method used.
        preconditioner: the preconditioner used.
        reason: why these, and what the caller should know.
    """

    z: Tensor = field(repr=False)
    status: list[str]
    iterations: Tensor
    residual: Tensor
    history: Sequence[Tensor] = field(repr=False)
    method: str
    preconditioner: str
    reason: str
    operator: ConvBNOperator = field(repr=False)

    def _with_rows(self, rows: Tensor, other: SolveResult) -> SolveResult:
        """This result with some rows from another one."""
        status, history = list(self.status), list(self.history)
        for i, row in enumerate(rows.tolist()):
            status[row], history[row] = other.status[i], other.history[i]
        parts = {
            name: getattr(self, name).index_copy(0, rows, getattr(other, name))
            for name in ("z", "iterations", "residual")
        }
        return replace(self, status=status, history=history, reason=other.reason, **parts)

    @property
    def converged(self) -> bool:
        """Whether every sample converged."""
        return all(status == "converged" for status in self.status)

    @cached_property
    def cond(self) -> float:
        """Condition estimate of the layer from its symbol (computed when asked for); NaN where it has none."""
        try:
            return self.operator.symbol_cond()
        except ValueError:
            return math.nan


def solve(
    conv: Any,
    bn: Any,
    x: Tensor,
    *,
    method: str = "auto",
    preconditioner: str | Correction = "auto",
    stats: Stats = "running",
    rtol: float = 1e-6,
    atol: float = 0.0,
    restart: int | None = None,
    maxiter: int | None = None,
    x0: Tensor | None = None,
    callback: Callable[[Tensor], None] | None = None,
    progress: bool = False,
    input_shape: Sequence[int] | None = None,
) -> SolveResult:
    """Find z with BN(Conv(z)) = x, for every sample of a batch on its own.

    With frozen statistics the layer is A z + b̂ (spec S9). With ``stats="batch"`` x is a training-mode output: the
    variance follows from x, the mean is taken from bn, and all samples are inconsistent when no z can produce x (S12).
    A sample is converged when ‖x − BN(Conv(z))‖₂ ≤ max(rtol·‖x‖₂, atol) holds in float64 for the z that is returned. A
    float32 layer is solved with float32 Krylov vectors and float64 residuals; factors and FFTs are float64.

    Args:
        conv: nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear.
        bn: the batch normalisation behind it; its mode (train or eval) does not matter.
        x: (N, C_out, *out), float32 or float64, with the dtype and device of conv.
        method: "fft" (circular padding), "direct" (LU), "gmres", "block_gmres" (one Krylov space for the batch), "lsq"
            (least squares or minimum norm, for any stride and number of channels), or "auto", which takes the cheapest
            and says why.
        preconditioner: for GMRES: "auto", "circulant", "row", "none", or a callable that maps residuals (B, C_out,
            *out) to corrections (B, C_in, *spatial); it may be nonlinear and change from call to call (FGMRES).
        stats: "running", (mean, var), each (C_out,), or "batch".
        rtol: relative tolerance.
        atol: absolute tolerance.
        restart: Arnoldi steps per cycle; by default enough for convergence in one cycle, as far as memory allows.
        maxiter: most Arnoldi steps per sample; by default 2n.
        x0: (N, C_in, *spatial) to start from; not changed.
        callback: called after each Arnoldi step with the relative residuals (N,), as in ``history``.
        progress: show residual and rate on standard error.
        input_shape: (C_in, *spatial) of z, where a stride leaves it open.

    Returns:
        A SolveResult.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range or does not fit the layer.
    """
    _check_options(method, preconditioner, rtol, atol, restart, maxiter)
    shape = _checked_tensors(conv, x, x0, input_shape)
    live: LiveStatistics | None = None
    if isinstance(stats, str) and stats == "batch":  # the statistics are those of all samples
        live = live_statistics(bn, x.detach() if x.isfinite().all() else torch.zeros_like(x), rtol)
        stats = (live.mean, live.var)
    op = _operator(conv, bn, x, stats, shape)
    choice = choose(op, len(x), method, preconditioner if isinstance(preconditioner, str) else "callable")

    def in_steps(x: Tensor) -> SolveResult:
        options = (preconditioner, rtol, atol, restart, maxiter, x0, callback, progress)
        return _solve_in_steps(conv, bn, x, op, choice, live, *options)

    if live is not None or x0 is not None or callback is not None or progress or op.singular_channels:
        return in_steps(x)
    at_once = solve_at_once(op, choice, x, rtol, atol)
    if at_once is None:
        return in_steps(x)
    result = SolveResult(
        z=at_once.z.reshape(-1, *op.input_shape),
        status=["converged"] * len(x),
        iterations=at_once.steps,
        residual=at_once.residual,
        history=Histories(at_once.history, at_once.steps),
        method=choice.method,
        preconditioner=choice.preconditioner,
        reason=choice.reason,
        operator=op,
    )
    if at_once.all_met:
        return result
    rows = (~at_once.met).nonzero().flatten()
    return result._with_rows(rows, in_steps(x[rows]))


def _solve_in_steps(
    conv: Any,
    bn: Any,
    x: Tensor,
    op: ConvBNOperator,
    choice: Choice,
    live: LiveStatistics | None,
    preconditioner: str | Correction,
    rtol: float,
    atol: float,
    restart: int | None,
    maxiter: int | None,
    x0: Tensor | None,
    callback: Callable[[Tensor], None] | None,
    progress: bool,
) -> SolveResult:
    """``solve`` as a sequence of steps over whole batches, for every method."""
    rows = x.flatten(1).isfinite().all(1).nonzero().flatten()
    if live is not None and len(rows) < len(x):
        rows = rows[:0]
    given = x.detach().double().flatten(1)
    rhs = given - op.channel_vector(op.offset)
    scale = torch.linalg.vector_norm(given, dim=1)
    scale = torch.where(scale > 0, scale, torch.linalg.vector_norm(rhs, dim=1))  # x = 0
    target = Target((rtol * scale).clamp_min(atol), scale)
    outcome = Outcome.unsolved(rhs, op.shape[1], "nonfinite")
    if op.singular_channels:
        outcome.put(rows, Outcome.unsolved(rhs[rows], op.shape[1], "singular"))
        reason = f"γ = 0 in channels {op.singular_channels}: x says nothing about z there"
    else:
        z0 = None if x0 is None else x0.detach().double().flatten(1)[rows]
        # the rest of the tolerance is left for rounding z to float32, and for statistics taken anew
        margin = 0.25 if x.dtype == torch.float32 or live else 1.0
        with Progress("solve", progress) as bar:
            on_step = _reporter(callback, bar, rows, len(x)) if callback or progress else None
            options = KrylovOptions(x.dtype, restart, maxiter, on_step)
            goal = Target(margin * target.norm, target.scale)[rows]
            outcome.put(rows, run(op, choice, preconditioner, rhs[rows], z0, goal, options))
        reason = "; ".join(filter(None, [choice.reason, outcome.note]))

    # z is rounded to the layer's dtype, and the residual of that z has the last word on each status
    z = outcome.z.to(x.dtype)
    if live is None:
        residual = rhs - op.map.apply(z.double())
    else:
        again, var = forward_live(z.reshape(-1, *op.input_shape), conv, bn)
        residual = given - again.flatten(1)
        expected = live.var.detach()
        reason += f"; var(Conv(z)) is σ² to {float(((var - expected) / expected.clamp_min(bn.eps)).abs().max()):.0e}"
    norms = torch.linalg.vector_norm(residual, dim=1)
    met = (norms <= target.norm).tolist()
    status = ["converged" if m else s for m, s in zip(met, outcome.status, strict=True)]
    missed = [s == "converged" and not m for m, s in zip(met, status, strict=True)]
    if live is not None and (live.inconsistent or any(missed)):
        status = ["inconsistent" if s == "converged" else s for s in status]
        worst = [f"channel {c}" for c in _worst_channels(residual, len(x), op.output_shape[0])]
        reason += "; no z gives this x in training mode: " + ", ".join(live.inconsistent.values() or worst)
    elif any(missed):
        status = ["stagnation" if m else s for m, s in zip(missed, status, strict=True)]
        hint = ": try float64" if x.dtype == torch.float32 else ""
        reason += f"; rounding in {str(x.dtype).removeprefix('torch.')} alone exceeds the tolerance{hint}"
    return SolveResult(
        z=z.reshape(-1, *op.input_shape),
        status=status,
        iterations=outcome.iterations,
        residual=norms / torch.where(target.scale > 0, target.scale, 1),
        history=outcome.history,
        method=choice.method,
        preconditioner=choice.preconditioner,
        reason=reason,
        operator=op,
    )


def _worst_channels(residual: Tensor, N: int, C: int) -> list[int]:
    """Channels that hold most of the residual."""
    per_channel = residual.reshape(N, C, -1).square().sum((0, 2))
    return (per_channel >= 0.1 * per_channel.max()).nonzero().flatten().tolist()


def _reporter(
    callback: Callable[[Tensor], None] | None, bar: Progress, rows: Tensor, N: int
) -> Callable[[slice | Tensor, Tensor], None]:
    """Spread the residuals of a part of the batch over all N samples, for the callback and the bar."""
    current = torch.full((N,), math.nan, dtype=torch.float64, device="cpu")
    rows = rows.cpu()

    def on_step(part: slice | Tensor, relative: Tensor) -> None:
        current[rows[part]] = relative
        bar.step(float(relative.max()))
        if callback is not None:
            callback(current.clone())

    return on_step


def _check_options(
    method: str, preconditioner: str | Correction, rtol: float, atol: float, restart: int | None, maxiter: int | None
) -> None:
    if method not in METHODS:
        raise ValueError(f"solve: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not callable(preconditioner) and preconditioner not in PRECONDITIONERS:
        raise ValueError(
            f"solve: preconditioner must be one of {', '.join(PRECONDITIONERS)} or a callable, got {preconditioner!r}"
        )
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (0 <= value < math.inf):
            raise ValueError(f"solve: {name} must be finite and not negative, got {value}")
    if rtol == 0 and atol == 0:
        raise ValueError("solve: rtol and atol must not both be zero: no rounded z is exact")
    for name, count in (("restart", restart), ("maxiter", maxiter)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"solve: {name} must be a positive int or None, got {count!r}")


def _checked_tensors(conv: Any, x: Tensor, x0: Tensor | None, input_shape: Sequence[int] | None) -> tuple[int, ...]:
    """Shape (C_in, *spatial) of z, after all checks that need no statistics."""
    geometry = Geometry.of(conv, "solve")
    weight: Tensor = conv.weight
    axes, c_in = len(geometry.kernel), weight.shape[1] * geometry.groups
    if not isinstance(x, Tensor):
        raise TypeError(f"solve: x must be a torch.Tensor, got {type(x).__name__}")
    expected = f"(N, {weight.shape[0]}{''.join(f', S{i + 1}' for i in range(axes))})"
    if x.dim() != axes + 2 or x.shape[1] != weight.shape[0] or x.numel() == 0:
        raise ValueError(f"solve: x must have shape {expected} with N ≥ 1, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"solve: x must be float32 or float64, got {x.dtype}")
    for name, tensor in (("conv.weight", weight), ("x0", x0)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise TypeError(
                f"solve: {name} must have the dtype and device of x, {x.dtype} on {x.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if not math.isfinite(float(weight.detach().abs().max())):
        raise ValueError("solve: conv.weight is not finite")
    shape = tuple(input_shape) if input_shape is not None else (c_in, *geometry.input_size(x.shape[2:]))
    if input_shape is None and x0 is not None:
        shape = tuple(x0.shape[1:])
    if min(shape) < 1:
        raise ValueError(f"solve: x {tuple(x.shape)} is no output of this layer: z would have shape {shape}")
    if x0 is not None and tuple(x0.shape) != (len(x), *shape):
        raise ValueError(f"solve: x0 must have shape {(len(x), *shape)}, got {tuple(x0.shape)}")
    if x0 is not None and not x0.isfinite().all():
        raise ValueError("solve: x0 is not finite")
    return shape


def _operator(conv: Any, bn: Any, x: Tensor, stats: Stats, shape: tuple[int, ...]) -> ConvBNOperator:
    """The operator whose output is x."""
    op = ConvBNOperator(conv, bn, shape, stats=stats)
    if op.output_shape != tuple(x.shape[1:]):
        raise ValueError(
            f"solve: z of shape {op.input_shape} gives x of shape (N, {', '.join(map(str, op.output_shape))}), "
            f"got {tuple(x.shape)}"
        )
    if not all(map(math.isfinite, op.offset.tolist() + op.scale.tolist())):
        raise ValueError("solve: a parameter of bn or the bias of conv is not finite")
    return op
