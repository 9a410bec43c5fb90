"""Folding frozen batch normalisation into the convolution before it, for inference (spec S5)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .fuse import find, rebuild, unfuse
from .fuse_match import why_not_join
from .modules import computes_as

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold(conv: Any, bn: Any = None, *, example: Any = None) -> nn.Module:
    """One convolution equal to ``bn(conv(x))`` with bn in eval mode; of a whole model, a copy with every pair folded.

    Γ = γ/√(σ² + ε), α = β − Γμ;  Λ = Γ·W, bias = Γ·b + α   (spec S5). Computed in float64, stored in conv's dtype.

    Args:
        conv: nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, with or without bias, any groups; or a model.
        bn: batch normalisation with running statistics, with or without γ and β; None for a model.
        example: for a model whose forward torch.fx cannot trace, see :func:`fuse`.

    Returns:
        A new module of conv's class with a bias, in eval mode; conv and bn are left alone. For a model its copy in eval
        mode, with a folded convolution and an nn.Identity in the place of every pair that can be proven.

    Raises:
        TypeError: conv or bn is of another class.
        ValueError: bn keeps no running statistics, or its features are not conv's output channels.
    """
    if bn is None and isinstance(conv, nn.Module) and not isinstance(conv, _PLAIN + _TRANSPOSED):
        return _fold_model(conv, example)
    return _fold_pair(conv, bn)


def _why_not_fold(conv: Any, bn: Any, shared: set[int]) -> str | None:
    if not any(computes_as(conv, kind) for kind in _PLAIN + _TRANSPOSED) or bn.running_mean is None:
        return "not a pair that folds"
    return why_not_join(conv, bn, shared)


def _fold_model(model: nn.Module, example: Any) -> nn.Module:
    model = copy.deepcopy(unfuse(model)).eval()
    arguments = example if example is None or isinstance(example, tuple) else (example,)
    changed: dict[str, nn.Module] = {}
    for chain in find(model, arguments, _why_not_fold, "save")[2].fused:
        conv, bn = model.get_submodule(chain.conv), model.get_submodule(chain.bn)
        changed |= {chain.conv: _fold_pair(conv, bn), chain.bn: nn.Identity().eval()}
    return rebuild(model, lambda path, module: changed.get(path, module))


@torch.no_grad()
def _fold_pair(conv: Any, bn: Any) -> nn.Module:
    if not isinstance(conv, _PLAIN + _TRANSPOSED):
        raise TypeError(f"fold: conv must be nn.Linear, nn.Conv or nn.ConvTranspose, got {type(conv).__name__}")
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"fold: bn must be nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold: bn has no running statistics (track_running_stats=False)")
    channels = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    if bn.num_features != channels:
        raise ValueError(f"fold: bn has {bn.num_features} features, but conv has {channels} output channels")

    weight = conv.weight.double()
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -scale * bn.running_mean.double()
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    if conv.bias is not None:
        shift = shift + scale * conv.bias.double()

    if isinstance(conv, _TRANSPOSED):
        # weight (C_in, C_out/groups, *kernel): output channel c of group g is column c of its rows
        groups = conv.groups
        per_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], *weight.shape[2:])
        folded = per_group * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    else:
        folded = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    result = copy.deepcopy(conv).eval()
    dtype = conv.weight.dtype
    result.weight = nn.Parameter(folded.reshape(weight.shape).to(dtype), conv.weight.requires_grad)
    result.bias = nn.Parameter(shift.to(dtype), conv.weight.requires_grad)
    return result
