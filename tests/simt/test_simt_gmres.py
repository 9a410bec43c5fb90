"""GMRES on simulated kernels against the CPU's: the whole cycle in one launch, and cycles of single verbs."""

import harness
import pytest
import torch
from layers import random_bn
from simulated_ops import simulated
from torch import nn

import convbn_ext as cb
from convbn_ext import _C
from convbn_ext.preconditioners import circulant_inverse

DTYPES = [torch.float32, torch.float64]

# shape of z, then the convolution: every padding mode, 1 to 3 axes, groups, dilation, one output per 2×2 pixels
LAYERS = {
    "zeros": ((3, 5, 7), {"kernel_size": 3, "padding": 1}),
    "circular, dilated": ((2, 6, 5), {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "circular"}),
    "reflect, grouped": ((4, 4, 6), {"kernel_size": (3, 5), "padding": (1, 2), "groups": 2, "padding_mode": "reflect"}),
    "replicate, 1-d": ((3, 37), {"kernel_size": 5, "padding": 2, "padding_mode": "replicate"}),
    "depthwise, 3-d": ((3, 3, 4, 3), {"kernel_size": 3, "padding": 1, "groups": 3}),
    "stride": ((1, 6, 8), {"out": 4, "kernel_size": 2, "stride": 2}),
}


def layer(shape, seed=0, out=None, **options):
    torch.manual_seed(seed)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1]
    conv = kind(shape[0], out or shape[0], **options).double()
    return cb.ConvBNOperator(conv, random_bn(len(shape) - 1, out or shape[0]), shape)


def right_hand_sides(n, count, dtype=torch.float64):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def compare(sim, A, b, *, cycle, shared_bytes=16 << 10, **options):
    """Both solvers on one problem: equal statuses, almost equal steps, true residuals, no report."""
    theirs = _C.gmres(A, b, **options)
    with simulated(sim, cycle=cycle, shared_bytes=shared_bytes) as ops:
        ours = _C.device_gmres(A, b, **options)
    assert ours.status == theirs.status
    for s, status in enumerate(ours.status):
        assert len(ours.history[s]) == ours.iterations[s] + 1
        assert abs(ours.iterations[s] - theirs.iterations[s]) <= theirs.iterations[s] // 20
        if status == "nonfinite":
            continue
        norm = float(b[s].double().norm())
        true = (b[s].double() - A.apply(ours.x[s : s + 1].double())[0]).norm()
        assert abs(float(ours.residual[s]) - float(true)) <= 100 * torch.finfo(b.dtype).eps * norm
        if status not in ("converged", "breakdown", "singular"):
            assert ours.residual[s] <= 2 * theirs.residual[s]
    return ours, theirs, ops


