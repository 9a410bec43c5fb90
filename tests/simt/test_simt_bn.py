"""Every batch normalisation kernel, dtype and layout against float64: our error ≤ 2× torch's own + a rounding floor."""

from dataclasses import dataclass

import harness
import pytest
import torch
import torch.nn.functional as F

NAN = float("nan")
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
ACTIVATIONS = {
    "identity": lambda v: v,
    "relu": F.relu,
    "leaky_relu": lambda v: F.leaky_relu(v, SLOPE),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}
SLOPE = 0.1

# (N, C, H, W): one channel block and several, C and H·W that no pack divides, one sample, packs that need the tail.
SHAPES = [(3, 3, 7, 5), (1, 37, 9, 3), (2, 64, 4, 6), (3, 130, 2, 4), (1, 8, 33, 32), (70, 5, 1, 1)]


@dataclass
class Case:
    """One layer's tensors in the kernels' memory layout, and what float64 and torch make of them."""

    sim: harness.Simulator
    y: torch.Tensor  # (N, C, H, W)
    channels_last: bool
    activation: str = "relu"
    residual: torch.Tensor | None = None
    offset: int = 0  # bytes between a 16-byte boundary and every tensor

    def __post_init__(self):
        channels = self.y.shape[1]
        generator = torch.Generator().manual_seed(1)
        y = self.y.double()
        self.mean, self.var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        self.scale = torch.randn(channels, generator=generator, dtype=torch.float64) / (self.var + 1e-5).sqrt()
        self.bias = torch.randn(channels, generator=generator, dtype=torch.float64)
        self.grad = torch.randn(self.y.shape, generator=generator).to(self.y.dtype)

    def memory(self, t):
        """The tensor's memory order as a plain tensor."""
        return (t.movedim(1, -1) if self.channels_last else t).contiguous()

    def logical(self, t):
        return t.movedim(-1, 1) if self.channels_last else t

    def input(self, name, tensor):
        offset = self.offset if tensor.dim() == 4 else 0
        return self.sim.input(name, self.memory(tensor) if tensor.dim() == 4 else tensor, offset)

    def output(self, name, shape=None, dtype=torch.float64):
        if shape is not None:
            return self.sim.output(name, torch.full(shape, NAN, dtype=dtype))
        return self.sim.output(name, self.memory(torch.full_like(self.y, NAN)), self.offset)

    def problem(self, **tensors):
        """The leading arguments of every launcher (exports_bn.cpp)."""
        n, c, h, w = self.y.shape
        sizes = (n * h * w, c, 1) if self.channels_last else (n, c, h * w)
        buffers = {name: None if t is None else self.input(name, t) for name, t in tensors.items()}
        names = ("y", "residual", "grad", "out", "mean", "scale", "bias")
        code = list(ACTIVATIONS).index(self.activation)
        return (
            DTYPES[self.y.dtype],
            int(self.channels_last),
            *sizes,
            code,
            SLOPE,
            *(buffers.get(name) for name in names),
        )

    def scratch(self, problem):
        return self.output("scratch", (self.sim.call("bn_scratch_size", *problem),))

    def affine(self, y):
        """act's argument, in y's dtype and torch's order of operations."""
        shape = (1, -1, 1, 1)
        mean, scale, bias = (t.to(y.dtype).view(shape) for t in (self.mean, self.scale, self.bias))
        v = (y - mean) * scale + bias
        return v if self.residual is None else v + self.residual.to(y.dtype)

    def act(self, v):
        return ACTIVATIONS[self.activation](v)


def error(result, exact):
    """Largest error; not a number is an infinite error."""
    difference = (result.double() - exact).abs()
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def floor(exact, dtype, terms=1):
    """The error of rounding the exact result once (or `terms` times, for a sum)."""
    return terms * torch.finfo(dtype).eps * max(exact.abs().max().item(), 1e-30)


