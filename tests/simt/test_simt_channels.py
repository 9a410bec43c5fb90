"""What is computed per channel, one launch each, against the formulas in float64."""

import pytest
import torch
from test_simt_bn import DTYPES, tensors

EPS = 1e-5


def vectors(channels, count):
    return [tensors((channels,), torch.float64, seed=i) for i in range(count)]


def run(sim, name, *arguments):
    sim.run(name, *arguments)
    assert not (reports := sim.reports()), reports


def check(result, exact):
    """Rounded once to the vector's dtype, subnormal numbers included."""
    info = torch.finfo(result.dtype)
    torch.testing.assert_close(result.double(), exact, rtol=info.eps, atol=max(1e-14, info.tiny * info.eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 37, 600])
def test_per_channel(sim, channels, dtype):
    sum_g, sum_gd, gamma, mean, var, bias, running_mean, running_var = vectors(channels, 8)
    var, running_var, code = var.square(), running_var.square().to(dtype), DTYPES[dtype]
    gamma, bias, running_mean = gamma.to(dtype), bias.to(dtype), running_mean.to(dtype)
    empty = torch.full((channels,), float("nan"), dtype=torch.float64)

    scale, shift = sim.output("scale", empty), sim.output("shift", empty)
    affine = (sim.input("weight", gamma), sim.input("bias", bias))
    run(sim, "bn_affine", channels, sim.input("var", var), *affine, code, EPS, scale, shift)
    check(scale.read(), gamma.double() / (var + EPS).sqrt())
    check(shift.read(), bias.double())
    run(sim, "bn_affine", channels, sim.input("var", var), None, None, code, EPS, scale, shift)
    check(scale.read(), 1 / (var + EPS).sqrt())
    check(shift.read(), torch.zeros(channels, dtype=torch.float64))

    s = gamma.double()
    inputs = [sim.input(str(i), t) for i, t in enumerate((sum_g, sum_gd, s, var))]
    grad_weight, grad_bias = (sim.output(name, empty.to(dtype)) for name in ("grad_weight", "grad_bias"))
    b, c = sim.output("b", empty), sim.output("c", empty)
    run(sim, "bn_parameter_gradients", channels, *inputs, EPS, 10.0, grad_weight, grad_bias, code, b, c)
    check(grad_weight.read(), sum_gd / (var + EPS).sqrt())
    check(grad_bias.read(), sum_g)
    check(b.read(), -s * sum_gd / ((var + EPS) * 10))
    check(c.read(), -s * sum_g / 10)

    moved_mean, moved_var = sim.output("running_mean", running_mean), sim.output("running_var", running_var)
    batches = sim.output("batches", torch.tensor([41]))
    batch = (sim.input("mean", mean), sim.input("var", var), 1.25, sim.input("bias", bias), 0.1)
    run(sim, "bn_move_running", channels, *batch, moved_mean, moved_var, code, batches)
    check(moved_mean.read(), 0.9 * running_mean.double() + 0.1 * (mean + bias.double()))
    check(moved_var.read(), 0.9 * running_var.double() + 0.1 * 1.25 * var)
    assert batches.read().tolist() == [42]
    run(sim, "bn_move_running", channels, *batch, None, None, code, None)  # nothing to move
    sim.close()
