"""The experiment, in small: its solvers, its real-image loader, its files."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from convbn_ext import experiment


@pytest.fixture
def cifar(tmp_path):
    """Two small files in CIFAR-10's binary format and the pixels in them."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    records = np.concatenate([np.full((12, 1), 7, np.uint8), pixels.reshape(12, -1)], axis=1)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records[:8].tofile(folder / "data_batch_1.bin")
    records[8:].tofile(folder / "test_batch.bin")
    return tmp_path, pixels


def test_cifar_loader_reads_what_was_written(cifar):
    folder, pixels = cifar
    images = experiment.cifar10(folder)
    assert images.dtype == torch.float64
    assert np.array_equal((images * 255).round().byte().numpy(), pixels)


def test_cifar_loader_names_what_is_wrong(cifar):
    folder, _ = cifar
    with pytest.raises(ValueError, match="holds no data_batch_"):
        experiment.cifar10(folder / "nowhere")
    (folder / "data_batch_2.bin").write_bytes(b"0" * 5000)
    with pytest.raises(ValueError, match=r"data_batch_2.bin has 5000 bytes, not a multiple of 3073"):
        experiment.cifar10(folder)


@pytest.mark.parametrize("provider", experiment.PROVIDERS)
def test_every_provider_solves_a_random_batch(provider):
    conv, bn = experiment.initial_layer(0)
    z = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = experiment.trial("case", 0, provider, z, conv, bn, experiment.ours(conv, bn, provider))
    assert t.status == "converged"
    assert max(t.error3) <= 1e-9
    assert t.error1_2 <= 1e-6


def test_scipys_call_stagnates_where_ours_converge():
    """Restart 20 on eigenvalues that surround the origin: the reason for everything else."""
    conv, bn = experiment.initial_layer(0)
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = experiment.trial("case", 0, experiment.SCIPY, z, conv, bn, experiment.scipys(conv, bn, cycles=5))
    assert (t.status, t.iterations) == ("maxiter", 100)
    assert 0.05 < t.error3_2 < 1


def test_scipys_call_is_ended_where_it_stands_still():
    """A hundred cycles later its residual is the same to the last digits."""
    conv, bn = experiment.initial_layer(1)
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ended = experiment.trial("case", 0, experiment.SCIPY, z, conv, bn, experiment.scipys(conv, bn))
    assert ended.status == "stagnation"
    cycles = ended.iterations // 20 + 100
    longer = experiment.trial("case", 0, experiment.SCIPY, z, conv, bn, experiment.scipys(conv, bn, cycles, alone=True))
    assert (longer.status, longer.iterations) == ("maxiter", 20 * cycles)
    assert longer.error3_2 == pytest.approx(ended.error3_2, rel=1e-9)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_condition_number_is_that_of_the_matrix(padding):
    conv, bn = experiment.layer("trained", padding, torch.rand(64, 3, 8, 8, dtype=torch.float64))
    op = experiment.ConvBNOperator(conv, bn, (3, 8, 8))
    exact = float(torch.linalg.cond(op.to_sparse().to_dense()))
    assert experiment.condition_number(op) == pytest.approx(exact, rel=1e-3)


def test_quick_experiment_writes_everything(cifar, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "convbn_ext", "experiment", "--quick", "--out", out, "--cifar", cifar[0]]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert "CIFAR-10" in done.stdout
    assert (out / "findings.md").read_text() in done.stdout
    pictures = {"random_8x3x8x8.png", "random_16x3x8x8.png", "conditioning.png"}
    assert {p.name for p in out.glob("*.png")} == pictures
    with (out / "random.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["case"] for r in rows} == {"8x3x8x8", "16x3x8x8"}
    assert all(float(r["error3_2"]) <= 1e-9 for r in rows if r["provider"] == "auto")
    with (out / "conditioning.csv").open() as file:
        assert {(r["initialisation"], r["padding"]) for r in csv.DictReader(file)} == {
            (i, p) for i in experiment.INITIALISATIONS for p in experiment.PADDINGS
        }
