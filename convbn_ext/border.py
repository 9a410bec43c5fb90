"""W⁻¹ of a convolution that is circular but for its border: Fourier blocks and one dense system at the border.

    W = C + Rᵀ F,  M = C⁻¹,  K = I + F M Rᵀ:   W⁻¹ = M − M Rᵀ K⁻¹ F M

R picks the outputs whose window leaves the image, F holds there what W has and the circular C has not (the taps that
padding reads) less what C has and W has not (the taps that wrap around). M is translation invariant, so that K is made
of one impulse response per channel:  K[(q, o), (p, c)] = δ + Σ ± w[o, :, t] · m[:, c, s − p]  over the taps t at q that
differ and the positions s that they read. (Capacitance matrix method: Buzbee, Dorr, George & Golub, 1971.)

K is of order C × border positions, factored with pivoting; M is well-conditioned unless the symbol is nearly singular.
So nothing is lost that the condition of W does not force, at any image size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from .geometry import Geometry, stencil_entries
from .operator import ConvBNOperator
from .preconditioners import border_rank, circulant_inverse

_CHUNK = 1 << 22  # numbers gathered at a time while K is made


@dataclass(frozen=True)
class BorderLayout:
    """K: one matrix of order ``size`` per channel group."""

    groups: int
    size: int
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Numbers stored."""
        return self.groups * self.size**2

    @property
    def factor_flops(self) -> float:
        """LU with row exchanges."""
        return self.groups * self.size**3 * 2 / 3

    def __str__(self) -> str:
        return f"Fourier blocks and a border system of order {self.groups * self.size}"


def border_layout(op: ConvBNOperator, limit: int) -> BorderLayout | None:
    """The layout of K, float64 or else float32 within ``limit`` bytes; None where W has no symbol or K is too large."""
    if not op.has_symbol or op.input_shape != op.output_shape or border_rank(op) == 0:
        return None
    G = op.geometry.groups
    for dtype in (torch.float64, torch.float32):
        layout = BorderLayout(G, border_rank(op) // G, dtype)
        if layout.numbers * dtype.itemsize <= limit:
            return layout
    return None


@dataclass(frozen=True)
class _Differences:
    """Where W and C differ: tap ``tap`` of border position number ``at`` reads ``source`` in W (sign 1) or C (−1)."""

    border: Tensor  # (nb,) positions
    at: Tensor  # (E,) in [0, nb)
    source: Tensor  # (E,) positions
    tap: Tensor  # (E,)
    sign: Tensor  # (E,) float64


@lru_cache(maxsize=8)
def _differences(geometry: Geometry, spatial: tuple[int, ...]) -> _Differences:
    P, T = math.prod(spatial), math.prod(geometry.kernel)
    reads = []
    for mode in (geometry.mode, "circular"):
        one = replace(geometry, groups=1, mode=mode)
        position, source, tap = stencil_entries(one, (1, *spatial), (1, 1, *geometry.kernel))
        reads.append(torch.full((P * T,), -1, device="cpu").index_copy_(0, position * T + tap, source))
    differ = reads[0] != reads[1]
    border = differ.reshape(P, T).any(1).nonzero().flatten()
    place = torch.arange(len(border), device="cpu")
    number = place.new_zeros(P).index_copy_(0, border, place)
    found = [(differ & (read >= 0)).nonzero().flatten() for read in reads]
    cells = torch.cat(found)
    return _Differences(
        border,
        number[cells // T],
        torch.cat([read[cell] for read, cell in zip(reads, found, strict=True)]),
        cells % T,
        torch.cat([torch.full_like(cell, sign).double() for sign, cell in zip((1, -1), found, strict=True)]),
    )


def factorise_border(op: ConvBNOperator, layout: BorderLayout) -> _C.BorderMap | None:
    """W⁻¹ as a map; None when K is singular.

    Where singular values of the symbol had to be replaced (they are zero to rounding), it is W⁻¹ but for as many
    dimensions.
    """
    C, spatial = op.input_shape[0], op.input_shape[1:]
    G, P, device = op.geometry.groups, math.prod(spatial), op.device
    c = C // G
    d = _differences(op.geometry, spatial)
    M, _ = circulant_inverse(op, layout.dtype)
    impulses = torch.zeros(C, C, P, dtype=layout.dtype, device=device)
    impulses[range(C), range(C), 0] = 1
    response = M.apply(impulses.reshape(C, C * P)).reshape(G, c, G, c, P)  # (g, from channel, g, to channel, shift)
    response = response.diagonal(dim1=0, dim2=2).permute(3, 2, 1, 0).contiguous()  # (g, shift, to, from)
    del impulses

    nb = len(d.border)
    shift = torch.zeros(len(d.source), nb, dtype=torch.long, device="cpu")
    inner = P
    for size in spatial:  # s − p, axis by axis
        inner //= size
        shift = shift * size + (d.source[:, None] // inner - d.border // inner) % size
    weight = op.weight.to(layout.dtype).reshape(G, c, c, -1)
    K = torch.zeros(G, nb, c, nb, c, dtype=layout.dtype, device=device)
    at_once = max(1, _CHUNK // (nb * G * c * c))
    for tap in d.tap.unique().tolist():
        product = weight[:, None, :, :, tap] @ response  # (g, shift, o, c)
        for entries in (d.tap == tap).nonzero().flatten().split(at_once):
            part = product[:, shift[entries].to(device)]  # (g, e, p, o, c)
            part *= d.sign[entries].to(part)[:, None, None, None]
            K.index_add_(1, d.at[entries].to(device), part.transpose(2, 3))
    K = K.reshape(G, nb * c, nb * c)
    K.diagonal(dim1=1, dim2=2).add_(1)

    channel = torch.arange(C, device="cpu").reshape(G, 1, c)
    rows = (channel * P + d.border[:, None]).flatten().to(device)
    result = _C.BorderMap(M, op.conv_map, rows, K)
    return result if result.finite else None
