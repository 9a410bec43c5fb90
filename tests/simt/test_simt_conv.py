"""The convolution kernels against float64: forward with statistics, grad_input and grad_weight with dy made on the way.

Our error ≤ 2× torch's own in the same arithmetic + a rounding floor. For tf32 torch's is that of float32 on operands
rounded to tf32. dy is rounded to the layer's dtype before the products, in ours and in theirs.
"""

import ctypes
from dataclasses import dataclass, field

import harness
import pytest
import torch
import torch.nn.functional as F
from test_simt_bn import DTYPES, NAN, error, floor, tensors

BORDERS = ("zeros", "circular", "reflect", "replicate")
ACTIVATIONS = ("identity", "relu", "leaky_relu")
SLOPE = 0.1
PRODUCTS = {  # name: dtype, tensor cores
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, True),
    "float16": (torch.float16, True),
}
products = pytest.mark.parametrize("product", PRODUCTS)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def to_tf32(x):
    """The nearest float with 10 bits of mantissa, ties away from zero."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def memory(t):
    """(N, C, H, W) → its channels_last memory, (N, H, W, C)."""
    return t.movedim(1, -1).contiguous()


@dataclass
class Layer:
    """One layer: its tensors, the kernels' results, and what float64 and torch make of them."""

    sim: harness.Simulator
    product: str
    shape: tuple[int, ...]  # of the input
    out_channels: int
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    border: str = "zeros"
    activation: str = "relu"
    use_out: bool = False  # the activation's sign comes from out, not from y
    results: dict = field(default_factory=dict)
    traffic: dict = field(default_factory=dict)  # by launcher
    footprints: dict = field(default_factory=dict)

    def __post_init__(self):
        self.dtype, self.tensor_cores = PRODUCTS[self.product]
        self.kernel, self.stride, self.padding, self.dilation = map(
            pair, (self.kernel, self.stride, self.padding, self.dilation)
        )
        c, k = self.shape[1], self.out_channels
        self.x = tensors(self.shape, self.dtype, mean=0.25)
        self.weight = tensors((k, c // self.groups, *self.kernel), self.dtype, seed=1)
        exact = self.convolve(self.x.double(), self.weight.double())
        self.y = exact.to(self.dtype)  # the backward pass starts from the same y everywhere
        self.mean, self.var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
        self.scale = tensors((k,), torch.float64, seed=2) / (self.var + 1e-5).sqrt()
        self.bias, self.b, self.c = (tensors((k,), torch.float64, seed=i) * 0.1 for i in (3, 4, 5))
        self.grad = tensors(self.y.shape, self.dtype, seed=6)
        self.out = self.act(self.affine(self.y.double())).to(self.dtype)

    # ---- reference ----

    def convolve(self, x, weight):
        mode = "constant" if self.border == "zeros" else self.border
        (ph, pw) = self.padding
        x = F.pad(x, (pw, pw, ph, ph), mode)
        return F.conv2d(x, weight, None, self.stride, 0, self.dilation, self.groups)

    def per_channel(self, v, like):
        return v.to(like.dtype).view(1, -1, 1, 1)

    def affine(self, y):
        return (y - self.per_channel(self.mean, y)) * self.per_channel(self.scale, y) + self.per_channel(self.bias, y)

    def act(self, v):
        return {"identity": lambda t: t, "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, SLOPE)}[
            self.activation
        ](v)

    def parts(self, dtype):
        """g = grad·act′ and d = y − μ."""
        y, g = self.y.to(dtype), self.grad.to(dtype)
        v = self.out.to(dtype) if self.use_out else self.affine(y)
        slope = {"identity": 1.0, "relu": 0.0, "leaky_relu": SLOPE}[self.activation]
        return torch.where(v <= 0, g * slope, g), y - self.per_channel(self.mean, y)

    def dy(self, dtype):
        g, d = self.parts(dtype)
        return self.per_channel(self.scale, d) * g + self.per_channel(self.b, d) * d + self.per_channel(self.c, d)

    def backward(self, dy, x, weight):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(self.convolve(x, weight), (x, weight), dy)

    def expected(self, exactly):
        """(y, dx, dw) in float64, or by torch in this product's arithmetic."""
        if exactly:
            x, weight, dy = self.x.double(), self.weight.double(), self.dy(torch.float64)
        else:
            x, weight, dy = self.x.clone(), self.weight.clone(), self.dy(torch.float32).to(self.dtype)
        if not exactly and self.product == "tf32":
            x, weight, dy = to_tf32(x), to_tf32(weight), to_tf32(dy)
        y = self.convolve(x, weight)
        dx, dw = self.backward(dy, x, weight)
        return {"y": y.detach(), "dx": dx, "dw": dw}

    # ---- kernels ----

    def numbers(self, **changes):
        """What exports_conv.cpp makes a ConvProblem of."""
        n, c, *size = self.shape
        values = {
            "head": [DTYPES[self.dtype], int(self.tensor_cores), n, c, self.out_channels, self.groups],
            "border": [BORDERS.index(self.border)],
            "size": size,
            "out_size": list(self.y.shape[2:]),
            "kernel": list(self.kernel),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
        } | changes
        flat = [number for part in values.values() for number in part]
        return (ctypes.c_int64 * len(flat))(*flat)

    def output(self, name, shape, dtype=None):
        return self.sim.output(name, torch.full(shape, NAN, dtype=dtype or self.dtype))

    def run(self, name, *arguments):
        self.sim.run(name, *arguments)
        assert not (reports := self.sim.reports()), reports
        self.traffic[name], self.footprints[name] = self.sim.traffic(), self.sim.footprints()

    def depthwise(self):
        return self.groups == self.shape[1] == self.out_channels

    def weight_memory(self, adjoint=False):
        w, g = self.weight, self.groups
        if self.depthwise():
            return w.permute(2, 3, 0, 1).contiguous()
        if not adjoint:
            return memory(w)
        return w.view(g, -1, *w.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()

    def forward(self):
        numbers, sim, k = self.numbers(), self.sim, self.out_channels
        x, weight = sim.input("x", memory(self.x)), sim.input("weight", self.weight_memory())
        y = self.output("y", memory(self.y).shape)
        scratch = self.output("scratch", (sim.call("conv_statistics_size", numbers),), torch.float64)
        mean, var = (self.output(name, (k,), torch.float64) for name in ("mean", "var"))
        self.run("conv_forward", numbers, x, weight, y, scratch)
        self.run("conv_statistics", numbers, scratch, mean, var)
        self.results |= {"y": y.read().movedim(-1, 1), "mean": mean.read(), "var": var.read()}
        sim.close()
        return self

    def gradients(self):
        sim, (n, c, h, w) = self.sim, self.shape
        numbers = self.numbers()
        bn = (
            ACTIVATIONS.index(self.activation),
            SLOPE,
            sim.input("y", memory(self.y)),
            sim.input("grad", memory(self.grad)),
            sim.input("out", memory(self.out)) if self.use_out else None,
            *(sim.input(name, getattr(self, name)) for name in ("mean", "scale", "bias")),
        )
        table = self.output("table", (sim.call("conv_table_size", numbers),), torch.float32)
        abc = [sim.input(name, t) for name, t in zip("abc", (self.scale, self.b, self.c), strict=True)]
        self.run("conv_table", numbers, *bn, None, None, None, table)  # a, b and c need the sums of the first pass

        x = sim.input("x", memory(self.x))
        scratch = self.output("scratch", (sim.call("conv_grad_weight_size", numbers),), torch.float64)
        sums = [self.output(name, (self.out_channels,), torch.float64) for name in ("sum_g", "sum_gd")]
        self.run("conv_grad_weight", numbers, *bn, table, x, scratch, *sums)
        self.results |= {s.name: s.read() for s in sums}
        dw = self.output("dw", self.weight_memory().shape)
        self.run("conv_combine_weight", numbers, *bn, *abc, scratch, dw)
        self.results["dw"] = dw.read().permute(2, 3, 0, 1) if self.depthwise() else dw.read().movedim(-1, 1)
        self.run("conv_table", numbers, *bn, *abc, table)

        weight = sim.input("weight", self.weight_memory(adjoint=True))
        (ph, pw), padded = self.padding, self.border != "zeros"
        if padded:  # over the padded input; what the borders copied is folded back
            h, w = h + 2 * ph, w + 2 * pw
            numbers = self.numbers(size=[h, w], padding=[0, 0], border=[0])
        dx = self.output("dx", (n, h, w, c))
        self.run("conv_grad_input", numbers, *bn, table, weight, dx)
        result = dx.read().movedim(-1, 1)
        if padded:
            x0 = torch.zeros(self.shape, dtype=torch.float64, requires_grad=True)
            (result,) = torch.autograd.grad(F.pad(x0, (pw, pw, ph, ph), self.border), x0, result.double())
        self.results["dx"] = result
        sim.close()
        return self

    def check(self):
        exact, theirs = self.expected(True), self.expected(False)
        for name, reference in exact.items():
            if name in self.results:
                limit = 2 * error(theirs[name], reference) + floor(reference, self.dtype, 2)
                assert error(self.results[name], reference) <= limit, name
        if "sum_g" in self.results:
            g, d = self.parts(torch.float64)
            if not self.depthwise():
                g = g.to(self.dtype).double()  # halves are rounded first, as by torch's own leaky_relu
            eps, over = 4 * torch.finfo(torch.float32).eps, (0, 2, 3)
            for name, terms in (("sum_g", g), ("sum_gd", g * d)):
                assert error(self.results[name], terms.sum(over)) <= eps * terms.abs().sum(over).max().item(), name
        if "mean" in self.results:  # of y as it is stored
            y = self.results["y"].double()
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
            eps = torch.finfo(torch.float32).eps
            assert error(self.results["mean"], mean) <= 2 * eps * y.abs().mean().item()
            assert error(self.results["var"], var) <= 4 * eps * var.max().item()
        return self


# (input, out channels, options): channels 3, 37 and 64, odd sizes, one sample and three; a grid cut by the tiles of 128
# pixels and 64 channels, and one that fills them.
SHAPES = {
    "3->64": ((3, 3, 9, 7), 64, {}),
    "37->37": ((1, 37, 7, 9), 37, {}),
    "64->64": ((2, 64, 8, 8), 64, {"kernel": (3, 1), "padding": (1, 0)}),
    "16->136, 1x1": ((3, 16, 5, 9), 136, {"kernel": 1, "padding": 0}),
    "stride, dilation": (
        (1, 24, 11, 13),
        40,
        {"stride": (2, 1), "dilation": (1, 3), "kernel": (3, 2), "padding": (2, 1)},
    ),
    "groups": ((1, 48, 7, 5), 32, {"groups": 2}),
    "groups of 3": ((1, 9, 5, 6), 6, {"groups": 3, "stride": 2}),
    "depthwise 64": ((3, 64, 7, 9), 64, {"groups": 64}),
    "depthwise 37": ((1, 37, 9, 7), 37, {"groups": 37, "stride": 2, "dilation": 2, "kernel": (3, 5), "padding": 3}),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def layer(sim, product, shape, **more):
    size, out_channels, options = SHAPES[shape]
    return Layer(sim, product, size, out_channels, **options | more)


@products
@shapes
def test_forward_and_statistics(sim, shape, product):
    layer(sim, product, shape).forward().check()


@products
@shapes
def test_gradients(sim, shape, product):
    layer(sim, product, shape).gradients().check()


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("channels", [8, 5])
def test_borders(sim, border, channels):
    sizes = {"padding": (3, 2), "border": border, "stride": (1, 2), "kernel": (5, 3)}
    Layer(sim, "tf32", (2, channels, 6, 5), 16, **sizes).forward().gradients().check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_out", [False, True], ids=["from y", "from out"])
@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_activations_in_the_prologue(sim, product, activation, use_out):
    layer(sim, product, "16->136, 1x1", activation=activation, use_out=use_out).gradients().check()


@products
@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
@pytest.mark.parametrize("level", [0.0, 1 / 3], ids=["random", "almost constant"])
def test_gradients_of_a_training_step(sim, product, groups, level):
    """b and c as training makes them, of a gradient and an input whose means all but cancel in dw."""
    case = Layer(sim, product, (2, 16, 13, 9), 16, groups=groups, activation="leaky_relu")
    if level:
        case.grad = (level + 0.01 * case.grad.double()).to(case.dtype)
        case.x = (10 * level + 0.1 * case.x.double()).to(case.dtype)
    g, d = case.parts(torch.float64)
    m = case.y.numel() // 16
    case.b = -case.scale * (g * d).sum((0, 2, 3)) / (m * (case.var + 1e-5))
    case.c = -case.scale * g.sum((0, 2, 3)) / m
    case.gradients().check()


@products
@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
def test_results_do_not_depend_on_the_schedule(sim, product, groups):
    results = []
    for order in harness.ORDERS:
        sim.schedule(order)
        case = Layer(sim, product, (9, 16, 8, 8), 16, kernel=(1, 2), padding=(0, 1), groups=groups)  # 2 splits
        results.append(case.forward().gradients().results)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_statistics_keep_their_digits_when_the_mean_is_large(sim):
    case = Layer(sim, "float32", (3, 8, 9, 9), 16, kernel=1, padding=0)
    case.x = case.x + 1e4
    case.weight = case.weight.abs()
    case.forward().check()


@pytest.mark.skipif("plain" not in harness.BUILDS, reason="tensors without memory cannot be shadowed")
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_more_than_two_to_the_31_elements(direction):
    """The last 256 pixels of 3×8×12000×12000 (3.5·10⁹ values), from windows of tensors that nobody could hold."""
    sim, samples, channels, side, dtype = harness.simulator("plain"), 3, 8, 12000, torch.float16
    row, border = side * channels, BORDERS.index("circular" if direction == "forward" else "zeros")
    first = (samples - 1) * side * row  # where the last sample begins
    sizes = [side, side, side, side, 3, 3, 1, 1, 1, 1, 1, 1]
    flat = [DTYPES[dtype], 1, samples, channels, channels, 1, border, *sizes]
    numbers = (ctypes.c_int64 * len(flat))(*flat)
    weight = tensors((channels, channels, 3, 3), dtype)
    source = tensors((3, side, channels), dtype, seed=1)  # the image's rows -2, -1 and 0
    source[2] *= direction == "forward"  # what zeros see behind the last row
    image, result = (sim.virtual(samples * side * row, dtype) for _ in range(2))
    image.write(first + (side - 2) * row, source[:2])
    image.write(first, source[2])
    sim.blocks(samples * side * side // 128 - 2, 2)
    if direction == "forward":
        w = sim.input("weight", memory(weight))
        sim.run("conv_forward", numbers, image, w, result, None)
    else:  # identity, dy = grad
        vectors = [sim.input(name, torch.zeros(channels, dtype=torch.float64)) for name in ("mean", "bias")]
        scale = sim.input("scale", torch.ones(channels, dtype=torch.float64))
        bn = (0, 0.0, sim.virtual(samples * side * row, dtype), image, None, vectors[0], scale, vectors[1])
        table = sim.input("table", torch.tensor([0.0, 1, 0, 1, 0, 0]).repeat_interleave(channels))
        w = sim.input("weight", weight.permute(1, 2, 3, 0).contiguous())
        sim.run("conv_grad_input", numbers, *bn, table, w, result)
    sim.blocks()
    assert not sim.reports()
    ours = result.window(first + side * row - 256 * channels, 256 * channels).view(256, channels)
    sim.close()
    x = source.double().movedim(-1, 0)[None]
    if direction == "forward":
        exact = F.conv2d(F.pad(x, (1, 1, 0, 0), "circular"), weight.double())[0, :, 0, -256:].T
    else:
        exact = F.conv_transpose2d(x, weight.double(), padding=1)[0, :, 1, -256:].T
    assert error(ours, exact) <= floor(exact, dtype)