def error(x, exact):
    return float((x.double() - exact).norm(dim=1).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_one_launch_is_as_accurate_as_the_cpu_on_every_kind_of_layer(sim, name, dtype):
    """After six steps the iterates of all precisions are still the same: the 2× rule against float64."""
    shape, options = LAYERS[name]
    op = layer(shape, **options)
    b = right_hand_sides(op.shape[0], 2, dtype)
    ours, theirs, ops = compare(sim, op.map, b, cycle=True, maxiter=6, rtol=0.0)
    assert ops.launched == ["gmres_cycle"]
    assert ours.status == ["maxiter"] * 2
    exact = _C.gmres(op.map, b.double(), maxiter=6, rtol=0.0).x
    floor = 100 * torch.finfo(dtype).eps * float(exact.norm(dim=1).max())
    assert error(ours.x, exact) <= 2 * error(theirs.x, exact) + floor


@pytest.mark.parametrize("shared_bytes", [2 << 10, 6 << 10, 64 << 10], ids=["global", "partly shared", "shared"])
def test_one_launch_solves_wherever_the_basis_lies(sim, shared_bytes):
    op = layer((2, 4, 5), kernel_size=3, padding=1)
    b = right_hand_sides(40, 2)
    ours, _, _ = compare(sim, op.map, b, cycle=True, shared_bytes=shared_bytes, rtol=1e-10)
    assert ours.status == ["converged"] * 2
    exact = torch.linalg.solve(op.to_sparse().to_dense(), b.T).T
    assert error(ours.x, exact) <= 1e-7 * float(exact.norm())


def test_one_launch_with_row_scaling_restarts_and_refinement(sim):
    """D W with float32 vectors inside float64, in cycles of 12 steps from a start vector, to float64's accuracy."""
    op = layer((2, 4, 6), kernel_size=3, padding=1)
    A = _C.ComposedMap(_C.DiagonalMap(1 / op.row_maxima()), op.map)
    b, x0 = right_hand_sides(48, 4).split(2)
    options = {"rtol": 1e-11, "restart": 48, "inner_dtype": torch.float32}
    ours, _, ops = compare(sim, A, b, cycle=True, x0=x0, **options)
    assert ours.status == ["converged"] * 2
    assert set(ops.launched) == {"gmres_cycle"}
    assert ours.cycles > 1


def pathological():
    """A layer with a dead output channel, and right-hand sides that end in every way."""
    op = layer((2, 4, 5), kernel_size=3, padding=1)
    weight = op.weight.clone()
    weight[1] = 0
    A = op.geometry.conv_map(weight, (4, 5))
    b = right_hand_sides(40, 6)
    b[0, 20:] = 0  # what the dead channel cannot give is not asked for
    b[1] = 0
    b[2, 7] = float("nan")
    b[3, :20] = 0  # only the dead channel: singular
    b[4] *= 1e-13  # solved at the start
    return A, b


def cyclic_shift():
    """24 unknowns without progress before the last step."""
    weight = torch.zeros(1, 1, 3, dtype=torch.float64)
    weight[0, 0, 0] = 1
    return _C.ConvMap(weight, [1], [1, 1], [1], 1, "circular", [24]), torch.eye(24, dtype=torch.float64)[:1]


@pytest.mark.parametrize("cycle", [True, False], ids=["one launch", "verbs"])
def test_statuses_are_those_of_the_cpu(sim, cycle):
    A, b = pathological()
    ours, _, _ = compare(sim, A, b, cycle=cycle, rtol=1e-9, atol=1e-11, restart=25)
    assert {"converged", "nonfinite", "singular"} <= set(ours.status)
    assert ours.iterations[1] == ours.iterations[4] == 0


@pytest.mark.parametrize("cycle", [True, False], ids=["one launch", "verbs"])
def test_stagnation_and_extreme_scales(sim, cycle):
    """A circular shift makes no progress in 5 of 24 steps; a layer of size 1e-200 converges as it would at size 1."""
    assert compare(sim, *cyclic_shift(), cycle=cycle, restart=5)[0].status == ["stagnation"]
    op = layer((2, 3, 4), kernel_size=3, padding=1)
    tiny = op.geometry.conv_map(op.weight * 1e-200, (3, 4))
    ours, _, _ = compare(sim, tiny, right_hand_sides(24, 1), cycle=cycle, rtol=1e-9)
    assert ours.status == ["converged"]


def test_verbs_with_the_circulant_preconditioner(sim):
    """Vectors of two chunks with a tail; M through torch's FFT."""
    op = layer((1, 1040), kernel_size=3, padding=1)
    op.weight[0, 0, 1] += 2
    op.conv_map = op.geometry.conv_map(op.weight, (1040,))
    M = circulant_inverse(op, torch.float64)[0]
    for dtype in DTYPES:
        rtol = 1e-4 if dtype == torch.float32 else 1e-10
        ours, _, ops = compare(sim, op.conv_map, right_hand_sides(1040, 2, dtype), cycle=False, M=M, rtol=rtol)
        assert ours.status == ["converged"] * 2
        assert ops.launched.count("krylov_rotate") == max(ours.iterations)


def agree_bit_for_bit(sim, solver, cycle, **options):
    """One problem under every schedule."""
    op = layer((2, 4, 5), kernel_size=3, padding=1)
    b = right_hand_sides(40, 3, torch.float32)
    results = []
    for order in harness.ORDERS:
        sim.schedule(order)
        with simulated(sim, cycle=cycle):
            results.append(solver(op.map, b, rtol=0.0, **options))
    for other in results[1:]:
        assert torch.equal(other.x, results[0].x)
        assert other.history == results[0].history


@pytest.mark.parametrize("cycle", [True, False], ids=["one launch", "verbs"])
def test_schedules_agree_bit_for_bit(sim, cycle):
    agree_bit_for_bit(sim, _C.device_gmres, cycle, maxiter=8)
