"""Train a layer, then recover what went into it from what came out of it.

A classifier of 8×8 digits begins with Conv2d(1, 4, 3, stride=2, padding=1) and BatchNorm2d: 64 pixels become 4×4×4
numbers, so the trained layer is a square linear map and can be undone. ``solve`` finds the images z from the outputs
x = BN(Conv(z)) of images that training has not seen; ``invert`` is the same as a differentiable function.

    python examples/invert_trained_layer.py        (scikit-learn for the digits; a few seconds)
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import convbn_ext as cb


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and their classes."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def train(images: Tensor, classes: Tensor, epochs: int = 15) -> nn.Sequential:
    """A classifier whose first two modules are the layer that is inverted later."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(images[rows]), classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    """Train, invert, and say how well."""
    images, classes = digits()
    model = train(images[:1500], classes[:1500])
    unseen, conv, bn = images[1500:], model[0], model[1]
    with torch.no_grad():
        accuracy = (model(unseen).argmax(1) == classes[1500:]).double().mean()
        x = bn(conv(unseen))  # all that the inverse gets to see
    print(f"trained: {100 * accuracy:.1f} % of {len(unseen)} unseen digits are classified correctly")

    result = cb.solve(conv, bn, x, input_shape=(1, 8, 8))
    converged = result.status.count("converged")
    print(f"solved:  {converged} of {len(x)} converged, method {result.method} ({result.reason})")
    print(cb.errors(unseen, result.z, x, conv, bn))

    # Which image would give an output a little more like another one's? One adjoint solve differentiates z in x.
    x = x[:1].requires_grad_()
    z = cb.invert(conv, bn, x, input_shape=(1, 8, 8))
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    print(f"invert:  d ‖z‖² / dx has norm {float(gradient.norm()):.3g}")


if __name__ == "__main__":
    main()
