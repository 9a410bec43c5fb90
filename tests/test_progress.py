"""While a solve runs: its progress on standard error, ctrl-C, and other threads."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from layers import trained_layer
from systems import assert_other_threads_run

import convbn_ext as cb
from convbn_ext import cache


def test_progress_reports_on_standard_error(capsys):
    conv, bn, _, x = trained_layer((3, 6, 6), 2)
    cb.solve(conv, bn, x, method="gmres", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "solve: step" in captured.err
    assert "steps/s" in captured.err
    assert "residual" in captured.err


@pytest.mark.parametrize("method", ["gmres", "block_gmres", "direct"])
def test_other_threads_run_during_a_solve(method):
    """The GIL is free in the Arnoldi loop and while a factor is made: another thread gets its turns."""
    conv, bn, _, x = trained_layer((8, 24, 24), 8)
    options = {} if method == "direct" else {"preconditioner": "none", "maxiter": 60}
    cache.forget()
    assert_other_threads_run(lambda: cb.solve(conv, bn, x, method=method, rtol=1e-14, **options))


_INTERRUPTED = """
import os, signal, threading, torch
import convbn_ext as cb
from convbn_ext.direct import Layout, factorise
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
shape, options = {shape}, {options}
conv = torch.nn.Conv2d(shape[0], shape[0], 3, padding=1).double()
bn = torch.nn.BatchNorm2d(shape[0]).double().eval()
small = torch.nn.Conv2d(3, 3, 3, padding=1).double(), torch.nn.BatchNorm2d(3).double().eval()
cb.solve(*small, torch.randn(2, 3, 16, 16).double(), method="gmres")  # starts the pools that torch keeps
cb.solve(*small, torch.randn(2, 3, 16, 16).double(), method="direct")
x = torch.randn(2, *shape).double()
op = cb.ConvBNOperator(conv, bn, shape)
threads = len(os.listdir("/proc/self/task"))
print("ready", flush=True)
try:
    if isinstance(options, tuple):
        factorise(op, Layout(*options))
    else:
        cb.solve(conv, bn, x, rtol=1e-14, **options)
    print("came to an end", flush=True)
except KeyboardInterrupt:
    print("interrupted", threading.active_count(), len(os.listdir("/proc/self/task")) - threads, flush=True)
"""


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 32, 32), {"method": "gmres", "preconditioner": "none"}),
        ((16, 32, 32), {"method": "block_gmres", "preconditioner": "row"}),
        ((48, 40, 40), {"method": "direct"}),  # a border system of order 7488
        ((8, 80, 128), (0, 2, 40, 2048)),  # two threads, from both ends
        ((24, 16, 16), (0, 6144, 1, 6144)),  # the dense inverse
    ],
    ids=["gmres", "block_gmres", "border", "blocks", "dense"],
)
def test_ctrl_c_ends_a_solve_promptly_and_leaves_no_thread(shape, options):
    script = _INTERRUPTED.format(shape=shape, options=options)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(1)
        start = time.perf_counter()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted 1 0\n"
        assert time.perf_counter() - start < 2
        assert child.wait() == 0


def test_an_exception_in_a_callback_ends_a_solve():
    conv, bn, _, x = trained_layer((3, 8, 8), 2)

    def stop(residual):
        assert torch.is_tensor(residual)
        raise LookupError("enough")

    for method in ("gmres", "block_gmres", "direct"):
        with pytest.raises(LookupError, match="enough"):
            cb.solve(conv, bn, x, method=method, callback=stop)
