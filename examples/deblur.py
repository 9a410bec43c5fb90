"""Train a layer through its inverse: learn the blur of a camera from pairs of blurred and sharp photographs.

The sharp image is z with BN(Conv(z)) = x for the blurred x, so the loss ‖invert(conv, bn, x) − z‖² is small once the
layer is the camera. Every step solves for the batch with the present weights and once more with the transpose, for the
gradients in weight, bias, γ and β; afterwards the layer sharpens photographs that it has not seen.

    python examples/deblur.py [--steps 120]        (scikit-learn and pillow for the photographs; a few seconds)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convbn_ext as cb
from convbn_ext.demo import photograph_crops


def camera(z: Tensor) -> Tensor:
    """What the sensor sees of sharp images (N, 3, 32, 32): each colour is blurred differently, and the light is dim."""
    blur = torch.tensor([[1.0, 2.0, 1.0], [2.0, 8.0, 2.0], [1.0, 2.0, 1.0]])
    kernels = torch.stack([blur + centre * F.pad(torch.ones(1, 1), (1, 1, 1, 1)) for centre in (0, 2, 4)])
    kernels /= kernels.sum((1, 2), keepdim=True)
    return 0.8 * F.conv2d(z, kernels[:, None], padding=1, groups=3) + 0.05


def decibels(z: Tensor, sharp: Tensor) -> float:
    """Peak signal-to-noise ratio, −10·log₁₀ of the mean squared error."""
    return -10 * math.log10(F.mse_loss(z, sharp).item())


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; return the decibels of 32 unseen photographs as the camera gives them and as the layer sharpens them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    sharp = photograph_crops().float()
    sharp = sharp[torch.randperm(len(sharp))]
    blurred = camera(sharp)

    conv, bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3).eval()  # frozen statistics: an affine layer
    nn.init.dirac_(conv.weight)
    parameters = [*conv.parameters(), *bn.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    for step in range(arguments.steps):
        batch = torch.randint(32, len(sharp), (16,))
        loss = F.mse_loss(cb.invert(conv, bn, blurred[batch]), sharp[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.2e}", flush=True)

    with torch.no_grad():
        before, after = blurred[:32], cb.invert(conv, bn, blurred[:32])
    found = decibels(before, sharp[:32]), decibels(after, sharp[:32])
    print(f"32 unseen photographs: blurred {found[0]:.1f} dB, sharpened {found[1]:.1f} dB")
    return found


if __name__ == "__main__":
    main()
