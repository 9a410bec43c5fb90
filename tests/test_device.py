"""The package on the CPU and, where there is one, on a GPU: the same tests, and what only a GPU can show."""

import pytest
import torch
from layers import MODES, trained_layer
from systems import SOLVABLE, dense
from torch import nn

import convbn_ext as cb
from convbn_ext import _C

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def error(x, exact):
    """Largest deviation relative to the exact tensor's scale; NaN never passes."""
    return float((x.detach().cpu().double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("mode", MODES)
def test_conv_bn_and_its_gradients(device, dtype, layout, mode):
    """Training, 3 → 37 channels, odd sizes: our error ≤ 2× that of torch's own layers in this dtype."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 37, 3, padding=1, padding_mode=mode).double(), nn.BatchNorm2d(37).double()
    x, grad = torch.randn(3, 3, 9, 7).double(), torch.randn(3, 37, 9, 7).double()

    def run(layer, on, to):
        layer = layer.to(on, to).train()
        leaf = x.to(on, to, memory_format=layout, copy=True).requires_grad_()
        out = layer(leaf)
        out.backward(grad.to(on, to))
        return [out, leaf.grad, *(p.grad for p in layer.parameters())]

    def fresh(kind):
        modules = [nn.Conv2d(3, 37, 3, padding=1, padding_mode=mode).double(), nn.BatchNorm2d(37).double()]
        for new, old in zip(modules, (conv, bn), strict=True):
            new.load_state_dict(old.state_dict())
        return nn.Sequential(*modules, nn.ReLU()) if kind == "torch" else cb.ConvBN2d.from_modules(*modules, "relu")

    exact = [t.detach().double() for t in run(fresh("torch"), "cpu", torch.float64)]
    theirs, ours = run(fresh("torch"), device, dtype), run(fresh("ours"), device, dtype)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        if true.abs().max() > 1e-9:  # the bias in front of a batch normalisation has no gradient
            assert error(mine, true) <= 2 * error(other, true) + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("method", "preconditioner"),
    [("auto", "auto"), ("direct", "auto"), *((m, p) for m in ("gmres", "block_gmres") for p in ("circulant", "none"))],
)
def test_solve(device, dtype, method, preconditioner):
    conv, bn, _, x = trained_layer((3, 6, 5), 4, dtype, seed=1)
    conv, bn, x = conv.to(device), bn.to(device), x.to(device)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    result = cb.solve(conv, bn, x, method=method, preconditioner=preconditioner, rtol=rtol)
    assert result.z.device == x.device
    assert result.status == ["converged"] * 4
    residual = (bn(conv(result.z)).double() - x.double()).flatten(1).norm(dim=1)
    assert (residual <= (1 + 1e-3) * rtol * x.double().flatten(1).norm(dim=1) + 8 * torch.finfo(dtype).eps).all()


def test_statuses(device):
    conv, bn, _, x = trained_layer((2, 5, 5), 4, seed=2)
    x[1] = float("nan")
    conv, bn, x = conv.to(device), bn.to(device), x.to(device)
    assert cb.solve(conv, bn, x, method="gmres").status == ["converged", "nonfinite", "converged", "converged"]
    short = cb.solve(conv, bn, x, method="gmres", preconditioner="none", maxiter=2)
    assert short.status == ["maxiter", "nonfinite", "maxiter", "maxiter"]


def test_fft_lsq_and_the_gradient_of_invert(device):
    conv, bn, z, x = trained_layer((2, 4, 4), 2, seed=3, padding_mode="circular")
    conv, bn, x = conv.to(device), bn.to(device), x.to(device).requires_grad_()
    found = cb.invert(conv, bn, x, rtol=1e-12)
    assert error(found, z) <= 1e-8
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    step = 1e-6 * torch.randn(x.shape, dtype=x.dtype).to(device)
    change = cb.invert(conv, bn, x + step, rtol=1e-12) - cb.invert(conv, bn, x - step, rtol=1e-12)
    assert torch.allclose((2 * found * change / 2).sum(), (gradient * step).sum(), rtol=1e-5)
    wide, bn = nn.Conv2d(2, 3, 3, padding=1).double().to(device), nn.BatchNorm2d(3).double().eval().to(device)
    with torch.no_grad():
        x = bn(wide(found))
    assert cb.solve(wide, bn, x, method="lsq").converged


def test_gmres_on_torch_matrices(device):
    matrix = dense(SOLVABLE["nonsymmetric"]).to(device)
    b = torch.ones(60, dtype=torch.float64, device=device)
    y, info = cb.gmres(matrix, b, rtol=1e-10, restart=60)
    assert info == 0
    assert (b - matrix @ y).norm() <= 1e-10 * b.norm()


def test_fold(device):
    conv, bn, z, x = trained_layer((3, 6, 6), 2, torch.float32, seed=4)
    conv, bn = conv.to(device), bn.to(device)
    assert error(cb.fold(conv, bn)(z.to(device)), x.double()) <= 1e-5


def everything_on(conv, bn, x, z):
    """The package's calls, by name, on tensors of one device."""
    circular = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", dtype=x.dtype, device=x.device)
    circular.load_state_dict(conv.state_dict())
    wide = nn.Conv2d(2, 3, 3, padding=1, dtype=x.dtype, device=x.device)
    wide_bn = nn.BatchNorm2d(3, dtype=x.dtype, device=x.device).eval()
    op = cb.ConvBNOperator(conv, bn, z.shape[1:])
    A = op.to_sparse().to_dense()
    training = lambda memory, act: cb.ConvBN2d.from_modules(conv, bn, act, memory=memory).train()  # noqa: E731
    calls = {m: lambda m=m: cb.solve(conv, bn, x, method=m) for m in ("auto", "direct", "gmres", "block_gmres")}
    calls["no preconditioner"] = lambda: cb.solve(conv, bn, x, method="gmres", preconditioner="none")
    calls["fft"] = lambda: cb.solve(circular, bn, x, method="fft")
    calls["lsq"] = lambda: cb.solve(wide, wide_bn, wide_bn(wide(z)).detach(), method="lsq")
    calls["batch"] = lambda: cb.solve(conv, bn, x, stats="batch")
    calls["invert"] = lambda: cb.invert(conv, bn, x.clone().requires_grad_()).sum().backward()
    calls["operator"] = lambda: (op.to_sparse(), op.symbol_cond(), op.matvec(z[0].flatten()))
    calls["errors"] = lambda: cb.errors(z, z, x, conv, bn)
    calls["cb.gmres"] = lambda: cb.gmres(A, x[0].flatten())
    for memory, act in (("save", "relu"), ("chain", "relu"), ("recompute", "silu"), ("invert", "identity")):
        layer = training(memory, act)
        calls[memory] = lambda layer=layer: layer(z.clone().requires_grad_()).sum().backward()
    calls["fold"] = lambda: cb.fold(conv, bn)
    calls["fuse"] = lambda: cb.fuse(nn.Sequential(conv, bn, nn.ReLU()))(z)
    return calls


def test_tensors_may_lie_on_another_device_than_the_default_one(device):
    """With "meta" as torch's default, a tensor that is made without a device has no values, and the call fails."""
    conv, bn, z, x = trained_layer((2, 6, 6), 3, seed=7)
    calls = everything_on(*(t.to(device) for t in (conv, bn, x, z)))
    torch.set_default_device("meta")
    try:
        for call in calls.values():
            call()
    finally:
        torch.set_default_device("cpu")


def reference_layer(device):
    torch.manual_seed(5)
    conv = nn.Conv2d(2, 2, 3, padding=1).double().to(device)
    bn = nn.BatchNorm2d(2).double().eval().to(device)
    return cb.ConvBNOperator(conv, bn, (2, 8, 8))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_launch_and_single_verbs_agree_with_the_cpu(dtype):
    b = torch.randn(5, 128, dtype=torch.float64)
    theirs = _C.gmres(reference_layer("cpu").map, b, rtol=1e-10, inner_dtype=dtype)
    op = reference_layer("cuda")
    for A in (op.map, _C.CallableMap(op.map.apply)):  # a callable is no convolution: single verbs
        ours = _C.gmres(A, b.cuda(), rtol=1e-10, inner_dtype=dtype)
        assert ours.status == theirs.status
        assert error(ours.x, theirs.x) <= 1e-7
    assert _C.block_gmres(op.map, b.cuda(), rtol=1e-10, inner_dtype=dtype).status == theirs.status


@pytest.mark.cuda
def test_cycle_in_a_cuda_graph():
    """Captured once, replayed with another residual."""
    op = reference_layer("cuda")
    layer = (op.weight, None, [8, 8], [1, 1], [1, 1, 1, 1], [1, 1], 1, "zeros")
    r = torch.randn(3, 128, dtype=torch.float64, device="cuda")
    r /= r.norm(dim=1, keepdim=True)
    limits = torch.tensor([[1e-10, 99.0]] * 3, dtype=torch.float64, device="cuda")

    def run():
        return torch.ops.convbn_ext.gmres_cycle(r, limits, 64, 2.0**-52, *layer)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        u = run()
    r.copy_(r.flip(0))
    graph.replay()
    captured = u.clone()
    assert torch.equal(captured, run())


@pytest.mark.cuda
def test_another_stream_and_another_device():
    conv, bn, _, x = trained_layer((3, 6, 6), 3, seed=6)
    expected = cb.solve(conv, bn, x, method="gmres", rtol=1e-10).z
    device = f"cuda:{torch.cuda.device_count() - 1}"  # with two GPUs not the current one
    conv, bn, x = conv.to(device), bn.to(device), x.to(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        found = cb.solve(conv, bn, x, method="gmres", rtol=1e-10).z
    torch.cuda.synchronize(device)
    assert error(found, expected) <= 1e-7
    layer = cb.ConvBN2d.from_modules(conv, bn, "relu")
    assert error(layer(found), reference_output(conv, bn, expected)) <= 1e-8


def reference_output(conv, bn, z):
    conv, bn = conv.cpu(), bn.cpu()
    return torch.relu(bn(conv(z))).detach()
