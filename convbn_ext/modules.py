"""Drop-in layers: plain nn.Conv and nn.BatchNorm children, one fused operator."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .activation import activation_module, apply_activation, parse_activation
from .conv_bn import conv_bn
from .geometry import Geometry
from .normalize import find_groups
from .sync import SYNCED, group_of, training_step

PAIRS: dict[type[Any], type[Any]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_INSTANCE: dict[type[Any], type[Any]] = {
    nn.Conv1d: nn.InstanceNorm1d,
    nn.Conv2d: nn.InstanceNorm2d,
    nn.Conv3d: nn.InstanceNorm3d,
}
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish)


def fused_call(
    conv: Any, bn: Any, input: Tensor, residual: Tensor | None, activation: str | nn.Module | None, memory: str
) -> Tensor:
    """act(bn(conv(input)) + residual) in one operator, with the running statistics updated once in training mode."""
    options: dict[str, Any] = {}
    if not isinstance(conv, nn.Linear):
        options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    if isinstance(bn, nn.modules.batchnorm._BatchNorm):
        counts, options["momentum"] = training_step(bn)
        options["training"] = bn.training or bn.running_mean is None
        options["process_group"] = group_of(bn)
        if counts or not bn.training:
            options["running_mean"], options["running_var"] = bn.running_mean, bn.running_var
        if counts:
            options["num_batches_tracked"] = bn.num_batches_tracked
    elif isinstance(bn, nn.GroupNorm):
        options["norm"], options["num_groups"] = "group", bn.num_groups
    else:
        options["norm"] = "instance"
    return conv_bn(
        input,
        conv.weight,
        conv.bias,
        bn_weight=bn.weight,
        bn_bias=bn.bias,
        eps=bn.eps,
        activation=activation,
        residual=residual,
        memory=memory,
        **options,
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls, and would miss them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_class(module: nn.Module) -> Any:
    """The module's class, without what :func:`fuse` made of it."""
    return getattr(type(module), "_plain_class", type(module))


