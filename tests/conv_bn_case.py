"""One layer and its input in every dtype, by eager torch and by us, and the rule by which they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

import convbn_ext as cb

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["identity", "relu", "leaky_relu(0.2)", "silu", "gelu", "hardswish"]
MODES = ["zeros", "circular", "reflect", "replicate"]


def eager_activation(name: str, v: torch.Tensor) -> torch.Tensor:
    if name.startswith("leaky_relu"):
        return F.leaky_relu(v, 0.2)
    return v if name == "identity" else getattr(F, name)(v)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest exact value; NaN counts as infinite."""
    ours, exact = ours.detach(), exact.detach()
    difference = (ours.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30)
    return float("inf") if difference.isnan() else float(difference)


def assert_as_accurate(ours, theirs, exact, dtype, what):
    """FlashAttention's rule: at most twice torch's own error, plus a rounding floor of a few units.

    In float64 the reference is torch itself, so its own error is unknown: some thousand units stand for it.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == dtype
    floor = 4.0 if dtype != torch.float64 else 4000.0
    bound = 2 * error(theirs, exact) + floor * torch.finfo(dtype).eps
    assert error(ours, exact) <= bound, f"{what}: {error(ours, exact):.2e} > {bound:.2e}"


def bare_convolution(x, weight, grad, **geometry):
    """Output, dx and dw of the layer whose batch normalisation does nothing."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    zeros = torch.zeros(len(weight), dtype=x.dtype)
    out = cb.conv_bn(x, weight, running_mean=zeros, running_var=zeros + 1, eps=0, **geometry)
    out.backward(grad)
    return out.detach(), x.grad, weight.grad


def assert_threads_do_not_change_a_bit(step: Callable[[], Iterable[torch.Tensor]]):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16, 48):
            torch.set_num_threads(count)
            results.append(step())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Case:
    """One layer and input in float64, and what eager torch and we make of it in any dtype."""

    def __init__(self, shape, weight, *, training=True, activation="identity", residual=False, bias=False, **geometry):
        g = torch.Generator().manual_seed(hash((shape, weight)) % 2**31)
        here = torch.get_default_device()
        randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64, device="cpu").to(here)  # noqa: E731
        channels = weight[0]
        self.training, self.activation, self.geometry = training, activation, geometry
        # multiples of 2⁻⁷ in a small range: the same numbers in every dtype
        rounded = lambda t: (t.clamp(-3, 3) * 32).round() / 32  # noqa: E731
        self.tensors = {
            "input": rounded(randn(*shape)),
            "weight": rounded(randn(*weight)),
            "bias": rounded(randn(channels)) if bias else None,
            "bn_weight": rounded(randn(channels)),
            "bn_bias": rounded(randn(channels)),
            "residual": None,
        }
        self.running_mean, self.running_var = rounded(randn(channels)), rounded(randn(channels)).abs() + 0.5
        out = self.eager(torch.float64)[0]
        self.grad = rounded(randn(*out.shape))
        if residual:
            self.tensors["residual"] = rounded(randn(*out.shape))

    def leaves(self, dtype, memory_format=torch.contiguous_format):
        def leaf(name, t):
            if t is None:
                return None
            t = t.to(dtype)
            if name in ("input", "residual") and t.dim() == (5 if memory_format == torch.channels_last_3d else 4):
                t = t.contiguous(memory_format=memory_format)
            return t.clone().requires_grad_()

        return {name: leaf(name, t) for name, t in self.tensors.items()}

    def eager(self, dtype, memory_format=torch.contiguous_format):
        t = self.leaves(dtype, memory_format)
        mean, var = (s.to(dtype, copy=True) for s in (self.running_mean, self.running_var))
        x, w = t["input"], t["weight"]
        geometry = dict(self.geometry)
        padding, mode = geometry.pop("padding", 0), geometry.pop("padding_mode", "zeros")
        if x.dim() == 2:
            y = F.linear(x, w, t["bias"])
        else:
            axes = x.dim() - 2
            pads = (padding,) * axes if isinstance(padding, int) else padding
            if mode != "zeros":
                x, pads = F.pad(x, [p for p in reversed(pads) for _ in range(2)], mode), (0,) * axes
            if w.dim() == 4 and w.shape[2:] == (1, 1) and not any(pads):
                # torch's weight gradient of a strided 1x1 layer in float32 and channels_last writes beyond its memory
                # (seen with AVX2 and 2 to 7 channels): the same layer, on the pixels it meets
                stride = geometry.pop("stride", 1)
                rows, columns = (stride, stride) if isinstance(stride, int) else stride
                x = x[:, :, ::rows, ::columns]
            y = (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, w, t["bias"], padding=pads, **geometry)
        v = F.batch_norm(y, mean, var, t["bn_weight"], t["bn_bias"], self.training, 0.1, 1e-5)
        out = eager_activation(self.activation, v if t["residual"] is None else v + t["residual"])
        return out, t, mean, var

    def ours(self, dtype, memory_format=torch.contiguous_format, memory="save"):
        t = self.leaves(dtype, memory_format)
        mean, var = (s.to(dtype, copy=True) for s in (self.running_mean, self.running_var))
        out = cb.conv_bn(
            t["input"],
            t["weight"],
            t["bias"],
            bn_weight=t["bn_weight"],
            bn_bias=t["bn_bias"],
            running_mean=mean,
            running_var=var,
            training=self.training,
            activation=self.activation,
            residual=t["residual"],
            memory=memory,
            **self.geometry,
        )
        return out, t, mean, var

    def check(self, dtype, memory_format=torch.contiguous_format, memory="save"):
        exact, theirs, ours = (
            self.eager(torch.float64),
            self.eager(dtype, memory_format),
            self.ours(dtype, memory_format, memory),
        )
        for result in (exact, theirs, ours):
            result[0].backward(self.grad.to(result[0].dtype))
        assert_as_accurate(ours[0], theirs[0], exact[0], dtype, "out")
        assert_as_accurate(ours[2], theirs[2], exact[2], dtype, "running_mean")
        assert_as_accurate(ours[3], theirs[3], exact[3], dtype, "running_var")
        if dtype in (torch.bfloat16, torch.float16) and self.activation in ("relu", "leaky_relu(0.2)", "hardswish"):
            return  # a rounded pre-activation may lie on the other side of the kink: both gradients are right
        for name, leaf in ours[1].items():
            if leaf is None:
                continue
            if name == "bias" and self.training:
                assert leaf.grad.count_nonzero() == 0  # it cancels: torch's own gradient here is rounding noise
            else:
                assert_as_accurate(leaf.grad, theirs[1][name].grad, exact[1][name].grad, dtype, f"grad of {name}")

    def check_equal_to_torch(self):
        """In float64, to rounding; absolute, since 1x1 one-channel layers have gradients that cancel to nothing."""
        theirs, ours = self.eager(torch.float64), self.ours(torch.float64)
        activation, self.activation = self.activation, "identity"
        v = self.eager(torch.float64)[0].detach().abs()
        self.activation = activation
        smooth = (v > 1e-9) & ((v - 3).abs() > 1e-9)  # on a kink (0, ±3 for hardswish) both sides' slopes are right
        for result in (theirs, ours):
            result[0].backward(self.grad * smooth)
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, torch.Tensor)]
        pairs += [(leaf.grad, theirs[1][name].grad) for name, leaf in ours[1].items() if leaf is not None]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# One line per reason: what is special about the shape.
