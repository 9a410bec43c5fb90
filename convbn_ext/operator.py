"""The layer as a linear operator: BN(Conv(z)) = A z + b̂ with frozen statistics (spec S9).

Γ = γ/√(σ² + ε),  α = β − Γ μ,  A = Γ·W (padding included),  b̂ = Γ b + α.  A is applied by convolutions, never stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .geometry import Geometry, merge_patterns, stencil_entries

Stats = str | tuple[Tensor, Tensor]


def check_batch_norm(bn: Any, channels: int, who: str) -> None:
    """Raise TypeError or ValueError unless bn is a batch normalisation of that many channels."""
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"{who}: bn must be nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d, got {type(bn).__name__}")
    if bn.num_features != channels:
        raise ValueError(f"{who}: bn has {bn.num_features} features, but conv has {channels} output channels")


def frozen_statistics(bn: Any, stats: Stats, channels: int, who: str) -> tuple[Tensor, Tensor]:
    """(mean, var) in float64 from the running statistics or as given.

    Raises:
        TypeError: bn is not a batch normalisation, or stats is neither "running" nor a pair.
        ValueError: bn keeps no running statistics; a given tensor has the wrong shape, is not finite, or var < 0.
    """
    check_batch_norm(bn, channels, who)
    if isinstance(stats, str) and stats == "running":
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(f'{who}: bn has no running statistics; give stats=(mean, var) or stats="batch"')
        mean, var = bn.running_mean, bn.running_var
    elif isinstance(stats, tuple | list) and len(stats) == 2:
        mean, var = (s if isinstance(s, Tensor) else torch.as_tensor(s, device="cpu") for s in stats)
    else:
        raise TypeError(f'{who}: stats must be "running", "batch" or a pair (mean, var), got {stats!r}')
    for name, value in (("mean", mean), ("var", var)):
        if tuple(value.shape) != (channels,):
            raise ValueError(f"{who}: stats {name} must have shape ({channels},), got {tuple(value.shape)}")
        if not all(map(math.isfinite, value.tolist())):
            raise ValueError(f"{who}: stats {name} is not finite in channels {_channels(~value.isfinite())}")
    variances = var.double().tolist()
    if min(variances) < 0:
        raise ValueError(f"{who}: stats var is negative in channels {_channels(var < 0)}")
    if any(v + bn.eps == 0 for v in variances):
        raise ValueError(f"{who}: var + eps is zero in channels {_channels(var.double() + bn.eps == 0)}")
    return mean.detach().double(), var.detach().double()


def _channels(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


class ConvBNOperator:
    """A of BN(Conv(z)) = A z + b̂, matrix-free, with its adjoint and its symbol.

    Vectors are flattened, (n,) or (B, n), or shaped, (C_in, *spatial) or (B, C_in, *spatial); the result has the same
    form. A shape that equals ``input_shape`` counts as shaped. All samples share A, so ``input_shape`` has no batch
    dimension; one with a batch dimension in front is accepted and the batch is ignored.

    Args:
        conv: nn.Conv1d, nn.Conv2d or nn.Conv3d (any stride, padding, dilation, groups, padding mode), or nn.Linear.
        bn: the batch normalisation that follows it.
        input_shape: (C_in, *spatial) or (N, C_in, *spatial) of z.
        stats: "running" or (mean, var), each (C_out,).

    Attributes:
        input_shape, output_shape: (C_in, *spatial), (C_out, *out).
        shape: (m, n), their products.
        scale: Γ (C_out,), float64.
        offset: b̂ (C_out,), float64.
        singular_channels: channels with γ = 0, whose rows of A are zero.
        map: A as an object for the C++ solvers; ``conv_map`` is W alone.

    Raises:
        TypeError: conv or bn is of another class.
        ValueError: shapes do not fit, or the statistics cannot be used.
    """

    def __init__(self, conv: Any, bn: Any, input_shape: Sequence[int], *, stats: Stats = "running") -> None:
        who = "ConvBNOperator"
        self.geometry = Geometry.of(conv, who)
        weight: Tensor = conv.weight.detach()
        axes, c_out, c_in = len(self.geometry.kernel), weight.shape[0], weight.shape[1] * self.geometry.groups
        shape = tuple(int(s) for s in input_shape)
        if len(shape) == axes + 2:
            shape = shape[1:]
        if len(shape) != axes + 1 or shape[0] != c_in or min(shape) < 1:
            spatial = "".join(f", S{i + 1}" for i in range(axes))
            raise ValueError(
                f"{who}: input_shape must be ({c_in}{spatial}) or (N, {c_in}{spatial}), got {tuple(input_shape)}"
            )
        out = self.geometry.output_size(shape[1:])
        if min(out, default=1) < 1:
            raise ValueError(f"{who}: input_shape {shape} is smaller than the kernel {self.geometry.kernel} reaches")
        self._check_padding(shape[1:], who)

        mean, var = frozen_statistics(bn, stats, c_out, who)
        mean, var = mean.to(weight.device), var.to(weight.device)
        gamma = torch.ones_like(var) if bn.weight is None else bn.weight.detach().double()
        beta, bias = (torch.zeros_like(var) if p is None else p.detach().double() for p in (bn.bias, conv.bias))
        self.scale: Tensor = gamma / (var + bn.eps).sqrt()
        self.offset: Tensor = beta + self.scale * (bias - mean)
        self.singular_channels: list[int] = [c for c, scale in enumerate(self.scale.tolist()) if scale == 0]
        self.input_shape, self.output_shape = shape, (c_out, *out)
        self.shape = (math.prod(self.output_shape), math.prod(self.input_shape))
        self.dtype, self.device = weight.dtype, weight.device
        self.weight: Tensor = weight.double()  # W; maps compute in the dtype of their argument

    @cached_property
    def conv_map(self) -> _C.LinearMap:
        """W on flattened images."""
        return self.geometry.conv_map(self.weight, self.input_shape[1:])

    @cached_property
    def map(self) -> _C.LinearMap:
        """A on flattened images."""
        return self.geometry.conv_map(self._scaled_weight(), self.input_shape[1:])

    def _check_padding(self, spatial: tuple[int, ...], who: str) -> None:
        limit = {"circular": 0, "reflect": 1}.get(self.geometry.mode)
        for axis, (size, pads) in enumerate(zip(spatial, self.geometry.padding, strict=True)):
            if limit is not None and max(pads) > size - limit:
                raise ValueError(
                    f"{who}: {self.geometry.mode} padding {pads} along spatial axis {axis} needs an input of at least "
                    f"{max(pads) + limit}, got {size}"
                )

    def _scaled_weight(self) -> Tensor:
        return self.weight * self.scale.reshape(-1, *[1] * (self.weight.dim() - 1))

    def __repr__(self) -> str:
        return f"ConvBNOperator({self.input_shape} -> {self.output_shape}, {self.geometry.mode}, {self.dtype})"

    def matvec(self, v: Tensor) -> Tensor:
        """A v for v (n,), (B, n), (C_in, *spatial) or (B, C_in, *spatial), in v's dtype."""
        return self._on_rows(self.map.apply, v, self.input_shape, self.output_shape, "matvec")

    def rmatvec(self, u: Tensor) -> Tensor:
        """Aᵀ u for u (m,), (B, m), (C_out, *out) or (B, C_out, *out), in u's dtype."""
        return self._on_rows(self.map.apply_adjoint, u, self.output_shape, self.input_shape, "rmatvec")

    def _on_rows(
        self, apply: Callable[[Tensor], Tensor], v: Tensor, source: tuple[int, ...], target: tuple[int, ...], name: str
    ) -> Tensor:
        n, shape = math.prod(source), tuple(v.shape)
        if shape == source:
            return apply(v.reshape(1, n)).reshape(target)
        if shape == (n,):
            return apply(v.reshape(1, n)).flatten()
        if v.dim() == 2 and shape[1] == n:
            return apply(v)
        if shape[1:] == source:
            return apply(v.reshape(-1, n)).reshape(-1, *target)
        batched = f"(B, {', '.join(map(str, source))})"
        raise ValueError(f"ConvBNOperator.{name}: expected shape ({n},), (B, {n}), {source} or {batched}, got {shape}")

    def channel_vector(self, per_channel: Tensor) -> Tensor:
        """A value per output channel (C_out,) spread over the output positions: (m,)."""
        return per_channel.repeat_interleave(math.prod(self.output_shape[1:]))

    def to_sparse(self) -> Tensor:
        """A as a coalesced torch sparse COO tensor (m, n) on the operator's device."""
        row, column, tap = (
            t.to(self.device) for t in stencil_entries(self.geometry, self.input_shape, self.weight.shape)
        )
        values = self._scaled_weight().flatten()[tap].to(self.dtype)
        entries = torch.stack([row, column])
        return torch.sparse_coo_tensor(
            entries, values, self.shape, device=values.device, check_invariants=False
        ).coalesce()

    def to_scipy(self) -> Any:
        """A as a scipy.sparse.linalg.LinearOperator of NumPy arrays (SciPy must be installed)."""
        from scipy.sparse.linalg import LinearOperator

        numpy_dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype

        def on_columns(apply: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def call(v: Any) -> Any:
                rows = torch.tensor(v.reshape(v.shape[0], -1).T, dtype=self.dtype, device=self.device)
                result = apply(rows).cpu().numpy()
                return result[0] if v.ndim == 1 else result.T

            return call

        apply, adjoint = on_columns(self.map.apply), on_columns(self.map.apply_adjoint)
        return LinearOperator(
            self.shape, matvec=apply, rmatvec=adjoint, matmat=apply, rmatmat=adjoint, dtype=numpy_dtype
        )

    @property
    def has_symbol(self) -> bool:
        """Whether positions are kept: stride 1 and equal spatial sizes."""
        return all(s == 1 for s in self.geometry.stride) and self.output_shape[1:] == self.input_shape[1:]

    def symbol(self, scaled: bool = True) -> Tensor:
        """Fourier blocks of the circulant operator with A's stencil (of W's when not ``scaled``).

        A frequency k of the image grid maps to the block Σ_t w[:, :, t] exp(2πi k·(t·dilation − lo)/S); with circular
        padding these blocks are A exactly, with any other padding they are A away from the border.

        Returns:
            (F, G, C_out/G, C_in/G) complex128, F = frequencies of rfftn's half spectrum.

        Raises:
            ValueError: stride ≠ 1 or the spatial size changes, so that A has no symbol.
        """
        g, spatial = self.geometry, self.input_shape[1:] or (1,)
        if not self.has_symbol:
            raise ValueError(
                f"ConvBNOperator.symbol: needs stride 1 and equal spatial sizes, got stride {g.stride} and "
                f"{self.input_shape[1:]} -> {self.output_shape[1:]}"
            )
        weight = self._scaled_weight() if scaled else self.weight
        c_out, c_in = weight.shape[:2]
        flat = torch.zeros(1, dtype=torch.long, device="cpu")
        for axis, size in enumerate(self.input_shape[1:]):
            tap = (torch.arange(g.kernel[axis], device="cpu") * g.dilation[axis] - g.padding[axis][0]) % size
            flat = (flat[:, None] * size + tap).flatten()
        stencil = weight.new_zeros(c_out * c_in, math.prod(spatial))
        stencil.index_add_(1, flat.to(weight.device), weight.reshape(c_out * c_in, -1))
        spectrum = torch.fft.rfftn(stencil.reshape(-1, *spatial), dim=tuple(range(1, len(spatial) + 1))).conj()
        blocks = spectrum.reshape(g.groups, c_out // g.groups, c_in, -1)
        return blocks.permute(3, 0, 1, 2).resolve_conj().contiguous()

    def symbol_cond(self) -> float:
        """Largest over smallest singular value of the symbol: cond(A) for circular padding, its estimate for others."""
        sigma = torch.linalg.svdvals(self.symbol())
        return float(sigma.max() / sigma.min())

    def row_maxima(self) -> Tensor:
        """S_i = max_j |a_ij| (m,), float64, without the matrix (spec S11).

        Taps that read the same pixel (padding other than zeros) add up. Which of them coincide depends on the position
        only near the border, so an axis has few distinct patterns; each combination of patterns has one merged kernel.
        """
        g, weight = self.geometry, self._scaled_weight()
        result = weight.new_zeros(self.output_shape)
        patterns = [merge_patterns(g.sources(axis, size)) for axis, size in enumerate(self.input_shape[1:])]
        for combination in itertools.product(*patterns):
            merged = weight
            for axis, (merge, _) in enumerate(combination):
                merged = (merged.movedim(axis + 2, -1) @ merge.to(weight)).movedim(-1, axis + 2)
            largest = merged.abs().flatten(1).amax(1) if merged.numel() else weight.new_zeros(len(weight))
            grid = [torch.arange(len(weight), device=weight.device), *(p.to(weight.device) for _, p in combination)]
            index = [v.reshape([-1 if i == j else 1 for j in range(len(grid))]) for i, v in enumerate(grid)]
            result[tuple(index)] = largest.reshape(-1, *[1] * (len(grid) - 1))
        return result.flatten()