def computes_as(module: nn.Module, kind: type[Any]) -> bool:
    """Whether a module computes what torch's class does, subclass or not."""
    cls = plain_class(module)
    same = all(getattr(cls, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    return same and isinstance(module, kind)


def belongs(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the two are a convolution and the batch normalisation of its dimension, over one process or several."""
    norm = next((norm for kind, norm in PAIRS.items() if computes_as(conv, kind)), None)
    return norm is not None and any(computes_as(bn, kind) for kind in (norm, SYNCED[norm], nn.SyncBatchNorm))


def is_convolution(module: nn.Module | None) -> bool:
    """An nn.Linear, nn.Conv or nn.ConvTranspose, also as a subclass with another forward."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def is_batch_norm(module: nn.Module | None) -> bool:
    """An nn.BatchNorm, also as a subclass with another forward."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_activation(module: nn.Module) -> bool:
    """An activation module that the fused operator has."""
    return plain_class(module) in _ACTIVATIONS and getattr(module, "approximate", "none") == "none"


def call_is_fused(
    conv: Any, bn: Any, input: Tensor, residual: Tensor | None, activation: str | nn.Module | None
) -> bool:
    """Whether the call is still one that the operator computes: modules may have been exchanged, hooks added."""
    if not belongs(conv, bn) or has_hooks(conv) or has_hooks(bn):
        return False
    if isinstance(activation, nn.Module) and (not is_activation(activation) or has_hooks(activation)):
        return False
    if input.dim() != conv.weight.dim() or (residual is not None and residual.dtype != input.dtype):
        return False
    if residual is None:
        return True
    spatial = Geometry.of(conv, "fuse").output_size(input.shape[2:])
    return tuple(residual.shape) == (input.shape[0], conv.weight.shape[0], *spatial)


def call_conv_bn(
    conv: Any,
    bn: Any,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | nn.Module | None = None,
    memory: str = "save",
) -> Tensor:
    """act(bn(conv(input)) + residual) for modules of a fused model: one operator, or the modules themselves.

    The modules are called where the operator is not what they compute: somebody has hooked or exchanged one of them, or
    the residual broadcasts.
    """
    if call_is_fused(conv, bn, input, residual, activation):
        return fused_call(conv, bn, input, residual, activation, memory)
    out = bn(conv(input))
    out = out if residual is None else out + residual
    return activation(out) if isinstance(activation, nn.Module) else apply_activation(out, activation)


class _ConvBN(nn.Module):
    """Children ``conv`` and ``bn`` hold all state, so state_dict keys are ``conv.*`` and ``bn.*``."""

    _conv_type: type[Any]
    conv: Any
    bn: Any

    def __init__(self, conv: Any, bn: Any, activation: str | nn.Module | None, memory: str) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self.activation = activation
        self.memory = memory
        parse_activation(activation)

    @classmethod
    def from_modules(
        cls, conv: Any, bn: Any, activation: str | nn.Module | None = None, *, memory: str = "save"
    ) -> Self:
        """Fuse existing modules; parameters and buffers are shared, not copied.

        Args:
            conv: the nn.Linear or nn.Conv that this class stands for.
            bn: the normalisation that follows it: nn.BatchNorm, nn.SyncBatchNorm, nn.GroupNorm or, without running
                statistics, nn.InstanceNorm.
            activation: a name or a torch module, see :func:`conv_bn`.
            memory: see :func:`conv_bn`.

        Raises:
            TypeError: conv or bn is of another class.
            ValueError: bn's features are not conv's output channels, an instance normalisation with running statistics,
                or an unknown activation.
        """
        bn_type = PAIRS[cls._conv_type]
        if not isinstance(conv, cls._conv_type):
            raise TypeError(f"{cls.__name__}: conv must be nn.{cls._conv_type.__name__}, got {type(conv).__name__}")
        instance = _INSTANCE.get(cls._conv_type, bn_type)
        if not isinstance(bn, bn_type | nn.SyncBatchNorm | nn.GroupNorm | instance):
            raise TypeError(
                f"{cls.__name__}: bn must be nn.{bn_type.__name__}, nn.SyncBatchNorm, nn.GroupNorm or "
                f"nn.{instance.__name__}, got {type(bn).__name__}"
            )
        if isinstance(bn, nn.modules.instancenorm._InstanceNorm) and bn.track_running_stats:
            raise ValueError(f"{cls.__name__}: bn must have track_running_stats=False to be nn.{type(bn).__name__}")
        channels = conv.weight.shape[0]
        features = bn.num_channels if isinstance(bn, nn.GroupNorm) else bn.num_features
        if features != channels:
            raise ValueError(f"{cls.__name__}: bn has {features} features, but conv has {channels} output channels")
        layer = cls.__new__(cls)
        _ConvBN.__init__(layer, conv, bn, activation, memory)
        return layer.train(bn.training)

    @classmethod
    def _normalisation(
        cls,
        norm: str,
        num_groups: int | None,
        channels: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        **options: Any,
    ) -> nn.Module:
        """The torch module that holds the state of a normalisation, see :func:`conv_bn`."""
        groups = find_groups(norm, num_groups, channels)
        if groups is None:
            return PAIRS[cls._conv_type](channels, eps, momentum, affine, track_running_stats, **options)
        if norm == "instance" and cls._conv_type in _INSTANCE:
            return _INSTANCE[cls._conv_type](channels, eps, affine=affine, **options)
        return nn.GroupNorm(groups, channels, eps, affine, **options)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(conv(input)) + residual), with the running statistics updated once in training mode."""
        conv, bn = self.conv, self.bn
        if input.dim() != conv.weight.dim():
            raise ValueError(
                f"{type(self).__name__}: input must have {conv.weight.dim()} dimensions, "
                f"a batch of {'vectors' if conv.weight.dim() == 2 else 'images'}, got shape {tuple(input.shape)}"
            )
        return fused_call(conv, bn, input, residual, self.activation, self.memory)

    def unfused(self) -> nn.Sequential:
        """The same layer in torch's own modules: ``conv`` and ``bn``, shared, then ``act``."""
        layer = nn.Sequential(OrderedDict(conv=self.conv, bn=self.bn, act=activation_module(self.activation)))
        layer.training = self.training  # not train(): a frozen bn stays frozen
        return layer

    def extra_repr(self) -> str:
        """Activation and memory mode."""
        return f"activation={self.activation!r}, memory={self.memory!r}"


class _ConvBNd(_ConvBN):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module | None = "identity",
        memory: str = "save",
        norm: str = "batch",
        num_groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        conv = self._conv_type(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        bn = self._normalisation(
            norm, num_groups, out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        super().__init__(conv, bn, activation, memory)


class ConvBN1d(_ConvBNd):
    """nn.Conv1d, nn.BatchNorm1d, residual sum and activation: (N, C_in, L) → (N, C_out, L_out)."""

    _conv_type = nn.Conv1d


class ConvBN2d(_ConvBNd):
    """nn.Conv2d, nn.BatchNorm2d, residual sum and activation: (N, C_in, H, W) → (N, C_out, H_out, W_out)."""

    _conv_type = nn.Conv2d


class ConvBN3d(_ConvBNd):
    """nn.Conv3d, nn.BatchNorm3d, residual sum and activation: (N, C_in, D, H, W) → (N, C_out, D_out, H_out, W_out)."""

    _conv_type = nn.Conv3d


class LinearBN(_ConvBN):
    """nn.Linear, nn.BatchNorm1d, residual sum and activation: (N, in_features) → (N, out_features)."""

    _conv_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module | None = "identity",
        memory: str = "save",
        norm: str = "batch",
        num_groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        bn = self._normalisation(
            norm, num_groups, out_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        super().__init__(linear, bn, activation, memory)
