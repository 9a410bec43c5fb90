"""fuse and unfuse: the same numbers, state and keys as the plain model; nothing fused that is not proven."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from models import FEATURES, IMAGE, Chain, Dense, Residual, Wrapped, assert_alike, fused_copy, operators, randomized
from torch import nn
from torch.nn.utils import parametrize

import convbn_ext as cb


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_a_model_of_many_parts(memory):
    plain = randomized(Wrapped())
    fused, report = fused_copy(plain, memory=memory)
    assert str(report).splitlines()[:2] == ["fused 8 of 8 Conv+BN pairs", "  stem.0 → stem.1 → stem.2"]
    chains = {c.bn: (c.residual, c.activation or c.functional) for c in report.fused}
    assert chains["blocks.1.bn2"] == (True, "blocks.1.relu")
    assert chains["blocks.1.downsample.1"] == (False, None)
    assert chains["aux_bn"] == (False, "silu")
    assert chains["bn"] == (False, "hardswish")
    assert report.share == 1
    assert report.left == ()
    assert_alike(plain, fused, IMAGE)


def test_the_fused_operator_runs():
    plain = randomized(Wrapped())
    fused, _ = fused_copy(plain)
    assert operators(plain, IMAGE) == (0, 8)
    assert operators(fused, IMAGE) == (8, 0)
    assert operators(fused.eval(), IMAGE) == (7, 0)
    assert operators(cb.unfuse(fused), IMAGE) == (0, 7)


@pytest.mark.parametrize("as_list", [False, True])
def test_arguments_may_be_lists(as_list):
    plain = randomized(Dense())
    fused, report = fused_copy(plain)
    assert [c.bn for c in report.fused] == ["norm2"]
    assert [(entry.bn, entry.pair) for entry in report.left] == [("norm1", False)]
    x = [FEATURES[:, :1], FEATURES[:, 1:]] if as_list else FEATURES
    torch.testing.assert_close(fused(x), plain(x))
    assert operators(fused, x) == (1, 1)


def test_unfuse_gives_the_plain_model_back():
    plain = randomized(Wrapped())
    fused = cb.fuse(plain)
    again = cb.unfuse(fused)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    assert all(isinstance(a, type(b)) for a, b in zip(fused.modules(), plain.modules(), strict=True))
    for model in (fused, again):
        assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert all(a is b for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    x = IMAGE.clone()
    expected = copy.deepcopy(plain)(x)
    torch.testing.assert_close(again(x), expected)
    assert cb.unfuse(plain) is plain
    assert [type(m) for m in cb.unfuse(cb.fuse(fused)).modules()] == [type(m) for m in plain.modules()]


def test_layers_of_this_package_leave_too():
    layer = nn.Sequential(cb.ConvBN2d(3, 4, 3, activation="leaky_relu(0.2)"), cb.ConvBN2d(4, 4, 3)).double()
    plain = cb.unfuse(layer)
    assert {type(m) for m in plain.modules()} == {nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Identity}
    assert list(plain.state_dict()) == list(layer.state_dict())
    torch.testing.assert_close(plain(IMAGE), copy.deepcopy(layer)(IMAGE))


# ---- what must be left alone ----


def count_calls(m, x):
    m.steps += 1
    return m.bn(m.conv(x))


def remember(m, x):
    m.seen.append(m.conv(x))
    return m.bn(m.seen[-1])


def without_gradient(m, x):
    with torch.no_grad():
        return m.bn(m.conv(x))


def in_place_between(m, x):
    y = m.conv(x)
    x.mul_(2)
    return m.bn(y) + x


LEFT = {
    "used elsewhere": (lambda m, x: (y := m.conv(x)) + m.bn(y), "output is used elsewhere"),
    "conv twice": (lambda m, x: m.bn(m.conv(m.conv(x))), "called more than once"),
    "bn twice": (lambda m, x: m.bn(m.conv(m.bn(x))), "called more than once"),
    "between": (lambda m, x: m.bn(m.relu(m.conv(x))), "no convolution is right before it"),
    "branch on a value": (lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x, "cannot trace"),
    "branch on a shape": (lambda m, x: m.bn(m.conv(x)) if len(x) > 1 else x, "cannot trace"),
    "counts": (count_calls, "changes the module"),
    "remembers": (remember, "changes the module"),
    "no gradient": (without_gradient, "_set_grad_enabled"),
    "torch random": (lambda m, x: m.bn(m.conv(x)) * torch.rand(()), "calls rand"),
    "python random": (lambda m, x: m.bn(m.conv(x)) * random.random(), "random numbers"),
    "in place": (in_place_between, "written in place"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_proven_stays(name):
    forward, reason = LEFT[name]
    plain = randomized(Chain(forward))
    fused, report = fused_copy(plain)
    assert report.fused == ()
    assert reason in next(entry.reason for entry in report.left if entry.bn == "bn")
    assert plain.seen == fused.seen == []  # tracing left nothing behind
    assert plain.steps == 0
    x = FEATURES.abs()
    for model in (plain, fused):
        torch.manual_seed(1)
        random.seed(1)
        model.result = model(x.clone())
    torch.testing.assert_close(fused.result, plain.result)


def hooked(m):
    m.conv.register_forward_hook(lambda *_: None)


def parametrized(m):
    parametrize.register_parametrization(m.conv, "weight", nn.Identity())


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def own_forward(m):
    m.conv = OwnConv(4, 4, 3)


def renormed(m):
    m.bn = nn.InstanceNorm2d(4)


MODULES = {
    "hooks": (hooked, "has hooks"),
    "parametrized": (parametrized, "is parametrized"),
    "frozen": (lambda m: m.bn.eval(), "train/eval flags differ"),
    "shared": (lambda m: m.add_module("again", m.conv), "used more than once"),
    "own forward": (own_forward, "has a forward of its own"),
    "transposed": (lambda m: setattr(m, "conv", nn.ConvTranspose2d(4, 4, 1)), "ConvTranspose2d has no fused operator"),
    "other bn": (lambda m: setattr(m, "bn", nn.BatchNorm1d(4)), "is not nn.BatchNorm2d"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_stay(name):
    change, reason = MODULES[name]
    model = Chain(lambda m, x: m.bn(m.conv(x)))
    change(model)
    _, report = cb.fuse(model, report=True)
    assert report.fused == ()
    assert reason in report.left[0].reason
    assert report.share == 0


def test_the_residual_is_proven_too():
    """The bn's output used twice, a sum that broadcasts, a sum into the other operand: only conv→bn is fused."""
    alike = {
        "twice": lambda m, x: (y := m.bn(m.conv(x))) + m.relu(y + x),
        "broadcast": lambda m, x: m.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True)),
        "scalar": lambda m, x: m.relu(m.bn(m.conv(x)) + 1.0),
        "weighted": lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2),
        "itself": lambda m, x: (y := m.bn(m.conv(x))) + y,
        "approximate": lambda m, x: F.gelu(m.bn(m.conv(x)), approximate="tanh"),
    }
    for name, forward in alike.items():
        plain = randomized(Chain(forward))
        fused, report = fused_copy(plain)
        assert [(c.residual, c.activation or c.functional) for c in report.fused] == [
            (name == "broadcast", "relu" if name == "broadcast" else None)
        ], name
        plain.zero_grad()
        torch.testing.assert_close(fused(FEATURES.clone()), plain(FEATURES.clone()), msg=name)
    into = lambda m, x: m.relu(operator_iadd(x * 1, m.bn(m.conv(x))))  # noqa: E731
    fused, report = fused_copy(randomized(Chain(into)))
    assert not report.fused[0].residual


