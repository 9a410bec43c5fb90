"""Normalisation of a convolution's output by other statistics than this process's channels, through the same kernels.

out = act((y − μ)·γ/√(σ² + ε) + β + residual)

group, layer, instance   μ, σ² per sample and group of channels:  y seen as (1, N·G, C/G·S) for the statistics and as
(1, N·C, S) for the rest; layer is one group, instance as many as channels  (spec S8)
several processes        μ, σ² per channel over the values of every process: one all-reduce of (count, mean, M2) in
the forward pass, one of (Σg, Σg·(y − μ)) in the backward pass
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from . import _C
from .activation import apply_activation

_NORMS = ("batch", "group", "layer", "instance")
_ops = torch.ops.convbn_ext


class Normalisation(NamedTuple):
    """What is not a tensor: groups of channels per sample (None: channels over the batch), processes, activation."""

    groups: int | None
    process_group: Any
    eps: float
    activation: str
    slope: float


def active_group(process_group: Any) -> Any:
    """The group over which to communicate (None: all processes), or None where this process is alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def merge_statistics(count: int, mean: Tensor, m2: Tensor, process_group: Any) -> tuple[int, Tensor, Tensor]:
    """Values, mean and Σ(y − mean)² of all processes together, from those of each.

    One all-reduce of a table with a row per process, so that the rows are merged in the same order everywhere and no
    precision is lost where mean ≫ std:  M2 = Σ M2ᵢ + Σ nᵢ·(meanᵢ − mean)².

    Args:
        count: values per channel here; may be 0.
        mean: (C,) in float64.
        m2: (C,) in float64.
        process_group: of torch.distributed.
    """
    table = mean.new_zeros(dist.get_world_size(process_group), 2 * len(mean) + 1)
    table[dist.get_rank(process_group)] = torch.cat([mean.new_tensor([count]), mean, m2])
    dist.all_reduce(table, group=process_group)
    counts, means, m2s = table[:, :1], table[:, 1 : len(mean) + 1], table[:, len(mean) + 1 :]
    total = counts.sum()
    mean = (counts / total * means).sum(0)
    return int(total), mean, m2s.sum(0) + (counts * (means - mean).square()).sum(0)


class _Normalize(torch.autograd.Function):
    """(y, γ, β, residual, bias) ↦ (out, μ, σ², count); a bias that batch statistics took away has gradient zero."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        bias: Tensor | None,
        options: Normalisation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        groups = options.groups
        if groups is not None:
            y = y.contiguous()
        rows = y if groups is None else _planes(y, len(y) * groups)
        count = rows.numel() // max(1, rows.shape[1])
        if rows.numel() > 0:
            mean, var = _ops.bn_statistics(rows)
        else:
            mean, var = (y.new_zeros(rows.shape[1], dtype=torch.float64) for _ in range(2))
        if options.process_group is not None:
            count, mean, m2 = merge_statistics(count, mean, var * count, options.process_group)
            if count < 2:
                raise ValueError(
                    f"conv_bn: training needs more than one value per channel, got {count} in all processes"
                )
            var = m2 / count
        ctx.options, ctx.count = options, count
        ctx.save_for_backward(y, weight, shift, residual, mean, var)
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        ctx.set_materialize_grads(False)
        values = torch.full((), count, device="cpu")
        ctx.mark_non_differentiable(mean, var, values)
        out = _ops.bn_apply(*_elements(ctx, y, weight, shift, residual, mean, var))
        return out.view(y.shape), mean, var, values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        y, weight, shift, residual, mean, var = ctx.saved_tensors
        bias = None if ctx.bias_like is None else y.new_zeros(ctx.bias_like[0], dtype=ctx.bias_like[1])
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(ctx, grad, y, weight, shift, residual), bias, None)
        groups = ctx.options.groups
        elements = _elements(ctx, y, weight, shift, residual, mean, var)
        view, _, scale = elements[:3]
        grad = grad.contiguous().view(view.shape) if groups is not None else grad
        sum_g, sum_gd = _ops.bn_backward_reduce(grad, *elements)
        invstd = _expand(ctx, torch.rsqrt(var + ctx.options.eps), y)

        def per_channel(v: Tensor, like: Tensor | None) -> Tensor | None:
            return None if like is None else v.view(-1, y.shape[1]).sum(0).to(like.dtype)

        grad_weight, grad_shift = per_channel(sum_gd * invstd, weight), per_channel(sum_g, shift)
        sums = torch.stack([scale * sum_g, scale * sum_gd])  # of γ̂·g and γ̂·g·(y − μ), for one element channel
        if ctx.options.process_group is not None:
            dist.all_reduce(sums, group=ctx.options.process_group)
        if groups is not None:  # over the channels of a group, for each of them
            sums = sums.view(2, -1, y.shape[1] // groups)
            sums = sums.sum(2, keepdim=True).expand_as(sums).reshape(2, -1)
        # dy = γ̂·g − Σγ̂g/m − (y − μ)·invstd²·Σγ̂g(y − μ)/m
        c, b = -sums[0] / ctx.count, -sums[1] * invstd.square() / ctx.count
        grad_y, grad_residual = _ops.bn_backward_apply(grad, *elements, scale, b, c)
        grad_y = grad_y.view(y.shape)
        return grad_y, grad_weight, grad_shift, None if residual is None else grad_residual.view(y.shape), bias, None


def _planes(y: Tensor, count: int) -> Tensor:
    """A contiguous (N, C, *) as (1, count, values); empty batches included."""
    return y.view(1, count, y.numel() // max(1, count))


def _expand(ctx: Any, per_row: Tensor, y: Tensor) -> Tensor:
    """Statistics of (sample, group) for every (sample, channel); those of channels as they are."""
    groups = ctx.options.groups
    return per_row if groups is None else per_row.repeat_interleave(y.shape[1] // groups)


def _elements(
    ctx: Any, y: Tensor, weight: Tensor | None, shift: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Any, ...]:
    """The arguments of the kernels: y as (N, C, *) or (1, N·C, S), and mean, scale and bias of each of its channels."""
    groups, (N, C) = ctx.options.groups, y.shape[:2]
    repeat = 1 if groups is None else N
    mean, invstd = _expand(ctx, mean, y), _expand(ctx, torch.rsqrt(var + ctx.options.eps), y)
    scale = invstd if weight is None else invstd * weight.double().repeat(repeat)
    bias = torch.zeros_like(scale) if shift is None else shift.double().repeat(repeat)
    if groups is not None:
        y = _planes(y, N * C)
        residual = None if residual is None else residual.contiguous().view(y.shape)
    return y, mean, scale, bias, residual, ctx.options.activation, ctx.options.slope


def _differentiable_gradients(
    ctx: Any, grad: Tensor, y: Tensor, weight: Tensor | None, shift: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients by torch's own operators, for second derivatives."""
    options = ctx.options
    if options.process_group is not None:
        raise NotImplementedError("conv_bn: second derivatives across processes are not available")
    v = F.group_norm(y, options.groups, weight, shift, options.eps)
    v = v if residual is None else v + residual
    slope = f"({options.slope})" if options.activation == "leaky_relu" else ""
    out = apply_activation(v, options.activation + slope)
    tensors = [t for t in (y, weight, shift, residual) if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(out, tensors, grad, create_graph=True))
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in (y, weight, shift, residual))


