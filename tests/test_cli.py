"""The command line, run as users run it (in this process, with small settings)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import convbn_ext as cb
from convbn_ext.cli import main
from convbn_ext.demo import report


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Exit code, printed JSON and folder of a small demo."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "convbn_ext",
        "demo",
        "--out",
        folder / "d",
        "--json",
        "--epochs",
        "2",
        "--crops",
        "3",
    ]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # small work, and test machines are busy
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return done, folder / "d"


def test_demo_prints_and_writes_the_same_json(demo):
    done, folder = demo
    assert json.loads(done.stdout) == json.loads((folder / "demo.json").read_text())


def test_demo_json_has_every_figure(demo):
    found = json.loads(demo[0].stdout)
    digits = found["digits"]
    assert digits["accuracy_torch"] > 0.8  # two epochs only
    assert digits["accuracy_convbn"] > 0.8
    assert 0 <= digits["max_loss_difference"] < 1e-3
    assert digits["seconds_torch"] > 0
    assert digits["seconds_convbn"] > 0
    for dtype, error3 in (("float32", 1e-6), ("float64", 1e-10)):
        inverse = found["inverse"][dtype]
        assert inverse["converged"] is True
        assert inverse["statuses"] == {"converged": 3}
        assert inverse["iterations"] >= 0
        assert inverse["seconds"] > 0
        assert inverse["method"]
        for name in ("error1", "error2", "error3"):
            assert len(inverse[name]) == 3  # 1-, 2- and max-norm
            assert all(0 <= e < 1 for e in inverse[name])
        assert inverse["error3"][1] <= error3


def test_demo_draws_a_picture(demo):
    with Image.open(demo[1] / "demo.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # photographs, not an empty frame


def test_demo_prints_plain_lines_when_there_is_no_terminal(demo):
    progress = demo[0].stderr
    assert "digits, convbn: epoch 2/2 loss" in progress
    assert "\r" not in progress


def test_demo_report_for_people(demo):
    text = report(json.loads(demo[0].stdout))
    for words in ("the loss curves differ by at most", "3 converged", "1-norm", "error3  error2/‖x‖"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--crops", "0"], "convbn demo: --crops must be at least 1, got 0"),
        (["solve", "nowhere.pt"], "convbn solve: [Errno 2] No such file or directory: 'nowhere.pt'"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize("package", ["sklearn", "PIL", "matplotlib", "tqdm"])
def test_a_missing_demo_package_is_named(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ModuleNotFoundError
    assert main(["demo", "--out", str(tmp_path / "d")]) == 1
    assert capsys.readouterr().err.strip() == f"convbn demo needs {package}: pip install convbn_ext[demo]"
    assert not (tmp_path / "d").exists()


@pytest.fixture
def layer():
    """A ConvBN2d in float64 whose statistics are not the initial ones."""
    torch.manual_seed(0)
    layer = cb.ConvBN2d(2, 2, 3, padding=1, padding_mode="circular", activation="identity").double()
    layer(torch.randn(8, 2, 6, 5, dtype=torch.float64))
    return layer.eval()


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_solve_inverts_saved_tensors(suffix, layer, tmp_path, capsys):
    z = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    x = layer(z).detach()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    file = tmp_path / f"x{suffix}"
    torch.save(x, file) if suffix == ".pt" else np.save(file, x.numpy())
    command = [
        "solve",
        str(file),
        "--layer",
        str(tmp_path / "layer.pt"),
        "--padding-mode",
        "circular",
        "--rtol",
        "1e-12",
    ]
    assert main(command) == 0
    written = tmp_path / f"x_z{suffix}"
    found = torch.load(written) if suffix == ".pt" else torch.from_numpy(np.load(written))
    assert (found - z).abs().max() <= 1e-8
    assert "3 converged" in capsys.readouterr().out


def test_solve_recovers_an_image(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    assert main(["solve", str(tmp_path / "photo.png"), "--rtol", "1e-10"]) == 0
    with Image.open(tmp_path / "photo_z.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert "error3" in capsys.readouterr().out


def test_solve_that_does_not_converge_says_so(layer, tmp_path, capsys):
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    torch.save(torch.randn(1, 2, 6, 5, dtype=torch.float64), tmp_path / "x.pt")
    command = ["solve", str(tmp_path / "x.pt"), "--layer", str(tmp_path / "layer.pt"), "--method", "gmres"]
    assert main([*command, "--preconditioner", "none", "--maxiter", "1"]) == 1
    assert "1 maxiter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "is a tensor x: give the layer that made it, --layer FILE"),
        ({"weight": torch.zeros(1)}, "--layer has no bn.running_mean, bn.running_var, conv.weight; it has weight"),
    ],
)
def test_solve_says_what_the_layer_lacks(saved, message, tmp_path, capsys):
    torch.save(torch.zeros(1, 2, 4, 4), tmp_path / "x.pt")
    command = ["solve", str(tmp_path / "x.pt")]
    if saved is not None:
        torch.save(saved, tmp_path / "layer.pt")
        command += ["--layer", str(tmp_path / "layer.pt")]
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"convbn_ext {cb.__version__}"
