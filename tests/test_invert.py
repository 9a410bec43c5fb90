"""Spec S12 and the differentiable inverse: gradients by finite differences, failures that raise, live statistics."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layers import BN, random_layer, trained_layer
from torch import nn

import convbn_ext as cb
from convbn_ext.errors import forward

TIGHT = {"rtol": 1e-12}


def inverse_of_everything(conv, bn, **options):
    """invert as a function of x and all parameters, with the modules rebuilt around given tensors."""

    def call(x, weight, bias, gamma, beta, mean, var):
        layer = type(conv).__new__(type(conv))
        layer.__dict__.update({**conv.__dict__, "_parameters": {"weight": weight, "bias": bias}})
        norm = type(bn).__new__(type(bn))
        norm.__dict__.update({**bn.__dict__, "_parameters": {"weight": gamma, "bias": beta}})
        return cb.invert(layer, norm, x, stats=(mean, var), **options)

    return call


def leaves(conv, bn, x):
    tensors = (x, conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "solver"),
    [
        ((2, 3, 4), 3, {"padding": 1}, {"method": "gmres"}),
        ((2, 3, 4), 3, {"padding": 1}, {"method": "direct"}),
        ((2, 3, 4), 3, {"padding": 1}, {"method": "block_gmres"}),
        ((2, 3, 4), 3, {"padding": 1}, {"method": "gmres", "preconditioner": "row"}),
        ((2, 3, 4), 3, {"padding": 1, "padding_mode": "circular"}, {"method": "fft"}),
        ((2, 3, 4), 3, {"padding": 1, "padding_mode": "reflect"}, {"method": "auto"}),
        ((4, 5), 3, {"padding": 1, "groups": 2, "padding_mode": "replicate"}, {"method": "auto"}),
    ],
)
def test_gradients_of_square_layers(shape, kernel, options, solver):
    conv, bn = random_layer(shape, shape[0], kernel, seed=5, **options)
    x = forward(torch.randn(2, *shape), conv, bn)
    assert torch.autograd.gradcheck(
        inverse_of_everything(conv, bn, **TIGHT, **solver), leaves(conv, bn, x), fast_mode=True
    )


@pytest.mark.parametrize(
    ("shape", "out", "options"),
    [((2, 4, 3), 1, {"padding": 1}), ((2, 5, 4), 2, {"padding": 1, "stride": 2}), ((1, 3, 3), 2, {"padding": 1})],
)
def test_gradients_of_least_squares(shape, out, options):
    """With more outputs than inputs the random x is one that no z can make: the least-squares z is differentiated."""
    conv, bn = random_layer(shape, out, 3, seed=6, **options)
    x = torch.randn_like(forward(torch.randn(2, *shape), conv, bn))
    call = inverse_of_everything(conv, bn, **TIGHT, input_shape=shape)
    assert torch.autograd.gradcheck(call, leaves(conv, bn, x), fast_mode=True)


@pytest.mark.parametrize(
    ("shape", "out", "solver"),
    [
        ((2, 1, 3), 2, {"method": "gmres"}),
        ((2, 1, 3), 2, {"method": "direct"}),
        ((2, 1, 3), 1, {}),
        ((1, 1, 3), 2, {}),
    ],
    ids=["gmres", "direct", "minimum norm", "least squares"],
)
def test_whole_jacobian_of_nonsymmetric_layers(shape, out, solver):
    """Every entry by finite differences (not fast mode), in x and all parameters."""
    conv, bn = random_layer(shape, out, (1, 3), seed=7, padding=(0, 1))
    A = cb.ConvBNOperator(conv, bn, shape).to_sparse().to_dense()
    assert A.shape[0] != A.shape[1] or float((A - A.T).norm()) > 0.1 * float(A.norm())
    x = torch.randn(1, out, *shape[1:], dtype=torch.float64)
    assert torch.autograd.gradcheck(inverse_of_everything(conv, bn, **TIGHT, **solver), leaves(conv, bn, x))


def test_gradients_of_minimum_norm_from_a_start_vector():
    conv, bn = random_layer((2, 4, 3), 1, 3, seed=6, padding=1)
    x, x0 = torch.randn(2, 1, 4, 3).double(), torch.randn(2, 2, 4, 3).double()
    assert torch.autograd.gradcheck(
        inverse_of_everything(conv, bn, **TIGHT, x0=x0), leaves(conv, bn, x), fast_mode=True
    )


def test_gradients_reach_the_modules_and_missing_parameters_are_no_problem():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(2, 2, 3, padding=1, bias=False).double(), BN[2](2, affine=False).double().eval()
    x = forward(torch.randn(2, 2, 4, 4), conv, bn).requires_grad_()
    cb.invert(conv, bn, x, **TIGHT).square().sum().backward()
    eps = 1e-6
    direction = torch.randn_like(conv.weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            conv.weight.add_(sign * eps * direction)
            values.append(float(cb.invert(conv, bn, x, **TIGHT).square().sum()))
            conv.weight.sub_(sign * eps * direction)
    assert float((conv.weight.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)
    assert x.grad.isfinite().all()


def test_float32_gradients():
    conv, bn, _, x = trained_layer((3, 8, 8), 4, torch.float32)
    x.requires_grad_()
    cb.invert(conv, bn, x).sum().backward()
    op = cb.ConvBNOperator(conv, bn, (3, 8, 8))
    exact = torch.linalg.solve(op.to_sparse().to_dense().double().T, torch.ones(192).double())
    assert x.grad.dtype == torch.float32
    assert (x.grad.double().flatten(1) - exact).norm(dim=1).max() <= 1e-3 * exact.norm()


def test_failures_raise_with_the_result():
    conv, bn, _, x = trained_layer((3, 8, 8), 3)
    with pytest.raises(cb.ConvergenceError, match=r"3 of 3 samples: 0: maxiter \(residual") as caught:
        cb.invert(conv, bn, x, method="gmres", maxiter=3)
    assert caught.value.result.status == ["maxiter"] * 3
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(cb.ConvergenceError, match="1 of 3 samples: 1: nonfinite"):
        cb.invert(conv, bn, x)
    with torch.no_grad():
        bn.weight[0] = 0
    with pytest.raises(cb.ConvergenceError, match=r"γ = 0 in channels \[0\]"):
        cb.invert(conv, bn, x)


def test_backward_failures_raise_too():
    conv, bn, z, x = trained_layer((3, 8, 8), 2)
    x.requires_grad_()
    found = cb.invert(conv, bn, x, x0=z, method="gmres", maxiter=3)  # solved by x0; the adjoint system is not
    with pytest.raises(cb.ConvergenceError, match="backward pass failed for samples 0: maxiter, 1: maxiter"):
        found.sum().backward()


def test_backward_of_least_squares_raises_where_gradients_do_not_exist():
    """A with a null space: the least-squares z is not unique, and a gradient along the null space has no answer."""
    conv, bn = random_layer((2, 3, 3), 3, 3, padding=1)
    with torch.no_grad():
        conv.weight[:, 1] = conv.weight[:, 0]  # z and its channels exchanged give one x
    x = forward(torch.randn(1, 2, 3, 3), conv, bn).requires_grad_()
    z = cb.invert(conv, bn, x, rtol=1e-8)
    with pytest.raises(cb.ConvergenceError, match="backward pass failed for samples 0: "):
        z[:, 0].sum().backward()


class Jacobi:
    """A preconditioner of the caller, M = (1 + ε) inverse of A, with its transpose; both count their calls."""

    def __init__(self, op):
        self.inverse = torch.linalg.inv(op.to_sparse().to_dense())
        self.calls = self.transposed = 0

    def __call__(self, r):
        self.calls += 1
        return (r.flatten(1) @ self.inverse.T).reshape(r.shape)

    def rmatvec(self, c):
        self.transposed += 1
        return (c.flatten(1) @ self.inverse).reshape(c.shape)


@pytest.mark.parametrize("method", ["gmres", "block_gmres"])
@pytest.mark.parametrize("transpose", [True, False])
def test_callable_preconditioner_in_the_adjoint_solve(method, transpose):
    """With ``rmatvec`` the caller's Mᵀ is used; without, the adjoint system is solved all the same."""
    conv, bn, _, x = trained_layer((2, 5, 5), 2)
    op = cb.ConvBNOperator(conv, bn, (2, 5, 5))
    M = Jacobi(op)
    x.requires_grad_()
    z = cb.invert(conv, bn, x, method=method, preconditioner=M if transpose else M.__call__, rtol=1e-10)
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    exact = (2 * z.detach().flatten(1)) @ M.inverse
    assert (gradient.flatten(1) - exact).norm() <= 1e-7 * exact.norm()
    assert 0 < M.calls <= 6
    assert (0 < M.transposed <= 6) == transpose