def test_a_chain_whose_residual_is_another_chain():
    class Two(Residual):
        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(y)) + y)

    plain = randomized(Two())
    fused, report = fused_copy(plain)
    assert [(c.residual, c.activation) for c in report.fused] == [(False, "relu"), (True, "relu")]
    assert_alike(plain, fused, FEATURES)


def operator_iadd(a, b):
    a += b
    return a


def test_aliases_of_what_is_changed_in_place():
    """x += f(x) changes x for everybody, also in the rewritten forward."""

    def forward(m, x):
        before = x
        x += m.bn(m.conv(x))
        return x * before

    plain = randomized(Chain(forward))
    fused, report = fused_copy(plain)
    assert len(report.fused) == 1
    a, b = FEATURES.clone(), FEATURES.clone()
    with torch.no_grad():
        torch.testing.assert_close(fused(a), plain(b))
    torch.testing.assert_close(a, b)


# ---- what happens after fusing ----


def test_hooks_and_surgery_after_fusing():
    plain = randomized(Wrapped()).eval()
    fused = cb.fuse(copy.deepcopy(plain))
    seen = []
    handle = fused.blocks[0].conv2.register_forward_hook(lambda m, a, out: seen.append(out))
    assert operators(fused, IMAGE) == (6, 1)
    torch.testing.assert_close(fused(IMAGE), plain(IMAGE))
    assert len(seen) == 2
    handle.remove()
    assert operators(fused, IMAGE) == (7, 0)
    for model in (plain, fused):
        model.blocks[1].relu = nn.Tanh()  # another activation
        model.blocks[0].bn1 = nn.Identity()  # no longer a pair
        model.stem.append(nn.Tanh())  # a longer sequence
        model.blocks[0].downsample = nn.Conv2d(4, 4, 1).double()
        nn.init.constant_(model.blocks[0].downsample.weight, 0.1)
        nn.init.zeros_(model.blocks[0].downsample.bias)
    torch.testing.assert_close(fused(IMAGE), plain(IMAGE))


