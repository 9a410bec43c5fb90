"""Where tests run: a test that takes ``device`` runs on the CPU and, where there is one, on a GPU (mark ``cuda``)."""

import os
from pathlib import Path

import pytest
import torch

import convbn_ext

# scripts that tests start find the package also where it is built in place and not installed
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(convbn_ext.__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
