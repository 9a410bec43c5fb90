"""Linear+BN against numbers computed elsewhere, and the two conventions for running statistics."""

import json
import math
from pathlib import Path

import pytest
import torch

import convbn_ext as cb
from convbn_ext import reference

GOLDEN = Path(__file__).parent / "golden"
OPERATORS = {"fused": cb.conv_bn, "reference": reference.conv_bn}
NUMERIC = 1e-6  # the ReLU gradients were taken by central differences
FOUR_DIGITS = 5e-5 * (1 + math.sqrt(1.5))  # γ and out = γ x̂ are both rounded to four digits, and |x̂| ≤ √1.5


def load(name):
    values = json.loads((GOLDEN / name).read_text())
    return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in values.items()}


@pytest.fixture(params=OPERATORS.values(), ids=OPERATORS)
def conv_bn(request):
    return request.param


@pytest.fixture
def unbiased():
    """Golden data normalised by the unbiased standard deviation.

    Ours divides by the biased one, which is smaller by √((m−1)/m), so γ takes that factor and dγ takes it back.
    """
    golden = load("linear_bn_unbiased.json")
    m = len(golden["x"])
    golden["factor"] = math.sqrt((m - 1) / m)
    for activation in ("identity", "relu"):
        golden[activation] = {k: torch.tensor(v, dtype=torch.float64) for k, v in golden[activation].items()}
    return golden


def gradients(conv_bn, golden, activation):
    """dw, dγ, dβ in the golden convention, and the output."""
    weight = golden["w"].T.contiguous().requires_grad_()
    gamma, beta = golden["gamma"].clone().requires_grad_(), golden["beta"].clone().requires_grad_()
    out = conv_bn(
        golden["x"],
        weight,
        bn_weight=gamma * golden["factor"],
        bn_bias=beta,
        training=True,
        eps=0.0,
        activation=activation,
    )
    d_weight, d_gamma, d_beta = torch.autograd.grad(out, (weight, gamma, beta), golden["grad_output"])
    return d_weight.T, d_gamma, d_beta, out.detach()


def assert_close(ours, golden, tolerance):
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max()


def test_grad_output_is_that_of_the_loss(unbiased):
    assert_close(-2 * torch.outer(unbiased["residual"], unbiased["readout"]), unbiased["grad_output"], 1e-14)


def test_output_is_normalised_by_the_unbiased_deviation(conv_bn, unbiased):
    *_, out = gradients(conv_bn, unbiased, "identity")
    assert_close(out.mean(0), unbiased["beta"], 1e-14)
    assert_close(out.std(0, correction=1), unbiased["gamma"], 1e-14)


def test_gradients_of_gamma_and_beta(conv_bn, unbiased):
    _, d_gamma, d_beta, _ = gradients(conv_bn, unbiased, "identity")
    assert_close(d_beta, unbiased["identity"]["d_beta"], 1e-13)
    assert_close(d_gamma, unbiased["identity"]["d_gamma"], 1e-13)
    assert_close(unbiased["gamma"] * d_gamma, unbiased["identity"]["gamma_times_d_gamma"], 1e-13)


def test_gradients_behind_the_relu(conv_bn, unbiased):
    d_w, d_gamma, d_beta, _ = gradients(conv_bn, unbiased, "relu")
    assert_close(d_beta, unbiased["relu"]["d_beta"], NUMERIC)
    assert_close(d_gamma, unbiased["relu"]["d_gamma"], NUMERIC)
    assert_close(d_w, unbiased["relu"]["d_w"], NUMERIC)


def test_loss_through_autograd_gives_the_same(conv_bn, unbiased):
    """‖target − relu(γ x̂ + β)·readout‖² with the target that leaves the golden residual."""
    golden = unbiased
    weight = golden["w"].T.contiguous().requires_grad_()
    options = {"bn_weight": golden["gamma"] * golden["factor"], "bn_bias": golden["beta"], "training": True, "eps": 0.0}
    predicted = conv_bn(golden["x"], weight, activation="relu", **options) @ golden["readout"]
    target = predicted.detach() + golden["residual"]
    (d_weight,) = torch.autograd.grad((target - predicted).square().sum(), weight)
    assert_close(d_weight.T, golden["relu"]["d_w"], NUMERIC)


def test_rows(conv_bn):
    golden = load("linear_bn_rows.json")
    identity = torch.eye(4, dtype=torch.float64)
    options = {"bn_weight": golden["gamma"], "bn_bias": golden["beta"], "training": True, "eps": golden["eps"]}
    assert (conv_bn(golden["x"], identity, **options) - golden["out"]).abs().max() <= FOUR_DIGITS


def test_rows_through_the_module():
    golden = load("linear_bn_rows.json")
    layer = cb.LinearBN(4, 4, bias=False, eps=golden["eps"]).double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_({2: torch.eye(4), 1: golden["gamma"] if name.endswith("weight") else golden["beta"]}[p.ndim])
    assert (layer(golden["x"]) - golden["out"]).abs().max() <= FOUR_DIGITS


def test_running_statistics_convention(conv_bn):
    """Ours is PyTorch's: running = (1 − momentum)·running + momentum·batch, with the unbiased variance.

    The other one, running = p·running + (1 − p)·batch with the biased variance, is p = 1 − momentum and (m−1)/m of
    the batch's variance.
    """
    golden, momentum, m = load("linear_bn_unbiased.json"), 0.3, 10
    mean, var = torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    ours_mean, ours_var = mean.clone(), var.clone()
    conv_bn(
        golden["x"],
        golden["w"].T.contiguous(),
        running_mean=ours_mean,
        running_var=ours_var,
        training=True,
        momentum=momentum,
    )
    h = golden["x"] @ golden["w"]
    assert_close(ours_mean, 0.7 * mean + 0.3 * h.mean(0), 1e-14)
    assert_close(ours_var, 0.7 * var + 0.3 * h.var(0, correction=1), 1e-14)

    p = 1 - momentum
    other_mean, other_var = p * mean + (1 - p) * h.mean(0), p * var + (1 - p) * h.var(0, correction=0)
    assert_close(ours_mean, other_mean, 1e-14)
    assert_close((ours_var - p * var) * (m - 1) / m + p * var, other_var, 1e-14)
