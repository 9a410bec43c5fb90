"""LU factors of W, the convolution with BN divided out: block-tridiagonal by image rows, or dense (spec S15)."""

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
        """Numbers stored: three blocks per group, or one dense inverse."""
        return (3 if self.groups > 1 else 1) * self.groups * self.size**2

    def __str__(self) -> str:
        return f"LU in {self.groups} blocks of {self.size}" if self.groups > 1 else f"dense LU of order {self.size}"

    @property
    def factor_flops(self) -> float:
        """Inverse 2m³ per group, and three products of 2m³ between groups."""
        return self.groups * (8.0 if self.groups > 1 else 2.0) * self.size**3


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


def factorise(op: ConvBNOperator, layout: Layout, dtype: torch.dtype) -> _C.BlockTridiagonalMap | None:
    """M ≈ W⁻¹ in the given dtype; None when a pivot block is singular."""
    weight, n = op.weight.to(dtype), op.shape[1]
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


def cached_factor(op: ConvBNOperator, layout: Layout) -> _C.BlockTridiagonalMap | None:
    """``factorise`` in float64, remembered while the weight keeps its values.

    Without pivoting between blocks a factor loses up to 14 digits. First residuals of random right-hand sides, default
    initialisation, 3 × 32 × 32: float32 9e-3 … 3e5 (of no use), float64 1e-11 … 9e-2 over 24 layers.
    """
    key = ("lu", op.geometry, op.input_shape, layout)
    return remember(key, op.weight, lambda: factorise(op, layout, torch.float64))
