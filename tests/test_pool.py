"""Memory of large CPU tensors that the operators keep for the next step."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys

import pytest
import torch

import convbn_ext as cb
from convbn_ext import _C

ON = os.environ.get("CONVBN_EXT_POOL") != "0"
pytestmark = pytest.mark.skipif(not ON, reason="CONVBN_EXT_POOL=0")

MB = 2**20


@pytest.fixture
def fresh():
    gc.collect()
    cb.release_memory()
    return _C.pool_bytes()[0]


def step(layer, x):
    out = layer(x)
    out.backward(torch.ones_like(out))
    layer.zero_grad()
    x.grad = None


def test_later_steps_touch_no_fresh_memory(fresh):
    layer, x = cb.ConvBN2d(4, 16, 1, activation="relu"), torch.randn(8, 4, 128, 128, requires_grad=True)
    for _ in range(3):
        step(layer, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(layer, x)  # y and out: 8 MB = 2048 pages each; the incoming gradient is torch's
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2048 + 500
    live, kept = _C.pool_bytes()
    assert live == fresh
    assert kept >= 16 * MB
    cb.release_memory()
    assert _C.pool_bytes() == (fresh, 0)


def two_outputs(size):
    x, w = torch.randn(16, 4, size, size), torch.randn(16, 4, 1, 1)
    with torch.no_grad():
        return [cb.conv_bn(x, w, training=True) for _ in "ab"]


def test_never_holds_more_than_was_in_use_at_one_time(fresh):
    two_outputs(128)
    most = sum(_C.pool_bytes())  # the outputs, and what the convolution needs beside them
    cb.release_memory()
    for size in (64, 96, 128, 80, 112):
        two_outputs(size)
        assert 0 < sum(_C.pool_bytes()) <= most


def test_tensors_keep_their_values_and_outlive_everything(fresh):
    x, w = torch.randn(16, 4, 128, 128), torch.randn(8, 4, 1, 1)
    with torch.no_grad():
        first = cb.conv_bn(x, w, training=True)
        copy = first.clone()
        for _ in range(3):
            cb.conv_bn(torch.randn_like(x), w, training=True)
        cb.release_memory()
    assert torch.equal(first, copy)
    first.resize_(2 * first.numel())  # through torch's own storage functions
    assert torch.equal(first[: copy.numel()].view_as(copy), copy)


def test_nothing_else_comes_from_it(fresh):
    tensors = [torch.empty(4 * MB), torch.randn(1000, 1000)]
    assert _C.pool_bytes()[0] == fresh
    del tensors


def test_can_be_turned_off():
    code = (
        "import torch, convbn_ext as cb; from convbn_ext import _C\n"
        "out = cb.conv_bn(torch.randn(16, 4, 128, 128), torch.randn(8, 4, 1, 1), training=True)\n"
        "assert _C.pool_bytes() == (0, 0), _C.pool_bytes()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CONVBN_EXT_POOL": "0"}, timeout=120)