CASES = {
    "3x3, the usual layer": ((4, 8, 9, 7), (16, 8, 3, 3), {"padding": 1}),
    "1x1, a matrix product": ((3, 16, 5, 5), (8, 16, 1, 1), {}),
    "stride and dilation, unequal per axis": ((2, 6, 13, 11), (4, 6, 3, 2), {"stride": (2, 3), "dilation": (1, 2)}),
    "groups": ((3, 8, 6, 6), (12, 4, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((3, 6, 7, 7), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "odd channels leave vector tails": ((3, 3, 5, 7), (37, 3, 3, 3), {"padding": 1}),
    "one output channel": ((3, 4, 6, 6), (1, 4, 3, 3), {}),
    "more channels than one strip, few rows": ((2, 3, 2, 2), (300, 3, 2, 2), {}),
    "one pixel, statistics over the batch alone": ((5, 4, 3, 3), (6, 4, 3, 3), {}),
    "circular": ((2, 3, 5, 6), (4, 3, 3, 3), {"padding": (2, 1), "padding_mode": "circular"}),
    "reflect": ((2, 3, 5, 6), (4, 3, 3, 3), {"padding": (2, 1), "padding_mode": "reflect"}),
    "replicate": ((2, 3, 5, 6), (4, 3, 3, 3), {"padding": (2, 1), "padding_mode": "replicate"}),
    "linear": ((10, 7), (5, 7), {}),
    "1-d": ((4, 3, 17), (5, 3, 4), {"stride": 2, "padding": 2}),
    "3-d": ((2, 3, 4, 5, 6), (4, 3, 2, 3, 1), {"padding": (1, 1, 0)}),
    "several blocks of statistics": ((4, 3, 96, 96), (5, 3, 1, 1), {}),
}