def test_vmap_over_extra_batch_dimensions():
    conv, bn, _, x = trained_layer((3, 6, 6), 2)
    X = torch.stack([x, 2 * x, x - 1]).requires_grad_()
    together = torch.func.vmap(lambda x: cb.invert(conv, bn, x, **TIGHT))(X)
    apart = torch.stack([cb.invert(conv, bn, x, **TIGHT) for x in X])
    torch.testing.assert_close(together, apart, rtol=1e-8, atol=1e-8)
    probe = torch.randn_like(apart)
    for got, expected in zip(
        *(torch.autograd.grad((z * probe).sum(), (X, conv.weight, bn.weight)) for z in (together, apart)), strict=True
    ):
        assert (got - expected).norm() <= 1e-7 * expected.norm()
    twice = torch.func.vmap(torch.func.vmap(lambda x: cb.invert(conv, bn, x, **TIGHT), in_dims=1), in_dims=2)
    moved = X.detach()[None].expand(2, -1, -1, -1, -1, -1).permute(2, 1, 0, 3, 4, 5)  # (N, 3, 2, C, H, W)
    torch.testing.assert_close(twice(moved)[1], apart.detach(), rtol=1e-8, atol=1e-8)


def test_what_vmap_cannot_do_is_refused():
    conv, bn, z, x = trained_layer((3, 6, 6), 2)
    for options in ({"stats": "batch"}, {"x0": z}):
        with pytest.raises(TypeError, match=r'stats="batch" and x0 do not work under torch\.func\.vmap'):
            torch.func.vmap(lambda x, options=options: cb.invert(conv, bn, x, **options))(x[None])
    with pytest.raises(TypeError, match=r"vmap over parameters or statistics of the layer"):
        torch.func.vmap(lambda mean: cb.invert(conv, bn, x, stats=(mean, bn.running_var)))(bn.running_mean[None])


