"""Receptive fields: the closed form, the gradients, and that both say the same."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convbn_ext.receptive_field import receptive_field, receptive_field_of

VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
# index in VGG16's features (convolution, ReLU, ..., pooling) and the size of the field behind it
VGG16_FIELDS = {2: 5, 4: 6, 14: 40, 21: 92}


def vgg16_features(width=1.0):
    layers, channels = [], 3
    for v in VGG16:
        if v == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, int(v * width), 3, padding=1), nn.ReLU(inplace=True)]
            channels = int(v * width)
    return nn.Sequential(*layers)


def kernels_and_strides(layers):
    return [
        (m.kernel_size[0], m.stride[0]) if isinstance(m, nn.Conv2d) else (m.kernel_size, m.stride)
        for m in layers
        if isinstance(m, (nn.Conv2d, nn.MaxPool2d))
    ]


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ([], 1),
        ([(3, 1), (1, 1)], 3),
        ([(3, 1), (3, 1)], 5),
        ([(3, 2), (3, 1)], 7),
        ([(3, 1, 2)], 5),  # dilation spreads the taps
        ([(3, 2, 2), (3, 1, 3)], 17),  # ... and the stride in front spreads them again
    ],
)
def test_closed_form(layers, field):
    assert receptive_field(layers) == field


@pytest.mark.parametrize(("index", "field"), VGG16_FIELDS.items())
def test_vgg16_closed_form(index, field):
    assert receptive_field(kernels_and_strides(vgg16_features(1 / 64)[: index + 1])) == field


def test_vgg16_by_gradients():
    features = vgg16_features()
    assert {i: receptive_field_of(features, i, (1, 3, 128, 128)) for i in VGG16_FIELDS} == VGG16_FIELDS


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(
    "layers",
    [
        [(3, 1, 1), (1, 1, 1)],
        [(3, 1, 1), (3, 1, 1)],
        [(3, 2, 1), (3, 1, 1)],
        [(3, 1, 2), (2, 2, 1), (3, 1, 3)],
    ],
)
def test_gradients_agree_with_the_closed_form(d, layers):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d - 1]
    modules = []
    for k, s, dilation in layers:
        modules += [conv(2, 2, k, stride=s, dilation=dilation), norm(2), nn.ReLU()]
    model = nn.Sequential(*modules)
    assert receptive_field_of(model, len(modules) - 1, (1, 2, *(41,) * d)) == receptive_field(layers)
    assert receptive_field_of(model, modules[-1], (1, 2, *(41,) * d), axis=2) == receptive_field(layers)


def test_each_axis_has_its_own_field():
    model = nn.Conv2d(1, 1, (3, 5), dilation=(2, 1))
    outer = nn.Sequential(model)
    assert receptive_field_of(outer, 0, (1, 1, 20, 20), axis=2) == 5
    assert receptive_field_of(outer, 0, (1, 1, 20, 20), axis=3) == 5
    assert receptive_field_of(nn.Sequential(nn.Conv2d(1, 1, (3, 7))), 0, (1, 20, 20), axis=-2) == 3


class Residual(nn.Module):
    """A model whose pooling is a function call and whose widest path is not the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 7, padding=3), nn.Conv2d(4, 1, 1)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.out(F.max_pool2d(F.relu(self.a(x) + self.b(x)), 3, 2, ceil_mode=True))


def test_branches_and_functional_pooling():
    model = Residual()
    assert receptive_field_of(model, "out", (1, 1, 40, 40)) == receptive_field([(7, 1), (3, 2)]) == 9


def test_dead_weights_and_training_mode_play_no_part_and_the_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(3, 2, dilation=2)).train()
    nn.init.constant_(model[0].weight, -1)
    nn.init.zeros_(model[1].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert receptive_field_of(model, 3, (1, 1, 40, 40)) == receptive_field([(3, 1), (3, 2, 2)]) == 7
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_field_cut_by_the_border_warns():
    model = nn.Sequential(nn.Conv2d(1, 1, 9, padding=4))
    with pytest.warns(UserWarning, match=r"layer '0' reaches the border of the input \(5 positions"):
        assert receptive_field_of(model, 0, (1, 1, 5, 5)) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert receptive_field_of(model, 0, (1, 1, 32, 32)) == 9


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(3, 1), (0, 1)], "layer 1 has kernel 0"),
        ([(3, -1)], "layer 0 has stride -1"),
        ([(3, 1, 1), (3, 1, 0)], "layer 1 has dilation 0"),
        ([(3, 1), (3,)], r"layer 1 must be \(kernel, stride\)"),
        ([3], "layer 0 must be"),
        ([(3.0, 1)], "layer 0 has kernel 3.0"),
    ],
)
def test_closed_form_names_the_bad_layer(layers, message):
    with pytest.raises(ValueError, match=f"receptive_field: {message}"):
        receptive_field(layers)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("nowhere", "no layer 'nowhere', the model has a, b, out, unused"),
        (7, "no layer 7, the model has 4 children"),
        ("unused", "layer 'unused' is not used in the model's forward pass"),
        (nn.Identity(), r"the layer Identity\(\) is not part of the model"),
    ],
)
def test_gradients_name_the_bad_layer(layer, message):
    with pytest.raises(ValueError, match=f"receptive_field_of: {message}"):
        receptive_field_of(Residual(), layer, (1, 1, 40, 40))


def test_a_layer_without_the_axis_is_named():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '1' must keep the input's 4 axes, its output has shape \(1, 9\)"):
        receptive_field_of(model, 1, (1, 1, 5, 5))
