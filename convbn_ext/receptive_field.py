"""Receptive fields, by the closed form and by gradients.

Closed form: RF = 1 + Σ_l d_l (k_l − 1) ∏_{i<l} s_i  (Araujo, Norris and Sim, "Computing receptive fields of
convolutional neural networks", Distill 2019). By gradients: an input position belongs to the field of an output
position when some output channel there changes with some input channel here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def receptive_field(layers: Sequence[tuple[int, ...]]) -> int:
    """Size of the input window that one output position sees, along one axis.

    Args:
        layers: ``(kernel, stride)`` or ``(kernel, stride, dilation)`` of every convolution and pooling layer,
            input side first.

    Returns:
        Number of input positions; 1 for no layers.

    Raises:
        ValueError: a layer has another length or a value that is not a positive integer; the message names the layer.

    Example:
        >>> receptive_field([(3, 2), (3, 1)])
        7
    """
    field, jump = 1, 1
    for index, layer in enumerate(layers):
        k, s, d = _checked(index, layer)
        field += d * (k - 1) * jump
        jump *= s
    return field


def _checked(index: int, layer: tuple[int, ...]) -> tuple[int, int, int]:
    if not isinstance(layer, (tuple, list)) or len(layer) not in (2, 3):
        raise ValueError(
            f"receptive_field: layer {index} must be (kernel, stride) or (kernel, stride, dilation), got {layer!r}"
        )
    k, s, d = (*layer, 1) if len(layer) == 2 else layer
    for name, value in (("kernel", k), ("stride", s), ("dilation", d)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"receptive_field: layer {index} has {name} {value!r}, allowed are integers ≥ 1: {layer!r}"
            )
    return k, s, d


def receptive_field_of(
    model: nn.Module, layer: int | str | nn.Module, input_shape: Sequence[int], *, axis: int = -1
) -> int:
    """Size of the input window that one output position of a layer sees, found by gradients, for any model.

    Takes Z, the layer's output, in the middle of ``axis`` and counts the positions m between the first and the last
    with |∂ΣZ/∂X_m| > 0, both sums over everything but ``axis``. The field is a property of the wiring, so a copy of the
    model is used in which nothing cancels and nothing is dead: positive weights, no biases, evaluation mode, float64,
    and max-pooling replaced by the mean over the same window. Layers that mix all positions (global pooling, group or
    layer normalisation, attention) see the whole input.

    Args:
        model: called with one tensor; left as it is.
        layer: a child's index, a name from ``model.named_modules()`` or the module itself.
        input_shape: of the tensor the model is called with, (N, C, *spatial) or (C, *spatial).
        axis: spatial axis, the same in the input and in the layer's output.

    Returns:
        Number of input positions along ``axis``. When the window reaches the border of the input a warning says that
        a larger input may show a larger one.

    Raises:
        ValueError: the model has no such layer, its forward pass does not use it, or the layer's output has lost the
            axis; the message names the layer.
    """
    name = _layer_name(model, layer)
    network = _positive_copy(model)
    x = torch.ones(*input_shape, dtype=torch.float64, device=_device(network), requires_grad=True)
    z = _output_of(network, name, x)
    if z is None:
        raise ValueError(f"receptive_field_of: layer {name!r} is not used in the model's forward pass")
    if z.ndim != x.ndim:
        raise ValueError(
            f"receptive_field_of: layer {name!r} must keep the input's {x.ndim} axes, "
            f"its output has shape {tuple(z.shape)}"
        )
    (gradient,) = torch.autograd.grad(z.select(axis, z.shape[axis] // 2).sum(), x)
    seen = gradient.abs().transpose(axis, -1).flatten(0, -2).sum(0).nonzero()
    if len(seen) == 0:
        raise ValueError(f"receptive_field_of: the output of layer {name!r} does not depend on the input")
    first, last = int(seen[0]), int(seen[-1])
    if first == 0 or last == x.shape[axis] - 1:
        warnings.warn(
            f"receptive_field_of: the field of layer {name!r} reaches the border of the input "
            f"({x.shape[axis]} positions along axis {axis}); a larger input_shape may show a larger field",
            stacklevel=2,
        )
    return last - first + 1


def _layer_name(model: nn.Module, layer: int | str | nn.Module) -> str:
    if isinstance(layer, nn.Module):
        for name, module in model.named_modules():
            if module is layer:
                return name
        raise ValueError(f"receptive_field_of: the layer {layer} is not part of the model")
    if isinstance(layer, int):
        children = [name for name, _ in model.named_children()]
        if not -len(children) <= layer < len(children):
            raise ValueError(f"receptive_field_of: no layer {layer}, the model has {len(children)} children")
        return children[layer]
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise ValueError(f"receptive_field_of: no layer {layer!r}, the model has {shown}")
    return layer


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _positive_copy(model: nn.Module) -> nn.Module:
    """Copy whose layers average: positive input gives positive activations of the same size, at any depth."""
    network = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0 if p.ndim < 2 else 1.0 / max(1, p[0].numel()))
        for name, b in network.named_buffers():
            if name.endswith("running_mean"):
                b.zero_()
            elif name.endswith("running_var"):
                b.fill_(1.0)
    return network


class _Reached(Exception):
    """Ends the forward pass at the layer: what follows may not accept this input size."""


def _output_of(model: nn.Module, name: str, x: Tensor) -> Tensor | None:
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, (tuple, list)) else output)
        raise _Reached

    model.get_submodule(name).register_forward_hook(keep)
    try:
        with _MeanInsteadOfMax():
            model(x)
    except _Reached:
        return kept[0]
    return None


class _MeanInsteadOfMax(TorchFunctionMode):
    """Max-pooling sends the gradient to one position of its window; the window's mean sends it to all of them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        d = _MAX_POOLS.get(func)
        if d is None:
            return func(*args, **kwargs)
        mean = _mean_pool(d, *args, **{k: v for k, v in kwargs.items() if k != "return_indices"})
        return (mean, None) if func in _WITH_INDICES else mean


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_WITH_INDICES = (F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices)
_MAX_POOLS: dict[Callable[..., Any], int] = {
    **{f: d + 1 for d, f in enumerate((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d))},
    **{f: d + 1 for d, f in enumerate((F.max_pool1d, F.max_pool2d, F.max_pool3d))},
    **{f: d + 1 for d, f in enumerate(_WITH_INDICES)},
}


def _mean_pool(
    d: int,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Depthwise convolution with the window's indicator, of the same output size as the max-pooling."""
    k, p, dil = (_per_axis(v, d) for v in (kernel_size, padding, dilation))
    s = k if stride is None or stride == [] else _per_axis(stride, d)
    channels = x.shape[-d - 1]
    window = x.new_full((channels, 1, *k), 1.0)
    sides = [(p[i], p[i] + (s[i] - 1 if ceil_mode else 0)) for i in range(d)]
    padded = F.pad(x, [v for side in reversed(sides) for v in side])
    return _CONVOLUTIONS[d - 1](padded, window / window[0].numel(), None, s, 0, dil, channels)


def _per_axis(value: int | Sequence[int], d: int) -> tuple[int, ...]:
    return (value,) * d if isinstance(value, int) else tuple(value)
