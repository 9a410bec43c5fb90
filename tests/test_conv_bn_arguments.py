"""Bad input of conv_bn, one by one: each has its message, and a failed call changes nothing."""

from __future__ import annotations

import pytest
import torch

import convbn_ext as cb

BAD = {
    "input must be (N, C)": {"input": (3,)},
    "weight must have as many dimensions": {"weight": (4, 3, 3)},
    "weight expects 3·groups = 3 input channels, got input with 5": {"input": (2, 5, 8, 8)},
    "groups must be at least 1": {"groups": 0},
    "groups = 3 must divide the output channels": {"weight": (4, 1, 3, 3), "groups": 3},
    "stride must be at least 1": {"stride": 0},
    "stride must be an int or 2 ints": {"stride": (1, 1, 1)},
    "stride must be an int or 2 ints, got 1.5": {"stride": 1.5},
    "dilation must be an int or 2 ints, got (1, 2.0)": {"dilation": [1, 2.0]},
    "padding must be an int or 2 ints, got None": {"padding": None},
    "dilation must be at least 1": {"dilation": 0},
    "padding must be at least 0": {"padding": -1},
    "padding must be ints, 'same' or 'valid'": {"padding": "full"},
    "padding='same' needs stride 1": {"padding": "same", "stride": 2},
    "padding_mode must be zeros, circular, reflect or replicate": {"padding_mode": "mirror"},
    "reflect padding must be smaller than the input": {"padding": 8, "padding_mode": "reflect"},
    "circular padding must not exceed the input": {"padding": 9, "padding_mode": "circular"},
    "the kernel does not fit": {"weight": (4, 3, 9, 9)},
    "bn_weight must have shape (4,)": {"bn_weight": torch.ones(5)},
    "running_mean must have shape (4,)": {"running_mean": torch.ones(3)},
    "num_batches_tracked must have shape (), got (0,)": {
        "num_batches_tracked": torch.empty(0).long(),
        "training": True,
    },
    "bias must have shape (4,)": {"bias": torch.ones(1, 4)},
    "residual must have the output's shape": {"residual": torch.ones(2, 4, 8, 8)},
    "training needs more than one value per channel": {"input": (1, 3, 3, 3), "training": True},
    "training needs more than one value per channel, got output shape [0, 4, 6, 6]": {
        "input": (0, 3, 8, 8),
        "training": True,
    },
    "training=False needs running_mean and running_var": {"running_mean": None},
    "weight must have dtype torch.float32 like input, got torch.float64": {"weight": torch.ones(4, 3, 3, 3).double()},
    "input must be float64, float32": {"input": torch.ones(2, 3, 8, 8).int(), "weight": torch.ones(4, 3, 3, 3).int(),
                                       "running_mean": torch.zeros(4).int(), "running_var": torch.ones(4).int()},
    "weight is on meta, but input is on cpu": {"weight": torch.ones(4, 3, 3, 3, device="meta")},
    "activation must be one of identity": {"activation": "tanh"},
    "memory must be one of save": {"memory": "none"},
    "memory='invert' needs an activation that can be undone": {"memory": "invert", "activation": "relu"},
    "memory='invert' cannot undo bn_weight = 0": {"memory": "invert", "bn_weight": torch.zeros(4)},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = {
        "input": (2, 3, 8, 8),
        "weight": (4, 3, 3, 3),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        **BAD[message],
    }
    for name in ("input", "weight"):
        if isinstance(arguments[name], tuple):
            arguments[name] = torch.randn(arguments[name], requires_grad=True)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the message is compared below)
        cb.conv_bn(**arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("count", [torch.tensor(3), torch.tensor(3.0)])
def test_the_batch_is_counted_in_training_alone(count):
    count, layer = count.clone(), cb.ConvBN2d(3, 4, 3)
    given = {"running_mean": layer.bn.running_mean, "running_var": layer.bn.running_var, "num_batches_tracked": count}
    for training, expected in ((False, 3), (True, 4)):
        cb.conv_bn(torch.randn(2, 3, 5, 5), layer.conv.weight, training=training, **given)
        assert count == expected


def test_a_failed_call_changes_no_state():
    layer = cb.ConvBN2d(3, 4, 3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match="more than one value"):
        layer(torch.randn(1, 3, 3, 3))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
