"""A two-layer binary classifier (spec S4): Linear+BN → ReLU → Linear → sigmoid, on scikit-learn's breast cancer data.

python examples/binary_classifier.py [--epochs 20]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import convbn_ext as cb


def measurements() -> tuple[Tensor, Tensor]:
    """(569, 30) measurements, as they are: batch normalisation brings them to one scale; labels (569,) in {0, 1}."""
    bunch = load_breast_cancer()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(bunch.data, dtype=torch.float32)[order], torch.tensor(bunch.target, dtype=torch.float32)[order]


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the share of right answers on 142 tumours held out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    x, y = measurements()
    model = nn.Sequential(cb.LinearBN(30, 16, bias=False, activation="relu"), nn.Linear(16, 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(arguments.epochs):
        for batch in torch.randperm(len(x) - 142).add(142).split(61):
            loss = F.binary_cross_entropy_with_logits(model(x[batch]), y[batch])  # the sigmoid is in the loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    with torch.no_grad():
        accuracy = ((model.eval()(x[:142]).sigmoid() > 0.5) == y[:142].bool()).double().mean().item()
    print(f"accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    main()
