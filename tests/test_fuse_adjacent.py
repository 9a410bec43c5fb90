"""fuse(model, example): pairs that only a call can prove."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import IMAGE, Branching, assert_alike, fused_copy, operators, randomized

import convbn_ext as cb


def test_adjacency_proven_with_an_example():
    plain = randomized(Branching())
    _, without = cb.fuse(plain, report=True)
    assert [entry.pair for entry in without.left] == [True, True]
    assert "an example input may prove it" in without.left[0].reason
    before = copy.deepcopy(plain.state_dict())
    state = torch.get_rng_state()
    fused, report = fused_copy(plain, IMAGE)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    assert [(c.conv, c.bn, c.activation) for c in report.fused] == [("conv", "bn", "act"), ("conv2", "bn2", None)]
    assert report.share == 1
    assert operators(fused, IMAGE) == (2, 0)
    fused, _ = fused_copy(plain, IMAGE)
    others = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    assert_alike(copy.deepcopy(plain), fused, IMAGE)
    for other in others:
        assert operators(copy.deepcopy(other), IMAGE) == (2, 0)
        assert_alike(copy.deepcopy(plain), other, IMAGE)
    assert [type(m) for m in cb.unfuse(fused).modules()] == [type(m) for m in plain.modules()]
    seen = []
    fused.eval().bn.register_forward_hook(lambda m, a, out: seen.append(a[0]))
    torch.testing.assert_close(fused(IMAGE), cb.unfuse(fused)(IMAGE))
    assert len(seen) == 2
    assert operators(fused, IMAGE) == (1, 1)


@pytest.mark.parametrize("path", ["keeps", "view", "returns"])
def test_what_an_example_disproves(path):
    plain = randomized(Branching(path))
    _, report = fused_copy(plain, IMAGE)
    assert [c.conv for c in report.fused] == ["conv2"]


def test_another_path_than_the_example_is_an_error():
    fused, report = fused_copy(randomized(Branching("later")), IMAGE)
    assert report.share == 1
    with pytest.raises(
        RuntimeError, match="behind 'conv' is not that convolution's output: the model took another path"
    ):
        fused(IMAGE + 100)
