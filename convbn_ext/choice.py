"""Which method solves a layer: an explicit cost model, and the reason in words.

Costs are seconds on an ordinary machine. Their ratios matter, not their values:

    blocks   factor_flops / GEMM + groups · GROUP + B · (one step: 4 R m² flops / GEMM) · refinements
    border   2/3 b³ flops / GEMM + b² · ASSEMBLE + B · (one step: two circulant maps and 2 b² flops)
    krylov   s · work of A and M + 4 s² n flops / GEMM + s / B · CALL,  s = border rank + 2 B vectors of a block method
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from . import direct
from .border import BorderLayout
from .direct import CALL, FACTOR_BYTES, FOURIER, GEMM, Layout, best_layouts, direct_seconds, fourier_flops
from .operator import ConvBNOperator
from .preconditioners import border_rank


@dataclass(frozen=True)
class Choice:
    """A method, its preconditioner, the layout of its factor and why."""

    method: str
    preconditioner: str
    reason: str
    layout: Layout | BorderLayout | None = None


def _krylov_seconds(op: ConvBNOperator, batch: int) -> float:
    n = op.shape[1]
    dimension = min(n, (border_rank(op) if op.has_symbol else n) + 2 * batch)
    taps = op.weight[0].numel()
    work = n * 2 * taps / GEMM + fourier_flops(op) / FOURIER
    return dimension * work + 4.0 * dimension**2 * n / GEMM + dimension / batch * CALL


_MOST_KNOWN = 64
_known: dict[Hashable, Choice] = {}


def choose(op: ConvBNOperator, batch: int, method: str, preconditioner: str) -> Choice:
    """Decide what was left to "auto"; remembered, as it depends on shapes alone.

    Raises:
        ValueError: the method asked for cannot work on this layer.
    """
    key = (op.geometry, op.input_shape, op.weight.shape, batch, method, preconditioner, direct.FACTOR_BYTES)
    known = _known.get(key)
    if known is None:
        known = _choose(op, batch, method, preconditioner)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = known
    return known


def _choose(op: ConvBNOperator, batch: int, method: str, preconditioner: str) -> Choice:
    square, symbol = op.shape[0] == op.shape[1], op.has_symbol and op.input_shape == op.output_shape
    sizes = f"{op.input_shape} -> {op.output_shape}"
    if method in ("fft", "direct", "gmres", "block_gmres") and not square:
        raise ValueError(f"solve: method {method} needs as many outputs as inputs, got {sizes}")
    exact = symbol and (op.geometry.mode == "circular" or border_rank(op) == 0)
    if method == "fft" and not exact:
        raise ValueError(f"solve: method fft needs circular padding, stride 1 and C_in = C_out, got {op}")
    if method in ("fft", "direct") and preconditioner != "auto":
        raise ValueError(f"solve: method {method} takes no preconditioner, got {preconditioner!r}")
    if method == "fft" or (method == "auto" and preconditioner == "auto" and exact):
        return Choice("fft", "fft", "circular padding: one C × C solve per frequency is exact")
    if method == "lsq" or (method == "auto" and not square):
        if preconditioner not in ("auto", "circulant", "none"):
            raise ValueError(f"solve: method lsq takes the preconditioners circulant and none, got {preconditioner!r}")
        kind = "least squares" if op.shape[0] > op.shape[1] else "minimum norm"
        name = "circulant" if preconditioner == "auto" else preconditioner
        return Choice("lsq", name, f"{kind}, {op.shape[0]} equations for {op.shape[1]} unknowns")
    layout = next(iter(best_layouts(op, batch)), None)
    if method == "direct":
        if layout is None:
            raise ValueError(
                f"solve: method direct needs a factor of at most {FACTOR_BYTES >> 20} MiB, this layer more"
            )
        return Choice("direct", "lu", str(layout), layout)
    if preconditioner == "auto":
        preconditioner = "circulant" if symbol else "row"
    elif method == "auto":
        method = "gmres"
    if method in ("gmres", "block_gmres"):
        name = "block GMRES over the batch" if method == "block_gmres" else "GMRES"
        return Choice(method, preconditioner, f"{name}, preconditioner {preconditioner}")
    krylov = "block_gmres" if batch > 1 else "gmres"
    if layout is None:
        return Choice(krylov, preconditioner, f"preconditioner {preconditioner}: no factor fits in memory")
    factor, iterative = direct_seconds(op, layout, batch), _krylov_seconds(op, batch)
    costs = f"estimated {factor:.2g} s for {layout}, {iterative:.2g} s for {krylov}"
    if factor <= iterative:
        return Choice("direct", "lu", costs, layout)
    return Choice(krylov, preconditioner, f"preconditioner {preconditioner}; {costs}")