def tensors(shape, dtype, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def run_everything(case):
    """All five kernels of one layer; logical results by name, traffic and footprints by launcher."""
    sim, results, traffic, footprints = case.sim, {}, {}, {}

    def run(name, problem, *more):
        sim.run(name, *problem, *more)
        assert not (reports := sim.reports()), reports
        traffic[name], footprints[name] = sim.traffic(), sim.footprints()

    vector = (case.y.shape[1],)
    parameters = {"mean": case.mean, "scale": case.scale, "bias": case.bias}

    problem = case.problem(y=case.y)
    mean, var = case.output("mean_", vector), case.output("var_", vector)
    run("bn_statistics", problem, case.scratch(problem), mean, var)
    results |= {"mean": mean.read(), "var": var.read()}

    out = case.output("out_")
    run("bn_apply", case.problem(y=case.y, residual=case.residual, **parameters), out)
    results["out"] = case.logical(out.read())

    backward = {"y": case.y, "residual": case.residual, "grad": case.grad, **parameters}
    problem = case.problem(**backward)
    sum_g, sum_gd = case.output("sum_g", vector), case.output("sum_gd", vector)
    run("bn_backward_reduce", problem, case.scratch(problem), sum_g, sum_gd)
    results |= {"sum_g": sum_g.read(), "sum_gd": sum_gd.read()}

    a, b, c = (case.input(name, tensors(vector, torch.float64, seed=i)) for i, name in enumerate("abc"))
    grad_y = case.output("grad_y")
    grad_residual = None if case.residual is None else case.output("grad_residual")
    run("bn_backward_apply", problem, a, b, c, grad_y, grad_residual)
    results["grad_y"] = case.logical(grad_y.read())
    if grad_residual:
        results["grad_residual"] = case.logical(grad_residual.read())

    if case.activation in ("identity", "leaky_relu"):
        y = case.output("y_")
        problem = case.problem(
            out=case.act(case.affine(case.y.double())).to(case.y.dtype), residual=case.residual, **parameters
        )
        run("bn_invert", problem, y)
        results["inverse"] = case.logical(y.read())
    sim.close()
    return results, traffic, footprints


def expected(case, dtype):
    """The same results by torch in `dtype`, sums in float64 of terms in arithmetic precision."""
    y = case.y.to(dtype).requires_grad_()
    v = case.affine(y)
    out = case.act(v)
    (g,) = torch.autograd.grad(out, v, case.grad.to(dtype))
    shape = (1, -1, 1, 1)
    d = y.detach() - case.mean.to(dtype).view(shape)
    a, b, c = (tensors((case.y.shape[1],), torch.float64, seed=i).to(dtype).view(shape) for i in range(3))
    results = {
        "mean": y.detach().mean((0, 2, 3)),
        "var": y.detach().var((0, 2, 3), correction=0),
        "out": out.detach(),
        "sum_g": g.sum((0, 2, 3)),
        "sum_gd": (g * d).sum((0, 2, 3)),
        "grad_y": a * g + b * d + c,
    }
    if case.residual is not None:
        results["grad_residual"] = g
    return results


def check(case, results):
    exact, theirs = expected(case, torch.float64), expected(case, case.y.dtype)
    arithmetic = torch.float64 if case.y.dtype == torch.float64 else torch.float32
    roundings = 8 if case.y.dtype == torch.float64 else 2  # in float64 the reference itself is rounded
    sizes = {  # what a sum's rounding is relative to: the sum of its terms' sizes
        "mean": case.y.double().abs().mean(),
        "var": case.var.max(),
        "sum_g": case.grad.double().abs().sum((0, 2, 3)).max(),
        "sum_gd": (case.grad.double() * (case.y.double() - case.mean.view(1, -1, 1, 1))).abs().sum((0, 2, 3)).max(),
    }
    for name, reference in exact.items():
        if name in sizes:
            limit = 2 * error(theirs[name], reference) + roundings * torch.finfo(arithmetic).eps * sizes[name].item()
        else:
            limit = 2 * error(theirs[name], reference) + floor(reference, case.y.dtype, roundings)
        assert error(results[name], reference) <= limit, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_accurate_as_torch(sim, shape, channels_last, dtype):
    case = Case(sim, tensors(shape, dtype, mean=0.5), channels_last, residual=tensors(shape, dtype, seed=2))
    check(case, run_everything(case)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(sim, activation, channels_last, dtype):
    case = Case(sim, tensors((2, 12, 5, 4), dtype), channels_last, activation)
    results = run_everything(case)[0]
    check(case, results)
    if "inverse" in results:  # as good as the rounding of out allows
        scale = case.scale.abs().min().item() * (SLOPE if activation == "leaky_relu" else 1)
        limit = 2 * floor(case.act(case.affine(case.y.double())), dtype) / scale + floor(case.y.double(), dtype)
        assert error(results["inverse"], case.y.double()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_misaligned_tensors_go_scalar_by_scalar(sim, channels_last, dtype):
    case = Case(sim, tensors((2, 8, 4, 4), dtype), channels_last, offset=dtype.itemsize)
    results, traffic, _ = run_everything(case)
    check(case, results)
    for row in traffic["bn_apply"]:
        if row.region in ("y", "out_"):
            assert row.bytes <= 32 * dtype.itemsize * row.requests


@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_statistics_keep_their_digits_when_the_mean_is_large(sim, channels_last):
    case = Case(sim, tensors((4, 6, 9, 8), torch.float32, mean=1e4), channels_last)
    results = run_everything(case)[0]
    assert error(results["mean"], case.mean) <= 1e-7 * case.mean.abs().max().item() * 1e-1
    assert error(results["var"], case.var) <= 1e-5 * case.var.max().item()
    check(case, results)


@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_backward_reads_the_sign_from_out(sim, channels_last):
    """With out given, relu's mask needs no residual."""
    shape = (2, 12, 5, 4)
    case = Case(sim, tensors(shape, torch.float32), channels_last, residual=tensors(shape, torch.float32, seed=2))
    exact = expected(case, torch.float64)
    out = case.act(case.affine(case.y))
    problem = case.problem(y=case.y, grad=case.grad, out=out, mean=case.mean, scale=case.scale, bias=case.bias)
    sum_g, sum_gd = case.output("sum_g", (12,)), case.output("sum_gd", (12,))
    sim.run("bn_backward_reduce", *problem, case.scratch(problem), sum_g, sum_gd)
    torch.testing.assert_close(sum_g.read(), exact["sum_g"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum_gd.read(), exact["sum_gd"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_not_a_number_stays_in_its_channel(sim, channels_last, dtype):
    y = tensors((2, 5, 4, 4), dtype)
    y[1, 3, 2, 1] = NAN
    case = Case(sim, y, channels_last)
    results = run_everything(case)[0]
    channel = torch.arange(5) == 3
    for name in ("mean", "var"):
        assert torch.equal(results[name].isnan(), channel), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_schedules_agree_bit_for_bit(sim, channels_last, dtype):
    shape = (5, 20, 9, 8)
    runs = []
    for order in harness.ORDERS:
        sim.schedule(order)
        runs.append(run_everything(Case(sim, tensors(shape, dtype), channels_last, "silu"))[0])
    for other in runs[1:]:
        for name, first in runs[0].items():
            assert torch.equal(first, other[name]), name
