"""What a training step leaves behind: saved tensors, running statistics, repeated backward passes, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Residual as Block
from torch import nn
from torch.utils.checkpoint import checkpoint

import convbn_ext as cb

MEMORY = ["save", "chain", "recompute", "invert"]


def layer_and_input(memory="save"):
    torch.manual_seed(0)
    activation = "leaky_relu" if memory == "invert" else "relu"
    layer = cb.ConvBN2d(3, 5, 3, padding=1, bias=False, activation=activation, memory=memory)
    return layer, torch.randn(4, 3, 8, 8, requires_grad=True)


def gradients(layer, x):
    result = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    return result


@pytest.mark.parametrize("memory", MEMORY)
def test_repeated_backward_gives_the_same_gradients(memory):
    """dy may take y's place only in the last pass through a graph."""
    layer, x = layer_and_input(memory)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    first = gradients(layer, x)
    loss.backward()
    for a, b in zip(first, gradients(layer, x), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def backward_operator(loss, **options):
    with torch.profiler.profile() as profile:
        loss.backward(**options)
    (name,) = {e.name for e in profile.events() if "conv_bn_backward" in e.name}
    return name


@pytest.mark.parametrize("memory", ["save", "chain"])
def test_dy_takes_the_place_of_y_in_the_last_pass(memory):
    layer, x = layer_and_input(memory)
    loss = layer(x).sum()
    assert backward_operator(loss, retain_graph=True) == "convbn_ext::conv_bn_backward"
    assert backward_operator(loss) == "convbn_ext::conv_bn_backward_"


def test_what_a_hook_keeps_is_not_written_over():
    layer, x = layer_and_input()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    before = [t.clone() for t in kept]
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["plain", "checkpoint", "reentrant checkpoint"])
def test_running_statistics_move_once(memory, mode):
    """Once per training step, also where the backward pass is repeated or a checkpoint runs the layers again."""
    layer, x = layer_and_input(memory)
    network = torch.nn.Sequential(layer, torch.nn.Conv2d(5, 2, 1))  # not last: a checkpoint runs all of it again
    once = torch.nn.BatchNorm2d(5)
    once(layer.conv(x))
    if mode == "plain":
        out = network(x)
        out.sum().backward(retain_graph=True)
    else:
        out = checkpoint(network, x, use_reentrant=mode.startswith("re"))
    out.sum().backward()
    torch.testing.assert_close(layer.bn.running_mean, once.running_mean)
    torch.testing.assert_close(layer.bn.running_var, once.running_var)
    assert layer.bn.num_batches_tracked == 1


class Residual(torch.nn.Module):
    """Stem, then blocks of two layers with a residual sum, the first with a layer of its own on the way past."""

    def __init__(self, memory, blocks=5, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        layer = lambda c, d, k, act: cb.ConvBN2d(  # noqa: E731
            c, d, k, padding=k // 2, bias=False, activation=act, memory=memory, dtype=dtype
        )
        self.stem, self.past = layer(3, 4, 3, "silu"), layer(4, 6, 1, "identity")
        self.first = torch.nn.ModuleList(layer(4 if i == 0 else 6, 6, 3, "relu") for i in range(blocks))
        self.second = torch.nn.ModuleList(layer(6, 6, 3, "relu") for _ in range(blocks))

    def forward(self, x):
        x = self.stem(x)
        for i, (a, b) in enumerate(zip(self.first, self.second, strict=True)):
            x = b(a(x), residual=self.past(x) if i == 0 else x)
        return x


def saved_bytes(network, x):
    """Bytes of the distinct tensors that wait for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = network(x)
    return out, sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in own)


def test_chain_gives_the_gradients_of_save_from_y_alone():
    results = {}
    for memory in ("save", "chain"):
        network, x = Residual(memory), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        out, _ = saved_bytes(network, x)
        out.square().sum().backward(retain_graph=True)
        first = gradients(network, x)
        out.square().sum().backward()
        results[memory] = [out, *first]
        for a, b in zip(first, gradients(network, x), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(*results.values(), strict=True):
        assert torch.equal(a, b)
    image = 4 * 64 * 4  # bytes of one channel of the batch
    _, bytes_ = saved_bytes(Residual("chain", blocks=2), x)
    assert bytes_ < (3 + 4 + 6 * 5) * image + 3000  # the input and one y per layer, and vectors
    _, bytes_ = saved_bytes(Residual("save", blocks=2), x)
    assert bytes_ > (3 + 2 * 4 + 6 * 9) * image


def test_chain_has_second_derivatives():
    network = Residual("chain", blocks=1, dtype=torch.float64)
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,), atol=1e-4)


def test_chain_keeps_what_was_changed_in_place():
    """The second layer saw twice the first one's output: it must not be formed again from y."""
    grads = []
    for memory in ("save", "chain"):
        network, x = Residual(memory, blocks=1), torch.ones(4, 3, 8, 8) * torch.arange(8.0)
        h = network.stem(x)
        with torch.no_grad():
            h.mul_(2)
        network.first[0](h).square().sum().backward()
        grads.append(network.first[0].conv.weight.grad)
    assert torch.equal(*grads)


def losses(network, x, target, steps):
    optimizer, result = torch.optim.SGD(network.parameters(), lr=0.1), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return torch.tensor(result, dtype=torch.float64)


def test_losses_over_50_steps_are_those_of_float64():
    """To 1e-4, and as closely as torch's own in two layouts.

    The activation is smooth: behind ReLU a value that rounding moves across zero changes the gradient by a jump, and
    training takes even torch's two layouts 1e-4 to 1e-2 apart.
    """
    torch.manual_seed(0)
    block = Block(8, 12, 2)
    block.relu = nn.SiLU()
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    plain = nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    x, target = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    apart = lambda result: float(((result - exact) / exact).abs().max())  # noqa: E731
    exact = losses(copy.deepcopy(plain).double(), x.double(), target, 50)
    assert exact[-1] < exact[0] / 2
    torchs = apart(losses(copy.deepcopy(plain), x, target, 50))
    plain, x = (t.to(memory_format=torch.channels_last) for t in (plain, x))
    torchs = max(torchs, apart(losses(copy.deepcopy(plain), x, target, 50)))
    for memory in ("save", "chain", "recompute"):
        ours = apart(losses(cb.fuse(copy.deepcopy(plain), memory=memory), x, target, 50))
        assert ours <= min(1e-4, 2 * torchs + 16 * torch.finfo(torch.float32).eps)
