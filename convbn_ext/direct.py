"""Factors of W, the convolution with BN divided out, and what they cost.

Three kinds: a border system (border.py), LU in blocks of image rows (spec S15), a dense inverse. The latter two are
made by csrc/cpu/block_lu_cpu.cpp, which stores one block per group and solves a whole layer in one call, on other
devices by csrc/block_tridiagonal.cpp, which stores three and consists of torch's matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from .border import BorderLayout, border_layout, factorise_border
from .cache import remember
from .geometry import Geometry, stencil_entries
from .operator import ConvBNOperator

FACTOR_BYTES = 1 << 30  # largest factor that is made
GEMM, FOURIER = 3e10, 1.2e10  # flop/s in products, in circulant maps
CALL, GROUP = 1e-4, 5e-6  # seconds per Arnoldi step or map, per group of a factor
_ASSEMBLE = 3e-8  # seconds per number of a border system
_REFINEMENTS = 1.5  # of LU in blocks; 1 of a border system in float64, 2 in float32
_TOLERABLE_LOSS = 1e-2  # two digits a step


@dataclass(frozen=True)
class Layout:
    """How the unknowns are cut into groups: ``rows`` of spatial ``axis`` each; one group is the dense inverse."""

    axis: int
    rows: int
    groups: int
    size: int  # unknowns per group, m

    @property
    def numbers(self) -> int:
        """Numbers stored: the inverse of one block per group."""
        return self.groups * self.size**2

    def __str__(self) -> str:
        return f"LU in {self.groups} blocks of {self.size}" if self.groups > 1 else f"dense LU of order {self.size}"

    @property
    def factor_flops(self) -> float:
        """Inverse 2m³ per group, and what costs like 150m² more: pivots, sparse coupling of the groups."""
        return self.groups * (2.0 * self.size**3 + 150.0 * self.size**2)

    @property
    def solve_flops(self) -> float:
        """Per right-hand side: the block inwards and outwards, or the dense inverse once."""
        return self.numbers * (4.0 if self.groups > 1 else 2.0)


def layouts(op: ConvBNOperator) -> list[Layout]:
    """Every layout worth considering for a square operator; circular padding couples first and last row: dense only."""
    n, g = op.shape[1], op.geometry
    result = [Layout(0, n, 1, n)]
    if not op.has_symbol or g.mode == "circular":
        return result
    for axis, size in enumerate(op.input_shape[1:]):
        reach = max(1, *g.padding[axis])  # equal sizes: a window reaches as far as the padding
        for rows in range(reach, min(4 * reach, size - 1) + 1, reach):
            groups = -(-size // rows)
            result.append(Layout(axis, rows, groups, rows * (n // size)))
    return result


def fourier_flops(op: ConvBNOperator) -> float:
    """Flops, at the rate of FOURIER, of one product with a circulant map per right-hand side."""
    n, channels = op.shape[1], op.input_shape[0]
    return n * (30 * math.log2(n + 1) + 8 * channels / op.geometry.groups)


def direct_seconds(op: ConvBNOperator, layout: Layout | BorderLayout, batch: int) -> float:
    """Estimate for the factor and as many solves as refinement usually takes."""
    if isinstance(layout, BorderLayout):
        setup = layout.factor_flops / GEMM + _ASSEMBLE * layout.numbers + 20 * CALL
        step = 2 * fourier_flops(op) / FOURIER + 2.0 * layout.numbers / GEMM
        return setup + (1 if layout.dtype == torch.float64 else 2) * (batch * step + 2 * CALL)
    factor = layout.factor_flops / GEMM + layout.groups * GROUP
    return factor + _REFINEMENTS * (batch * layout.solve_flops / GEMM + layout.groups * GROUP)


def best_layouts(op: ConvBNOperator, batch: int) -> list[Layout | BorderLayout]:
    """The border system and the cheapest LU, as far as they fit in memory, the cheaper one first."""
    fitting = [layout for layout in layouts(op) if layout.numbers * torch.float64.itemsize <= FACTOR_BYTES]
    found: list[Layout | BorderLayout] = []
    if fitting:
        found.append(min(fitting, key=lambda layout: direct_seconds(op, layout, batch)))
    border = border_layout(op, FACTOR_BYTES)
    if border is not None:
        found.append(border)
    return sorted(found, key=lambda layout: direct_seconds(op, layout, batch))


@lru_cache(maxsize=8)
def _block_positions(
    geometry: Geometry, shape: tuple[int, ...], weight_shape: tuple[int, ...], layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """For every product of the convolution its place in the (3, R, m, m) blocks and its weight; the identity rows."""
    row, column, tap = stencil_entries(geometry, shape, weight_shape)
    R, m, size = layout.groups, layout.size, shape[layout.axis + 1]
    inner = math.prod(shape[layout.axis + 2 :])  # pixels behind the axis

    def split(index: Tensor) -> tuple[Tensor, Tensor]:
        """Group, and position in the group in the order (row in group, C, other axes)."""
        outer, rest = index // (size * inner), index % inner
        line = index // inner % size
        within = (line % layout.rows) * (m // layout.rows) + outer * inner + rest
        return line // layout.rows, within

    (r, i), (s, j) = split(row), split(column)
    place = (((s - r + 1) * R + r) * m + i) * m + j
    filler = torch.arange((size - (R - 1) * layout.rows) * (m // layout.rows), m, device="cpu")
    identity = ((R + R - 1) * m + filler) * m + filler
    return place, tap, identity


@lru_cache(maxsize=8)
def _dense_positions(
    geometry: Geometry, shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """For every product of the convolution its place in the square matrix and its weight."""
    row, column, tap = stencil_entries(geometry, shape, weight_shape)
    return row * math.prod(shape) + column, tap


@lru_cache(maxsize=8)
def _plan(geometry: Geometry, shape: tuple[int, ...], weight_shape: tuple[int, ...], layout: Layout) -> _C.BlockPlan:
    """What geometry and sizes say about a factor on a CPU."""
    entries = stencil_entries(geometry, shape, weight_shape)
    if layout.groups == 1:
        return _C.BlockPlan(*entries, outer=1, size=layout.size, inner=1, rows=layout.size)
    outer, size, inner = (
        math.prod(part)
        for part in (shape[: layout.axis + 1], shape[layout.axis + 1 : layout.axis + 2], shape[layout.axis + 2 :])
    )
    return _C.BlockPlan(*entries, outer=outer, size=size, inner=inner, rows=layout.rows)


def factorise(op: ConvBNOperator, layout: Layout) -> _C.BlockLU | _C.BlockTridiagonalMap | None:
    """M ≈ W⁻¹ in float64; None when a pivot block is singular."""
    if op.device.type != "cpu":
        return factorise_by_products(op, layout)
    factor = _C.BlockLU(_plan(op.geometry, op.input_shape, tuple(op.weight.shape), layout), op.weight)
    return factor if factor.finite else None


def factorise_by_products(op: ConvBNOperator, layout: Layout) -> _C.BlockTridiagonalMap | None:
    """The same on any device."""
    weight, n = op.weight, op.shape[1]
    if layout.groups == 1:
        place, tap = (t.to(op.device) for t in _dense_positions(op.geometry, op.input_shape, tuple(weight.shape)))
        dense = weight.new_zeros(n * n).index_add_(0, place, weight.flatten()[tap]).reshape(1, n, n)
        empty = dense.new_empty(0)
        result = _C.BlockTridiagonalMap(empty, dense, empty, (1, n), 0, n)
        return result if result.finite else None
    place, tap, identity = (
        t.to(op.device) for t in _block_positions(op.geometry, op.input_shape, tuple(weight.shape), layout)
    )
    blocks = weight.new_zeros(3 * layout.groups * layout.size**2)
    blocks.index_add_(0, place, weight.flatten()[tap])
    blocks[identity] = 1
    lower, diagonal, upper = blocks.reshape(3, layout.groups, layout.size, layout.size)
    result = _C.BlockTridiagonalMap(lower, diagonal, upper, op.input_shape, layout.axis, layout.rows)
    return result if result.finite else None


def loss(op: ConvBNOperator, M: _C.LinearMap) -> float:
    """‖v − W M v‖ / ‖v‖ for a random v: what a step of refinement with M leaves at worst."""
    seeded = torch.Generator().manual_seed(0)
    v = torch.randn(1, op.shape[1], dtype=torch.float64, generator=seeded, device="cpu").to(op.device)
    rest = v - op.conv_map.apply(M.apply(v))
    found = float(torch.linalg.vector_norm(rest) / torch.linalg.vector_norm(v))
    return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Factor:
    """M ≈ W⁻¹, None where nothing could be factored, and what is worth knowing about it."""

    map: _C.LinearMap | None
    note: str = ""


def make_factor(op: ConvBNOperator, layout: Layout | BorderLayout) -> Factor:
    """The factor asked for, or one of the other kind where that one loses too many digits.

    Blocks are pivoted inside only and lose up to eps·cond³, a border system loses eps·cond, but a nearly singular
    symbol spoils it. ``loss`` of 18 layers (default initialisation, three paddings): blocks 6e-12 … 2e1 at 3 × 32 × 32
    and 2e-6 … 4e10 at 3 × 64 × 64, border systems 2e-14 … 2e-2 and 4e-11 … 5e-1.
    """

    def kinds() -> Iterator[Layout | BorderLayout]:
        yield layout
        yield from (other for other in best_layouts(op, 1) if type(other) is not type(layout))

    tried: list[tuple[float, _C.LinearMap, Layout | BorderLayout]] = []
    for kind in kinds():
        M: _C.LinearMap | None
        M = factorise_border(op, kind) if isinstance(kind, BorderLayout) else factorise(op, kind)
        if M is not None:
            tried.append((loss(op, M), M, kind))
            if tried[-1][0] <= _TOLERABLE_LOSS:
                break
    if not tried:
        return Factor(None)
    lost, M, kind = min(tried, key=lambda found: found[0])
    notes = [f"{layout} was too inaccurate: {kind}"] if kind is not layout else []
    if lost > 0.1:
        notes.append("the layer is singular to rounding: for some x no digit is right")
    return Factor(M, "; ".join(notes))


def cached_factor(op: ConvBNOperator, layout: Layout | BorderLayout) -> Factor:
    """``make_factor``, remembered while the weight keeps its values."""
    return remember(("lu", op.geometry, op.input_shape, layout), op.weight, lambda: make_factor(op, layout))
