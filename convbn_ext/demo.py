"""The two jobs of the package on real data: train a network on digits, recover image crops from a layer's output.

Data: scikit-learn's digits (1797 images of 8×8) and its two sample photographs, cut into crops of 3×32×32.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import errors
from .fuse import fuse
from .solve import SolveResult, solve

HELD_OUT = 450  # of the 1797 digits
BATCH = 64
CROP = 32
RTOL = {"float32": 1e-6, "float64": 1e-12}


class Progress:
    """A bar on a terminal, a plain line per step otherwise; both on stderr."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.bar = label, total, 0, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=label, leave=False)

    def step(self, note: str) -> None:
        """One step is done."""
        self.done += 1
        if self.bar is None:
            print(f"{self.label} {self.done}/{self.total} {note}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
            if self.done == self.total:
                self.bar.close()


# Job 1: the same network from the same start, with torch's modules and with ours


def network() -> nn.Sequential:
    """Three Conv+BN+SiLU, global mean, linear classifier: 1×8×8 → 10.

    SiLU is smooth, so rounding stays rounding. With ReLU the flat background of a digit crosses zero a step earlier in
    one run than in the other, and the loss curves part (by 1e-3 to 4e-2, measured).
    """
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.BatchNorm2d(c_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass
class Training:
    """What one training run leaves: loss of every step, accuracy on the held-out digits, seconds."""

    losses: list[float]
    accuracy: float
    seconds: float


def train(model: nn.Module, data: tuple[Tensor, ...], epochs: int, seed: int, label: str) -> Training:
    """SGD with momentum, batches of 64 in an order that depends on the seed alone.

    Args:
        model: (N, 1, 8, 8) → (N, 10).
        data: images and labels to train on, images and labels held out.
        epochs: passes over the training images.
        seed: of the order.
        label: name in the progress report.
    """
    images, labels, test_images, test_labels = data
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    progress, losses = Progress(f"digits, {label}: epoch", epochs), []
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        # a last batch that is not full is left out
        for batch in torch.randperm(len(images), generator=order).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        progress.step(f"loss {losses[-1]:.4f}")
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = (model.eval()(test_images).argmax(1) == test_labels).double().mean().item()
    return Training(losses, accuracy, seconds)


def digits(epochs: int, seed: int) -> dict[str, Training]:
    """Train both networks; the keys are ``torch`` and ``convbn``.

    On one thread: batches of 64×1×8×8 are too small to share, and threads that wait for each other only blur the times.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    torch.manual_seed(seed)
    order = torch.randperm(len(bunch.target))
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32)[order].unsqueeze(1)
    labels = torch.tensor(bunch.target)[order]
    data = (images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = network()
    models = {"torch": copy.deepcopy(start), "convbn": fuse(start)}
    for model in models.values():  # the first calls load libraries and fill caches
        copy.deepcopy(model)(images[:BATCH]).sum().backward()
    trained = {name: train(model, data, epochs, seed, name) for name, model in models.items()}
    torch.set_num_threads(threads)
    return trained


# Job 2: x = BN(Conv(z)) on real crops, and z recovered from x


@dataclass
class Recovery:
    """One inversion: the solver's result, the errors in three norms, seconds, and the images before and after."""

    result: SolveResult
    errors: dict[str, list[float]]
    seconds: float
    z_true: Tensor
    x: Tensor


def photograph_crops() -> Tensor:
    """Both sample photographs cut into (520, 3, 32, 32) float64 crops in [0, 1]."""
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).double() / 255
    windows = photographs.unfold(1, CROP, CROP).unfold(2, CROP, CROP)  # (image, row, column, channel, y, x)
    return windows.reshape(-1, 3, CROP, CROP)


def layer_on(crops: Tensor, seed: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Conv2d(3, 3, 3, padding=1) as initialised and BatchNorm2d whose statistics are gathered on the crops."""
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(3, 3, 3, padding=1).double(), nn.BatchNorm2d(3, momentum=None).double()
    with torch.no_grad():
        bn.train()(conv(crops))
    return conv, bn.eval()


def recover(z_true: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: str, method: str = "auto") -> Recovery:
    """Send (N, 3, 32, 32) crops through the layer and solve for them, all in one dtype."""
    scalar = getattr(torch, dtype)
    conv, bn, z_true = copy.deepcopy(conv).to(scalar), copy.deepcopy(bn).to(scalar), z_true.to(scalar)
    with torch.no_grad():
        x = bn(conv(z_true))
        if not sys.stderr.isatty():
            print(f"inverse, {dtype}, method {method}: {len(x)} crops", file=sys.stderr)
        start = time.perf_counter()
        result = solve(conv, bn, x, method=method, rtol=RTOL[dtype], progress=sys.stderr.isatty())
        seconds = time.perf_counter() - start
    found = errors(z_true, result.z, x, conv, bn)._asdict()
    return Recovery(result, {name: list(norms) for name, norms in found.items()}, seconds, z_true, x)


def inverse(count: int, seed: int) -> tuple[dict[str, Recovery], Recovery]:
    """Recover ``count`` crops in float32 and in float64, and four by GMRES, whose convergence is worth seeing."""
    crops = photograph_crops()
    conv, bn = layer_on(crops, seed)
    chosen = crops[torch.randperm(len(crops), generator=torch.Generator().manual_seed(seed))[:count]]
    return {dtype: recover(chosen, conv, bn, dtype) for dtype in RTOL}, recover(
        chosen[:4], conv, bn, "float64", "gmres"
    )


# What is written: the report, demo.json, demo.png


def summary(trained: dict[str, Training], recovered: dict[str, Recovery]) -> dict[str, Any]:
    """The contents of demo.json; every error is [1-norm, 2-norm, max-norm]."""
    ours, theirs = trained["convbn"], trained["torch"]
    return {
        "digits": {
            "accuracy_torch": theirs.accuracy,
            "accuracy_convbn": ours.accuracy,
            "max_loss_difference": max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)),
            "seconds_torch": theirs.seconds,
            "seconds_convbn": ours.seconds,
            "steps": len(ours.losses),
            "held_out": HELD_OUT,
        },
        "inverse": {
            dtype: {
                **recovery.errors,
                "converged": recovery.result.converged,
                "statuses": dict(Counter(recovery.result.status)),
                "iterations": int(recovery.result.iterations.max()),
                "seconds": recovery.seconds,
                "method": recovery.result.method,
                "reason": recovery.result.reason,
                "shape": list(recovery.x.shape),
                "rtol": RTOL[dtype],
            }
            for dtype, recovery in recovered.items()
        },
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def report(found: dict[str, Any]) -> str:
    """The same for people."""
    d = found["digits"]
    lines = [
        f"1. digits: the same network, {d['steps']} steps from the same start, {d['held_out']} images held out",
        *(
            f"   {name:<8}accuracy {100 * d[f'accuracy_{name}']:.2f} %   {d[f'seconds_{name}']:.2f} s"
            for name in ("torch", "convbn")
        ),
        f"   the loss curves differ by at most {d['max_loss_difference']:.1e}",
        "",
        "2. inverse: image crops z, layer output x = BN(Conv(z)), z recovered from x alone",
    ]
    for dtype, r in found["inverse"].items():
        statuses = ", ".join(f"{count} {status}" for status, count in r["statuses"].items())
        lines += [
            f"   {dtype}, {'×'.join(map(str, r['shape']))}: {statuses}; at most {r['iterations']} iterations, "
            f"{r['seconds']:.2f} s, method {r['method']} ({r['reason']})",
            f"   {'':<32}{'1-norm':>10}{'2-norm':>10}{'max-norm':>10}",
        ]
        for key, meaning in (
            ("error1", "‖z_true − z‖/‖z_true‖"),
            ("error2", "‖BN(Conv(z)) − x‖"),
            ("error3", "error2/‖x‖"),
        ):
            lines.append(f"   {key}  {meaning:<24}" + "".join(f"{value:>10.1e}" for value in r[key]))
    return "\n".join(lines)


def picture(
    trained: dict[str, Training], recovered: dict[str, Recovery], krylov: Recovery, path: Path, columns: int = 10
) -> None:
    """Original, layer output and recovered crops above the residuals of the solver and the losses of the training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = recovered["float64"]
    richest = shown.z_true.flatten(1).std(1).argsort(descending=True)[:columns]
    columns = len(richest)
    rows = {"original z": shown.z_true, "layer output x": _displayable(shown.x), "recovered z": shown.result.z}
    figure = plt.figure(figsize=(1.15 * columns + 1.2, 8.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.6, 4))
    top, bottom = parts
    top.suptitle(f"Crops through Conv2d(3, 3, 3, padding=1) + BatchNorm2d, and back ({shown.result.method}, float64)")
    for axes, (name, images) in zip(top.subplots(3, columns, squeeze=False), rows.items(), strict=True):
        for ax, image in zip(axes, images[richest], strict=True):
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name)

    residuals, losses = bottom.subplots(1, 2)
    lines = {f"{dtype}, {r.result.method}": r for dtype, r in recovered.items()}
    lines[f"float64, gmres, {krylov.result.preconditioner} preconditioner ({len(krylov.x)} crops)"] = krylov
    for (label, recovery), color in zip(lines.items(), ("tab:orange", "tab:blue", "0.4"), strict=True):
        low, middle, high = _residual_range(recovery.result.history)
        steps = range(len(middle))
        residuals.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
        marker = "o" if len(middle) < 30 else None  # a direct method refines a few times, GMRES takes hundreds of steps
        residuals.semilogy(steps, middle, color=color, marker=marker, label=label)
    residuals.set(
        xlabel="iteration", ylabel="‖x − BN(Conv(z))‖ / ‖x‖", title="Residuals: median and range of the crops"
    )
    residuals.legend()
    losses.semilogy(trained["torch"].losses, color="0.6", linewidth=3, label="torch modules")
    losses.semilogy(trained["convbn"].losses, color="tab:green", linewidth=1, label="convbn_ext")
    losses.set(xlabel="step", ylabel="cross entropy", title="Training on digits from the same start")
    losses.legend()
    for ax in (residuals, losses):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _residual_range(history: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest, median and largest residual per step; a sample that has finished keeps its last one."""
    length = max(map(len, history))
    curves = torch.stack([torch.cat([h, h[-1:].expand(length - len(h))]) for h in history])
    return curves.amin(0), curves.median(0).values, curves.amax(0)


def _displayable(x: Tensor) -> Tensor:
    """Map ±3 standard deviations of each channel to [0, 1]."""
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / (6 * std) + 0.5


def main(arguments: argparse.Namespace) -> int:
    """Run both jobs and write ``demo.json`` and ``demo.png`` into ``arguments.out``.

    Returns:
        0, or 1 when a crop did not converge.
    """
    for package in ("sklearn", "PIL", "matplotlib", "tqdm"):  # before the work, not after it
        importlib.import_module(package)
    for name, least in (("epochs", 1), ("crops", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    trained = digits(arguments.epochs, arguments.seed)
    recovered, krylov = inverse(arguments.crops, arguments.seed)
    found = summary(trained, recovered)
    written = json.dumps(found, indent=2, ensure_ascii=False)
    (arguments.out / "demo.json").write_text(written + "\n")
    picture(trained, recovered, krylov, arguments.out / "demo.png")
    print(written if arguments.json else f"{report(found)}\n\nwritten: {arguments.out}/demo.json, demo.png")
    return 0 if all(r["converged"] for r in found["inverse"].values()) else 1