def test_plain_attributes_are_read_at_every_call():
    def forward(m, x):
        y = m.bn(m.conv(x))
        return m.relu(y) if m.steps else y

    plain = randomized(Chain(forward))
    fused, report = fused_copy(plain)
    assert len(report.fused) == 1
    for steps in (0, 1, 0):
        plain.steps = fused.steps = steps
        torch.testing.assert_close(fused(FEATURES), plain(FEATURES))


def test_optional_arguments():
    class Scaled(Chain):
        def forward(self, x, scale=None, *, _=None):
            return x

    class Optional(Chain):
        def forward(self, x, scale=None):
            y = self.bn(self.conv(x))
            return y if scale is None else y * scale

    plain = randomized(Optional(None))
    fused, report = fused_copy(plain)
    assert len(report.fused) == 1
    for arguments, keywords in [
        ((FEATURES,), {}),
        ((FEATURES, 2), {}),
        ((), {"x": FEATURES}),
        ((FEATURES,), {"scale": 3}),
    ]:
        torch.testing.assert_close(fused(*arguments, **keywords), plain(*arguments, **keywords))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused()
    assert "takes" in fused_copy(Scaled(None))[1].left[0].reason


def test_frozen_batch_normalisation_inside_training():
    plain = randomized(Residual(4, 6))
    fused, _ = fused_copy(plain)
    for model in (plain, fused):
        model.train()
        model.bn2.eval()
    a, b = FEATURES.clone().requires_grad_(), FEATURES.clone().requires_grad_()
    expected, got = plain(a), fused(b)
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for p, q in zip([a, *plain.parameters()], [b, *fused.parameters()], strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_copies_pickles_and_state_dicts():
    fused = cb.fuse(randomized(Wrapped()))
    file, whole = io.BytesIO(), io.BytesIO()
    torch.save(fused.state_dict(), file)
    torch.save(fused, whole)
    file.seek(0)
    whole.seek(0)
    loaded = randomized(Wrapped())
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    others = [
        copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(whole, weights_only=False), cb.fuse(loaded)
    ]  # fmt: skip
    for other in others:
        assert not {id(p) for p in other.parameters()} & {id(p) for p in fused.parameters()}
        assert operators(copy.deepcopy(other), IMAGE) == (8, 0)
        assert_alike(copy.deepcopy(fused), other, IMAGE, steps=1)
        assert [type(m) for m in cb.unfuse(other).modules()] == [type(m) for m in loaded.modules()]


def test_optimizers_averages_and_parametrizations():
    """An optimizer of the plain model trains the fused one; EMA copies follow; a parametrized weight is used."""
    plain = randomized(Wrapped())
    reference = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    fused = cb.fuse(plain)
    average = torch.optim.swa_utils.AveragedModel(fused, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    other = torch.optim.SGD(reference.parameters(), 0.01)
    expected = torch.optim.swa_utils.AveragedModel(
        reference, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for model, opt, ema in ((fused, optimizer, average), (reference, other, expected)):
        for _ in range(2):
            opt.zero_grad()
            model(IMAGE).square().sum().backward()
            opt.step()
            ema.update_parameters(model)
    torch.testing.assert_close(average.eval()(IMAGE), expected.eval()(IMAGE))
    for model in (fused, reference):
        parametrize.register_parametrization(model.stem[0], "weight", nn.Tanh())
    torch.testing.assert_close(fused(IMAGE), reference(IMAGE))
    fused.stem[0].parametrizations.weight.original.grad = None
    fused(IMAGE).sum().backward()
    assert fused.stem[0].parametrizations.weight.original.grad.abs().sum() > 0