def live_layer(N=6, dtype=torch.float64, **options):
    """A layer in training mode, its input and output; running_mean holds the batch mean, which is the gauge."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 3, 3, padding=1, **options).to(dtype), nn.BatchNorm2d(3, momentum=1.0).to(dtype)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.5, -0.7, 1.0]))
        bn.bias.copy_(torch.tensor([0.3, 0.0, -2.0]))
    z = torch.rand(N, 3, 8, 8, dtype=dtype)
    return conv, bn, z, bn(conv(z)).detach()


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_batch_statistics_recover_z(mode):
    conv, bn, z, x = live_layer(padding_mode=mode)
    before = {k: v.clone() for k, v in bn.state_dict().items()}
    result = cb.solve(conv, bn, x, stats="batch", rtol=1e-9)
    assert result.converged, result.reason
    y = conv(result.z)
    torch.testing.assert_close(
        nn.functional.batch_norm(y, None, None, bn.weight, bn.bias, True), x, rtol=1e-7, atol=1e-7
    )
    assert (result.z - z).norm() <= 1e-5 * z.norm()  # the variance in closed form is the true one
    assert float(re.search(r"var\(Conv\(z\)\) is σ² to (\S+)$", result.reason).group(1)) < 1e-6
    assert all(torch.equal(before[k], v) for k, v in bn.state_dict().items())


def test_batch_statistics_in_float32_are_consistent():
    conv, bn, _, x = live_layer(dtype=torch.float32)
    result = cb.solve(conv, bn, x, stats="batch")
    assert result.converged, result.reason
    live = nn.functional.batch_norm(conv(result.z).double(), None, None, bn.weight.double(), bn.bias.double(), True)
    assert (live - x).norm() <= 2e-6 * x.norm()


def test_impossible_outputs_are_inconsistent_with_the_channel_named():
    conv, bn, _, x = live_layer()
    shifted = x.clone()
    shifted[:, 1] += 0.1
    result = cb.solve(conv, bn, shifted, stats="batch")
    assert set(result.status) == {"inconsistent"}
    assert "channel 1: mean(x) = 0.1, but β = 0" in result.reason
    assert not result.converged
    stretched = x.clone()
    stretched[:, 2] = -2 + 1.01 * (x[:, 2] + 2)
    result = cb.solve(conv, bn, stretched, stats="batch")
    assert set(result.status) == {"inconsistent"}
    assert "channel 2: var((x − β)/γ) = 1.0198" in result.reason
    assert "channel 1" not in result.reason
    with pytest.raises(cb.ConvergenceError, match="inconsistent"):
        cb.invert(conv, bn, stretched, stats="batch")


def test_one_bad_sample_spoils_live_statistics():
    conv, bn, _, x = live_layer()
    x[2, 0, 0, 0] = math.nan
    assert cb.solve(conv, bn, x, stats="batch").status == ["nonfinite"] * 6


def test_batch_statistics_need_eps():
    conv, _, _, x = live_layer()
    with pytest.raises(ValueError, match='stats="batch" needs eps > 0'):
        cb.solve(conv, nn.BatchNorm2d(3, eps=0.0).double(), x, stats="batch")


def test_gradient_through_batch_statistics():
    """Along changes of z, which keep x possible, invert(forward(z)) is the identity up to the gauge."""
    conv, bn, z, _ = live_layer(N=3)
    bn.eps = 0.1  # σ² is then well determined
    z.requires_grad_()
    y = conv(z)
    x = nn.functional.batch_norm(y, None, None, bn.weight, bn.bias, True, eps=0.1)
    bn.running_mean.copy_(y.detach().mean((0, 2, 3)))
    found = cb.invert(conv, bn, x, stats="batch", rtol=1e-11)
    assert (found - z).norm() <= 1e-6 * z.norm()
    probe = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((found * probe).sum(), z)
    # what moves mean(Conv z) is undone by the gauge: A⁻ᵀ of the probe with its channel means taken out
    op = cb.ConvBNOperator(conv, bn, (3, 8, 8), stats=(bn.running_mean, y.detach().var((0, 2, 3), correction=0)))
    W = op.to_sparse().to_dense() / op.channel_vector(op.scale)[:, None]
    lam = torch.linalg.solve(W.T, probe.flatten(1).T).T.reshape(3, 3, 8, 8)
    expected = ((lam - lam.mean((0, 2, 3), keepdim=True)).flatten(1) @ W).reshape(z.shape)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_the_example_of_the_readme_recovers_unseen_images():
    script = Path(__file__).parent.parent / "examples" / "invert_trained_layer.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "solved:  297 of 297 converged" in done.stdout
    assert float(re.search(r"error1 .*?\s([\d.e+-]+)\n", done.stdout).group(1)) < 1e-3
    readme = (script.parent.parent / "README.md").read_text()
    assert "examples/invert_trained_layer.py" in readme
