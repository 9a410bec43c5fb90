"""Every example runs, in small, and does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="installed without the examples")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images too small to share
    yield
    torch.set_num_threads(threads)


def test_digits_classifier(capsys):
    assert load("digits_classifier").main([]) > 0.9
    assert "fused 3 of 3 Conv+BN pairs" in capsys.readouterr().out


def test_binary_classifier():
    assert load("binary_classifier").main(["--epochs", "10"]) > 0.9


def test_resnet18_on_crops(capsys):
    assert load("resnet18").main(["--epochs", "8", "--width", "8"]) > 0.9  # narrower or shorter, roundings decide
    assert "fused 20 of 20 Conv+BN pairs" in capsys.readouterr().out


def test_resnet18_on_a_cifar_directory(tmp_path):
    """Three classes in CIFAR-10's binary format that differ in colour."""
    labels = np.arange(90, dtype=np.uint8) % 3
    pixels = np.random.default_rng(0).integers(0, 100, (90, 3, 1024), dtype=np.uint8)
    pixels[np.arange(90), labels] += 150
    np.concatenate([labels[:, None], pixels.reshape(90, -1)], axis=1).tofile(tmp_path / "data_batch_1.bin")
    assert load("resnet18").main(["--cifar", str(tmp_path), "--epochs", "20", "--width", "4"]) > 0.8


def test_deblur():
    """Training through the inverse; 120 steps would reach 33 dB."""
    blurred, sharpened = load("deblur").main(["--steps", "60"])
    assert blurred < 20
    assert sharpened > 25


def test_ddp_with_torchrun():
    """The losses are those of torch's own modules in one process with the whole batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLES / "ddp.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    done = subprocess.run([*command, "--steps", "20"], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same statistics as process 0: True") == 2
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    example = load("digits_classifier")
    torch.manual_seed(0)
    (images, labels), model, expected = example.digits(), example.network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in (torch.randperm(len(images)).split(128)[:-1] * 2)[:20]:
        expected.append(torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]))
        optimizer.zero_grad()
        expected[-1].backward()
        optimizer.step()
    assert losses == pytest.approx([expected[9].item(), expected[19].item()], abs=2e-3)
