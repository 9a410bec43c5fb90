"""conv_bn with its own CUDA convolution and with torch's, as accurate as eager; and autocast of the operator itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import convbn_ext as cb

# dtype, unit that products are rounded to, activation
CASES = [
    (t, torch.finfo(t).eps, act) for t in (torch.float32, torch.bfloat16, torch.float16) for act in ("relu", "silu")
]
# tf32 where torch may use it, which its own algorithms do not always: with relu signs would change in ours alone
CASES.append((torch.float32, 2.0**-10, "silu"))
# input, weight, options: tails, both memory formats, groups, depthwise, borders, one axis, Linear
LAYERS = {
    "64->64": ((2, 64, 15, 17), (64, 64, 3, 3), {"padding": 1}),
    "3->37": ((3, 3, 33, 31), (37, 3, 5, 3), {"stride": (2, 1), "dilation": (1, 2), "padding": 2}),
    "1x1": ((4, 64, 14, 14), (256, 64, 1, 1), {}),
    "grouped, circular": ((2, 48, 9, 8), (96, 16, 3, 3), {"padding": 2, "groups": 3, "padding_mode": "circular"}),
    "depthwise, reflect": ((2, 40, 9, 8), (40, 1, 3, 3), {"padding": 1, "groups": 40, "padding_mode": "reflect"}),
    "one axis": ((5, 24, 50), (40, 24, 3), {"padding": 1, "padding_mode": "replicate"}),
    "Linear": ((70, 33), (20, 33), {}),
}


def eager(x, w, gamma, beta, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", activation="relu"):
    axes = x.dim() - 2
    if axes == 0:
        y = F.linear(x, w)
    else:
        x = F.pad(x, (padding,) * (2 * axes), "constant" if padding_mode == "zeros" else padding_mode)
        y = (F.conv1d if axes == 1 else F.conv2d)(x, w, None, stride, 0, dilation, groups)
    return getattr(F, activation)(F.batch_norm(y, None, None, gamma, beta, training=True))


def results(f, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.cuda
@pytest.mark.parametrize("algorithm", ["aten", "implicit_gemm", "auto"])
@pytest.mark.parametrize(("dtype", "eps", "activation"), CASES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_a_gpu(name, activation, dtype, eps, algorithm, monkeypatch):
    """As accurate as eager; twice the same bits; on the last device while the first is current."""
    monkeypatch.setenv("CONVBN_EXT_ALGORITHM", algorithm)
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(backend, "allow_tf32", eps > torch.finfo(dtype).eps)
    device = f"cuda:{torch.cuda.device_count() - 1}"
    torch.manual_seed(0)
    shape, weight, options = LAYERS[name]
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, weight, weight[:1], weight[:1])]
    exact_of = lambda *leaves: eager(*leaves, **options, activation=activation)  # noqa: E731
    grad = torch.randn_like(exact_of(*tensors))

    def ours(x, w, gamma, beta):
        return cb.conv_bn(x, w, bn_weight=gamma, bn_bias=beta, training=True, activation=activation, **options)

    exact = results(exact_of, tensors, grad)
    cast = [t.to(device, dtype) for t in tensors]
    cast_grad = grad.to(device, dtype)
    if len(shape) == 4:
        cast[0] = cast[0].to(memory_format=torch.channels_last)
    theirs, mine, again = (results(f, cast, cast_grad) for f in (exact_of, ours, ours))
    for e, t, m, a in zip(exact, theirs, mine, again, strict=True):
        error = lambda r, e=e: (r.cpu().double() - e).norm() / e.norm()  # noqa: E731
        assert error(m) <= 2 * error(t) + 4 * eps
        if algorithm == "implicit_gemm":
            assert torch.equal(m, a)


@pytest.mark.cuda
def test_an_unknown_algorithm_is_refused(monkeypatch):
    monkeypatch.setenv("CONVBN_EXT_ALGORITHM", "winograd")
    x, w = torch.randn(2, 3, 8, 8, device="cuda"), torch.randn(4, 3, 3, 3, device="cuda")
    with pytest.raises(ValueError, match="CONVBN_EXT_ALGORITHM must be auto, aten or implicit_gemm, got 'winograd'"):
        cb.conv_bn(x, w, training=True)


def test_autocast_of_the_operator_itself(device):
    """Input, weight and residual are cast, gradients come back in the leaves' dtype."""
    x, w, r = (torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 6, 6)))
    rest = (None, None, True, "save", [1, 1], [0] * 4, [1, 1], 1, "zeros", 1e-5, "relu", 0.0)
    forward = torch.ops.convbn_ext.conv_bn_forward
    with torch.autocast(device, torch.bfloat16):
        out, *_ = forward(x, w, None, None, None, r, *rest)
    assert out.dtype == torch.bfloat16
    expected, *_ = forward(x.bfloat16(), w.bfloat16(), None, None, None, r.bfloat16(), *rest)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == r.grad.dtype == torch.float32
