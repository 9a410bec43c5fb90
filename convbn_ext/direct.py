"""LU factors of W, the convolution with BN divided out: block-tridiagonal by image rows, or dense (spec S15).

On a CPU csrc/cpu/block_lu_cpu.cpp, which stores one block per group and solves a whole layer in one call; elsewhere
csrc/block_tridiagonal.cpp, which stores three and is made of torch's matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from .cache import remember
from .geometry import Geometry, stencil_entries
from .operator import ConvBNOperator

FACTOR_BYTES = 1 << 30  # largest factor that is made


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
        """Inverse 2m³ per group; the coupling between groups is as sparse as the kernel."""
        return self.groups * 2.0 * self.size**3

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
    filler = torch.arange((size - (R - 1) * layout.rows) * (m // layout.rows), m)
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


def cached_factor(op: ConvBNOperator, layout: Layout) -> _C.BlockLU | _C.BlockTridiagonalMap | None:
    """``factorise``, remembered while the weight keeps its values.

    Without pivoting between blocks a factor loses up to 14 digits, so float32 would be of no use. First residuals of
    random right-hand sides, 24 layers of default initialisation, 3 × 32 × 32: float32 2e-3 … 2e6, median 1; float64
    4e-12 … 1e-3, median 6e-9, and one to two digits more from both ends than from one.
    """
    key = ("lu", op.geometry, op.input_shape, layout)
    return remember(key, op.weight, lambda: factorise(op, layout))
