"""Where tests run: on the CPU and, where there is one, on a GPU (mark ``cuda``).

A test that takes ``device`` runs on both. The files of ON_DEFAULT_DEVICE name no device at all: on a GPU they run a
second time with the GPU as torch's default device. Without one this second run is one line of the summary.
"""

import os
from pathlib import Path

import pytest
import torch

import convbn_ext

# scripts that tests start find the package also where it is built in place and not installed
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(convbn_ext.__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


ON_DEFAULT_DEVICE = {
    *("test_conv_bn", "test_conv_bn_arguments", "test_conv_bn_training", "test_modules", "test_normalize"),
    *("test_fold", "test_fuse", "test_fuse_adjacent", "test_transforms", "test_golden"),
    *("test_solve", "test_methods", "test_invert", "test_progress", "test_receptive_field"),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
waiting_for_a_gpu: set[str] = set()


@pytest.fixture(scope="module")
def default_device(request):
    """torch's default device."""
    torch.set_default_device(request.param)
    yield
    torch.set_default_device("cpu")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)
    elif metafunc.module.__name__ in ON_DEFAULT_DEVICE and not metafunc.definition.get_closest_marker("cuda"):
        if torch.cuda.is_available():
            metafunc.fixturenames.append("default_device")
            metafunc.parametrize("default_device", DEVICES, indirect=True)
        else:
            waiting_for_a_gpu.add(metafunc.definition.nodeid)


def pytest_terminal_summary(terminalreporter):
    if waiting_for_a_gpu:
        terminalreporter.write_line(f"no GPU here: {len(waiting_for_a_gpu)} tests would run on it, too")


def pytest_configure(config):
    """Marks of SciPy's own tests, which test_gmres_python.py runs; which ones there are depends on the release."""
    for mark in ("fail_slow", "xfail_on_32bit", "skip_xp_backends", "uses_xp_capabilities", "parallel_threads_limit"):
        config.addinivalue_line("markers", f"{mark}: SciPy's")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