def normalize(
    y: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    options: Normalisation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise, scale, add the residual and activate.

    Args:
        y: (N, C, *), the convolution's output.
        weight: γ, (C,) or None.
        shift: β, (C,) or None.
        residual: of y's shape or None.
        bias: the convolution's where y comes without it, because batch statistics would take it away again.
        options: see :class:`Normalisation`.

    Returns:
        (out, mean, biased variance, values per statistic); contiguous for statistics of groups.
    """
    return _Normalize.apply(y, weight, shift, residual, bias, options)


def find_groups(norm: str, num_groups: int | None, channels: int) -> int | None:
    """Groups of channels that each sample has statistics for; None where channels have them over the batch."""
    if norm == "batch" and num_groups is None:
        return None
    if norm not in _NORMS:
        raise ValueError(f"conv_bn: norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    if (norm == "group") != (num_groups is not None):
        raise ValueError(f"conv_bn: num_groups must be given with norm='group' alone, got {num_groups!r} with {norm!r}")
    if num_groups is not None and (num_groups < 1 or channels % num_groups != 0):
        raise ValueError(f"conv_bn: num_groups must divide the {channels} output channels, got {num_groups}")
    return {"batch": None, "layer": 1, "instance": channels}.get(norm, num_groups)


def operators(*tensors: Tensor | None) -> Any:
    """torch.ops where somebody listens to it (a compiler, ``__torch_function__``), else the same without boxing."""
    return _ops if torch.compiler.is_compiling() or has_torch_function(tensors) else _C


def update_running(
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    mean: Tensor,
    var: Tensor,
    bias: Tensor | None,
    count: int,
    momentum: float,
) -> None:
    """Running ← (1 − momentum)·running + momentum·batch, with the unbiased variance and the convolution's bias.

    Args:
        running: running_mean, running_var and num_batches_tracked, which grows by one.
        mean: (C,) in float64.
        var: (C,) in float64, biased.
        bias: (C,) or None, the convolution's, which mean is without.
        count: values per channel.
        momentum: weight of the new batch.
    """
    if any(t is not None for t in running):
        shift = None if bias is None else bias.detach()
        operators(*running).update_running_statistics(*running, mean, var, shift, count, momentum)
