"""The doctor of an installation that loads (tests/test_import.py has those that do not)."""

import os
import subprocess
import sys

import pytest
import torch

import convbn_ext
from convbn_ext.cli import main


def test_doctor_reports_this_installation(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    isa = torch.backends.cpu.get_cpu_capability()
    for words in (torch.__version__, isa, "OpenMP runtimes", "AMX", "CUDA architectures"):
        assert words in printed


def test_doctor_shows_the_instruction_set_that_was_chosen():
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-m", "convbn_ext", "doctor"]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    line = next(line for line in printed.splitlines() if line.startswith("instruction set"))
    assert line.split(maxsplit=2)[2] == "DEFAULT (ATEN_CPU_CAPABILITY=default)"


@pytest.mark.parametrize(
    ("built", "problem"),
    [
        ([], "the CUDA kernels are not built in"),
        (["sm_80"], "no kernel for this GPU (sm_90) is built in: TORCH_CUDA_ARCH_LIST=9.0"),
        (["sm_100", "compute_100"], "no kernel for this GPU"),  # later than this GPU
        (["sm_90"], None),
        (["sm_80", "compute_80"], None),  # PTX is compiled by the driver
        (["sm_90a"], None),
    ],
)
def test_doctor_compares_the_gpu_with_what_is_built(built, problem, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(convbn_ext._build_info, "CUDA_ARCHITECTURES", built, raising=False)
    assert main(["doctor"]) == (0 if problem is None else 1)
    assert (problem or "ok") in capsys.readouterr().out
