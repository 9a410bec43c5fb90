"""``convbn solve``: recover z from x = BN(Conv(z)) for tensors in files, or show it on an image."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import errors
from .solve import solve

_CONVS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def read_layer(state: dict[str, Tensor], arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Convolution and batch normalisation of a saved ``ConvBN1d/2d/3d``, geometry from the command line, float64.

    Raises:
        ValueError: a key is missing, or the weight is no convolution's.
    """
    missing = {"conv.weight", "bn.running_mean", "bn.running_var"} - state.keys()
    if missing:
        raise ValueError(f"--layer has no {', '.join(sorted(missing))}; it has {', '.join(state)}")
    weight = state["conv.weight"]
    if weight.ndim not in (3, 4, 5):
        raise ValueError(f"--layer must hold a convolution, conv.weight has shape {tuple(weight.shape)}")
    d, c_out, kernel = weight.ndim - 3, weight.shape[0], tuple(weight.shape[2:])
    padding = arguments.padding
    if padding is None:
        padding = tuple(arguments.dilation * (k - 1) // 2 for k in kernel)
    conv = _CONVS[d](
        weight.shape[1] * arguments.groups,
        c_out,
        kernel,
        stride=arguments.stride,
        padding=padding,
        dilation=arguments.dilation,
        groups=arguments.groups,
        bias="conv.bias" in state,
        padding_mode=arguments.padding_mode,
        dtype=torch.float64,
    )
    bn = _NORMS[d](c_out, eps=arguments.eps, affine="bn.weight" in state, dtype=torch.float64)
    for prefix, module in (("conv.", conv), ("bn.", bn)):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(own, strict=False)
    return conv.eval(), bn.eval()


def default_layer(image: Tensor, arguments: argparse.Namespace) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Conv2d(3, 3, 3) as initialised from seed 0, and statistics gathered on the image itself."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding="same", padding_mode=arguments.padding_mode).double()
    bn = nn.BatchNorm2d(3, eps=arguments.eps, momentum=None).double()
    with torch.no_grad():
        bn.train()(conv(image))
    return conv, bn.eval()


def read_tensor(path: Path) -> Tensor | None:
    """The tensor of a .pt or .npy file; None for another file."""
    if path.suffix == ".npy":
        import numpy as np

        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix in (".pt", ".pth"):
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold a tensor, it holds {type(value).__name__}")
        return value
    return None


def read_image(path: Path, size: int) -> Tensor:
    """An image with its longer side scaled to ``size``, (1, 3, H, W) float64 in [0, 1]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((size, size))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0).double() / 255


def write(z: Tensor, path: Path) -> None:
    """Write a tensor (.pt, .npy) or, for any other suffix, the first sample as an image."""
    import numpy as np

    if path.suffix in (".pt", ".pth"):
        torch.save(z, path)
    elif path.suffix == ".npy":
        np.save(path, z.numpy())
    else:
        from PIL import Image

        pixels = (z[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte()
        Image.fromarray(pixels.numpy()).save(path)


def main(arguments: argparse.Namespace) -> int:
    """Solve, write z and report; the exit code is 1 unless every sample converged."""
    state = torch.load(arguments.layer, map_location="cpu", weights_only=True) if arguments.layer else None
    x, z_true = read_tensor(arguments.input), None
    if x is not None:
        if state is None:
            raise ValueError(f"{arguments.input} is a tensor x: give the layer that made it, --layer FILE")
        dtype, x = x.dtype, x.double()
        conv, bn = read_layer(state, arguments)
    else:
        z_true, dtype = read_image(arguments.input, arguments.size), torch.float64
        conv, bn = read_layer(state, arguments) if state is not None else default_layer(z_true, arguments)
        with torch.no_grad():
            x = bn(conv(z_true))

    start = time.perf_counter()
    result = solve(
        conv,
        bn,
        x,
        method=arguments.method,
        preconditioner=arguments.preconditioner,
        rtol=arguments.rtol,
        maxiter=arguments.maxiter,
    )
    seconds = time.perf_counter() - start
    z = result.z.detach()
    suffix = arguments.input.suffix if z_true is None else ".png"
    out = arguments.out or arguments.input.with_name(f"{arguments.input.stem}_z{suffix}")
    write(z.to(dtype), out)

    statuses = ", ".join(f"{count} {status}" for status, count in Counter(result.status).items())
    print(
        f"{tuple(x.shape)} -> {tuple(z.shape)}: {statuses}; {int(result.iterations.max())} iterations, {seconds:.2f} s"
    )
    print(f"method {result.method}: {result.reason}")
    print(f"largest relative residual {float(result.residual.max()):.1e}")
    if z_true is not None:
        print(errors(z_true, z, x, conv, bn))
    print(f"written: {out}")
    return 0 if result.converged else 1
