"""Preconditioners for A z = r: a row scaling L before the equation and a right preconditioner M ≈ (L A)⁻¹ behind it.

    none       L = Γ⁻¹ (BN divided out: L A = W), M = I                                (spec S9)
    row        L = diag(1 / max_j |a_ij|),        M = I                                (spec S11)
    circulant  L = Γ⁻¹,  M = the inverse of the circular convolution with W's stencil  (spec S15)
    callable   L = 1,    M = what the caller gives: residuals (B, C_out, *out) -> corrections (B, C_in, *spatial), any
               function of them and of the call; its attribute ``rmatvec``, if it has one, is Mᵀ, the way back

GMRES sees L A M, so it monitors ‖L r‖; ‖r‖ ≤ ‖L r‖ / min |L| turns a target for r into one for L r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C
from .cache import remember
from .operator import ConvBNOperator

Correction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preconditioned:
    """The system L A M u = L r.

    Attributes:
        left: diagonal of L (m,), float64.
        matrix: L A.
        right: M, or None for the identity.
        steps: GMRES steps that suffice in exact arithmetic.
        note: what the caller should know, or "".
        flexible: M may differ from call to call.
    """

    left: Tensor
    matrix: _C.LinearMap
    right: _C.LinearMap | None
    steps: int
    note: str = ""
    flexible: bool = False

    def transpose(self) -> Preconditioned:
        """The system (L A)ᵀ μ = g with the preconditioner Mᵀ; λ = L μ solves Aᵀ λ = g."""
        return Preconditioned(
            torch.ones_like(self.left),
            _C.AdjointMap(self.matrix),
            None if self.right is None else _C.AdjointMap(self.right),
            self.steps,
            self.note,
            self.flexible,
        )


def border_rank(op: ConvBNOperator) -> int:
    """C_out × (border positions): a bound for rank(A M − I) with the circulant M, hence for the GMRES steps less one.

    A and the circular convolution differ in the rows whose window leaves the image, and nowhere else (spec S15).
    """
    if op.geometry.mode == "circular":
        return 0
    inside = math.prod(max(n - lo - hi, 0) for n, (lo, hi) in zip(op.input_shape[1:], op.geometry.padding, strict=True))
    return op.output_shape[0] * (math.prod(op.output_shape[1:]) - inside)


def circulant_inverse(op: ConvBNOperator, dtype: torch.dtype) -> tuple[_C.CirculantMap, int]:
    """Inverse of the circular convolution with W's stencil, block by block in Fourier space.

    Singular values below rounding of ``dtype`` (relative to the largest of all frequencies) cannot be inverted; they
    are replaced by the largest, which leaves those directions to GMRES. All others are inverted as they are.

    Returns:
        The map, and how many singular values were replaced.

    Raises:
        ValueError: the operator has no square symbol (stride, size or channels change).
    """
    if op.input_shape != op.output_shape:
        raise ValueError(
            f"circulant preconditioner: needs C_in = C_out and equal sizes, got {op.input_shape} -> {op.output_shape}"
        )
    key = ("fft", op.geometry, op.input_shape, dtype)
    spatial = op.input_shape[1:] or (1,)
    return remember(key, op.weight, lambda: circulant_map(op.symbol(scaled=False), spatial, dtype))


def circulant_map(blocks: Tensor, spatial: tuple[int, ...], dtype: torch.dtype) -> tuple[_C.CirculantMap, int]:
    """The inverse of a block-circulant operator given by its Fourier blocks; see ``circulant_inverse``."""
    inverse, info = torch.linalg.inv_ex(blocks)
    largest = torch.linalg.matrix_norm(blocks).amax()
    floor = 4 * torch.finfo(dtype).eps * largest
    suspect = (info != 0) | ~(torch.linalg.matrix_norm(inverse) * floor < 1)  # ‖K⁻¹‖ ≥ 1/floor: σ_min may be below it
    replaced = 0
    if suspect.any():
        U, sigma, Vh = torch.linalg.svd(blocks[suspect])
        small = sigma <= floor
        replaced = int(small.sum())
        sigma = torch.where(small, largest, sigma)
        inverse[suspect] = Vh.mH @ (U.mH / sigma[..., None])
    kept = inverse.resolve_conj().to(torch.complex64 if dtype == torch.float32 else torch.complex128)
    return _C.CirculantMap(kept.contiguous(), spatial), replaced


def precondition(op: ConvBNOperator, which: str | Correction, dtype: torch.dtype) -> Preconditioned:
    """Prepare A z = r for GMRES with the preconditioner named.

    Args:
        op: square operator without singular channels.
        which: "none", "row", "circulant", or a callable.
        dtype: dtype of the Arnoldi vectors.
    """
    n = op.shape[1]
    divide_out = op.channel_vector(1 / op.scale)
    if which == "none":
        return Preconditioned(divide_out, op.conv_map, None, n)
    if which == "row":
        left = 1 / op.row_maxima()
        return Preconditioned(left, _C.ComposedMap(_C.DiagonalMap(left), op.map), None, n)
    if which == "circulant":
        right, replaced = circulant_inverse(op, dtype)
        note = f"{replaced} singular values of the symbol are below rounding and were replaced" if replaced else ""
        return Preconditioned(divide_out, op.conv_map, right, min(n, border_rank(op) + replaced + 1), note)
    assert callable(which)
    return Preconditioned(torch.ones_like(divide_out), op.map, _callable_map(op, which), n, flexible=True)


def _callable_map(op: ConvBNOperator, user: Correction) -> _C.CallableMap:
    """The caller's M, and Mᵀ where there is one, on flattened rows."""

    def on_rows(apply: Correction, source: tuple[int, ...], n: int) -> Correction:
        def call(v: Tensor) -> Tensor:
            result = apply(v.reshape(-1, *source))
            if not isinstance(result, Tensor) or result.numel() != len(v) * n:
                shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(
                    f"solve: preconditioner must map {(len(v), *source)} to {len(v)} × {n} numbers, got {shape}"
                )
            return result.reshape(-1, n)

        return call

    transpose = getattr(user, "rmatvec", None)
    m, n = op.shape
    return _C.CallableMap(
        on_rows(user, op.output_shape, n), None if transpose is None else on_rows(transpose, op.input_shape, m)
    )
