"""Activations as users name them, as the operators take them, and in torch's own modules and functions."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu", "hardswish")


class Activation(NamedTuple):
    """An activation as the operators take it; slope counts for leaky_relu alone."""

    name: str
    slope: float = 0.0


def parse_activation(activation: str | nn.Module | None) -> Activation:
    """Read an activation given as a name, "leaky_relu(0.2)", or a plain torch module.

    Raises:
        ValueError: the activation is not one of identity, relu, leaky_relu, silu, gelu (exact), hardswish.
    """
    if isinstance(activation, str):
        if activation in _ACTIVATIONS:
            return Activation(activation, 0.01 if activation == "leaky_relu" else 0.0)
        match = re.fullmatch(r"leaky_relu\(([^()]+)\)", activation)
        if match:
            return Activation("leaky_relu", float(match.group(1)))
    if activation is None or isinstance(activation, nn.Identity):
        return Activation("identity")
    if isinstance(activation, nn.ReLU):
        return Activation("relu")
    if isinstance(activation, nn.LeakyReLU):
        return Activation("leaky_relu", float(activation.negative_slope))
    if isinstance(activation, nn.SiLU):
        return Activation("silu")
    if isinstance(activation, nn.GELU) and activation.approximate == "none":
        return Activation("gelu")
    if isinstance(activation, nn.Hardswish):
        return Activation("hardswish")
    raise ValueError(
        f"conv_bn: activation must be one of {', '.join(_ACTIVATIONS)} or leaky_relu(slope), got {activation!r}"
    )


def activation_module(activation: str | nn.Module | None) -> nn.Module:
    """The activation as torch's own module."""
    if isinstance(activation, nn.Module):
        return activation
    name, slope = parse_activation(activation)
    if name == "leaky_relu":
        return nn.LeakyReLU(slope)
    names = {"identity": "Identity", "relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "hardswish": "Hardswish"}
    return getattr(nn, names[name])()


def apply_activation(v: Tensor, activation: str | nn.Module | None) -> Tensor:
    """The activation in torch's own operators."""
    name, slope = parse_activation(activation)
    if name == "leaky_relu":
        return F.leaky_relu(v, slope)
    return v if name == "identity" else getattr(F, name)(v)
