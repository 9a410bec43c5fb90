"""A convolutional classifier of scikit-learn's digits, adopted by the fused operator in one line.

python examples/digits_classifier.py [--epochs 4]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import convbn_ext as cb


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels (1797,), shuffled."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(bunch.images / 16.0, dtype=torch.float32)[order].unsqueeze(1), torch.tensor(bunch.target)[order]


def network() -> nn.Sequential:
    """Three Conv+BN+ReLU, global mean, linear classifier: (N, 1, 8, 8) → (N, 10)."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the share of right answers on 450 digits held out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    images, labels = digits()
    model, report = cb.fuse(network(), report=True)  # the one line
    print(report)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(arguments.epochs):
        for batch in torch.randperm(len(images) - 450).add(450).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    folded = cb.fold(model)  # for inference: no batch normalisation left
    with torch.no_grad():
        accuracy = (folded(images[:450]).argmax(1) == labels[:450]).double().mean().item()
    print(f"accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    main()
