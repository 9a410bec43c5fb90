"""ResNet-18 on real images: crops of scikit-learn's two photographs, or CIFAR-10 in its binary version.

python examples/resnet18.py                            # which photograph is a crop from?
python examples/resnet18.py --cifar cifar-10-batches-bin --width 64 --epochs 10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convbn_ext as cb
from convbn_ext.demo import photograph_crops
from convbn_ext.experiment import cifar10_records


class Block(nn.Module):
    """Two 3×3 convolutions and a sum, as in He et al., 2016."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) → (N, c_out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(classes: int, width: int) -> nn.Sequential:
    """ResNet-18 for images of 32×32; ``width`` channels in its first stage (64 in the paper)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(Block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def load(cifar: Path | None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [0, 1] and labels (N,), shuffled."""
    if cifar is None:
        images = photograph_crops().float()
        labels = torch.arange(2).repeat_interleave(len(images) // 2)  # the first half is the first photograph
    else:
        classes, pixels = cifar10_records(cifar)
        images, labels = pixels.float() / 255, classes.long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the share of right answers on a fifth of the images, held out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, help="directory with data_batch_*.bin")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    images, labels = load(arguments.cifar)
    held_out = len(images) // 5
    model, report = cb.fuse(resnet18(int(labels.max()) + 1, arguments.width), report=True)
    print(str(report).splitlines()[0])
    images, model = images.contiguous(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    steps = arguments.epochs * -(-(len(images) - held_out) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    for epoch in range(arguments.epochs):
        model.train()
        for batch in torch.randperm(len(images) - held_out).add(held_out).split(64):
            if len(batch) > 1:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            accuracy = (model.eval()(images[:held_out]).argmax(1) == labels[:held_out]).double().mean().item()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    main()
