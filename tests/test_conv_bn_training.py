"""What a training step leaves behind: saved tensors, running statistics, repeated backward passes, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import convbn_ext as cb

MEMORY = ["save", "recompute", "invert"]


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
