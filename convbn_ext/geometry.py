"""Where a convolution reads: sizes, padding and the positions that each kernel tap touches, for every padding mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _C


@dataclass(frozen=True)
class Geometry:
    """What a convolution does to positions; ``padding`` is (lo, hi) per spatial axis, first axis first."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    mode: str

    @classmethod
    def of(cls, conv: Any, who: str) -> Geometry:
        """Read an nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear (no spatial axis)."""
        if isinstance(conv, nn.Linear):
            return cls((), (), (), (), 1, "zeros")
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise TypeError(
                f"{who}: conv must be nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear, got {type(conv).__name__}"
            )
        last_first = conv._reversed_padding_repeated_twice  # numbers also for 'same' and 'valid'
        pairs = tuple((lo, hi) for lo, hi in zip(last_first[::2], last_first[1::2], strict=True))[::-1]
        return cls(tuple(conv.kernel_size), conv.stride, pairs, conv.dilation, conv.groups, conv.padding_mode)

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for a spatial input size."""
        return tuple(
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    def input_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the input for a spatial output size.

        With stride s an axis has s candidates; out·s is taken where it is one (32 → 16 → 32), else the smallest.
        """
        sizes = []
        for m, k, s, p, d in zip(spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            smallest = (m - 1) * s + d * (k - 1) + 1 - sum(p)
            sizes.append(m * s if smallest <= m * s < smallest + s else smallest)
        return tuple(sizes)

    def sources(self, axis: int, size: int) -> Tensor:
        """Input position that each kernel tap reads along one axis: (out, kernel) indices, −1 where it reads a zero."""
        k, s, d, (lo, _) = self.kernel[axis], self.stride[axis], self.dilation[axis], self.padding[axis]
        out = (size + sum(self.padding[axis]) - d * (k - 1) - 1) // s + 1
        position = torch.arange(out, device="cpu")[:, None] * s + torch.arange(k, device="cpu") * d - lo
        if self.mode == "circular":
            return position % size
        if self.mode == "reflect":
            return size - 1 - (size - 1 - position.abs()).abs()
        if self.mode == "replicate":
            return position.clamp(0, size - 1)
        return position.masked_fill((position < 0) | (position >= size), -1)

    def conv_map(self, weight: Tensor, spatial: Sequence[int]) -> _C.LinearMap:
        """The C++ map z ↦ weight ⋆ pad(z) on flattened images."""
        flat_padding = [p for pair in self.padding for p in pair]
        return _C.ConvMap(weight, self.stride, flat_padding, self.dilation, self.groups, self.mode, spatial)


def merge_patterns(sources: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group output positions of an axis by which kernel taps read the same pixel.

    Returns:
        Per pattern a 0/1 matrix (kernel, pixels read) that adds the coinciding taps up, and the positions that have it.
    """
    first_use = (sources[:, :, None] == sources[:, None, :]).int().argmax(2).masked_fill(sources < 0, -1)
    unique, which = first_use.unique(dim=0, return_inverse=True)
    result = []
    for index, pattern in enumerate(unique):
        pixels = pattern[pattern >= 0].unique()
        result.append(((pattern[:, None] == pixels).double(), (which == index).nonzero().flatten()))
    return result


def stencil_entries(
    geometry: Geometry, input_shape: tuple[int, ...], weight_shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Every product of the convolution as (row, column, index into the flattened weight), each (nnz,)."""
    sources = [geometry.sources(axis, size) for axis, size in enumerate(input_shape[1:])]
    c_out, c_in = int(weight_shape[0]), int(weight_shape[1])
    out, spatial, taps = [len(s) for s in sources], input_shape[1:], math.prod(geometry.kernel)

    # (position, source, tap) of one axis after the other, combined into flat indices
    position = source = tap = torch.zeros(1, dtype=torch.long, device="cpu")
    for reads, size in zip(sources, spatial, strict=True):
        at, k = (reads >= 0).nonzero(as_tuple=True)
        parts = ((position, at, len(reads)), (source, reads[at, k], size), (tap, k, reads.shape[1]))
        position, source, tap = ((outer[:, None] * extent + inner).flatten() for outer, inner, extent in parts)
    o = torch.arange(c_out, device="cpu")[:, None, None]
    i = torch.arange(c_in, device="cpu")[None, :, None]
    channel = i + o // (c_out // geometry.groups) * c_in
    row = o * math.prod(out) + position
    column = channel * math.prod(spatial) + source
    weight_index = (o * c_in + i) * taps + tap
    return tuple(t.expand(c_out, c_in, -1).flatten() for t in (row, column, weight_index))  # type: ignore[return-value]
