"""Matrix products in blocks (csrc/cpu/block_product.cpp), as linear layers and contiguous 1×1 layers call them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_bn_case import assert_as_accurate, assert_threads_do_not_change_a_bit, bare_convolution

# One line per reason: (rows, inner, columns) of y = x wᵀ, or an image batch and its 1×1 weight.
CASES = {
    "one block": ((20, 30), (25, 30)),
    "blocks of rows": ((3000, 64), (48, 64)),
    "blocks of columns": ((40, 300), (2500, 300)),
    "blocks of both, the last ones smaller": ((333, 500), (417, 500)),
    "one column": ((4096, 600), (1, 600)),
    "one row": ((1, 600), (900, 600)),
    "samples": ((5, 40, 30, 30), (70, 40, 1, 1)),
    "one sample, blocks of its pixels": ((1, 64, 70, 70), (96, 64, 1, 1)),
}
cases = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def arguments(name, dtype):
    shape, weight_shape = CASES[name]
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    convolve = F.linear if x.dim() == 2 else F.conv2d
    return x, weight, torch.randn_like(convolve(x, weight)), convolve


@cases
@dtypes
def test_as_accurate_as_torch(name, dtype):
    x, weight, grad, convolve = arguments(name, dtype)

    def torchs(of):
        leaves = [t.to(of).requires_grad_() for t in (x, weight)]
        y = convolve(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(of))

    names = ["y", "dx", "dw"]
    for what, *three in zip(
        names, bare_convolution(x, weight, grad), torchs(dtype), torchs(torch.float64), strict=True
    ):
        assert_as_accurate(*three, dtype, what)


@cases
@dtypes
def test_threads_do_not_change_a_bit(name, dtype):
    x, weight, grad, _ = arguments(name, dtype)
    assert_threads_do_not_change_a_bit(lambda: bare_convolution(x, weight, grad))
