"""Compile, export and ONNX: no graph break, dynamic batch sizes, torch's own operators in what leaves the process."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fuse import FEATURES, IMAGE, Residual, Wrapped, randomized

import convbn_ext as cb


def ready(model):
    """The model in float32, with statistics, in eval mode."""
    model = randomized(model)
    with torch.no_grad():
        model(IMAGE)
    return model.float().eval()


LAYERS = {
    "circular": lambda: cb.ConvBN2d(3, 4, 3, padding=1, padding_mode="circular", activation="leaky_relu(0.2)"),
    "lopsided": lambda: cb.ConvBN2d(3, 4, 2, padding="same", activation="gelu"),
    "grouped": lambda: cb.ConvBN2d(3, 6, 3, groups=3, stride=2, bias=False, activation="hardswish"),
    "layer": lambda: cb.ConvBN2d(3, 4, 3, norm="layer", activation="silu"),
    "fused": lambda: cb.fuse(Wrapped()),
}


def targets(exported):
    return {str(node.target).partition(".")[0] for node in exported.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", LAYERS)
def test_export_uses_torchs_operators(name):
    model, batch = ready(LAYERS[name]()), torch.export.Dim("batch", min=2, max=64)
    x = IMAGE.float()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).run_decompositions()
    assert "convbn_ext" not in targets(exported)
    other = torch.cat([x, x + 1])
    torch.testing.assert_close(exported.module()(other), model(other))


def test_export_of_training_mode_moves_the_statistics():
    model = ready(LAYERS["fused"]()).train()
    exported = torch.export.export(model, (IMAGE.float(),)).module()
    torch.testing.assert_close(exported(IMAGE.float()), model(IMAGE.float()))
    torch.testing.assert_close(exported.state_dict()["stem.1.running_var"], model.state_dict()["stem.1.running_var"])


@pytest.mark.parametrize("name", ["layer", "fused"])
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = ready(LAYERS[name]()), IMAGE.float()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (x, torch.cat([x, x])):
        (out,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(batch), rtol=1e-4, atol=1e-5)


def test_a_fused_model_compiles_whole():
    """fullgraph: one graph without a break, in training with its backward pass, for more than one batch size."""
    plain = randomized(Residual(4, 6, 2))
    fused = cb.fuse(copy.deepcopy(plain))
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (FEATURES, torch.cat([FEATURES, FEATURES + 1])):
        for model, call in ((plain, plain), (fused, compiled)):
            model.zero_grad()
            model.result = call(batch)
            model.result.square().sum().backward()
        torch.testing.assert_close(fused.result, plain.result)
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
    torch.testing.assert_close(fused.bn2.running_var, plain.bn2.running_var)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_other_normalisations_compile(norm):
    torch.manual_seed(0)
    layer = cb.ConvBN2d(3, 4, 3, norm=norm, num_groups=2 if norm == "group" else None, activation="silu").double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGE), layer(IMAGE))
    compiled(IMAGE).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_functional_calls():
    """torch.func.functional_call with other parameters than the model's own."""
    model = ready(Wrapped())
    fused = cb.fuse(model)
    parameters = {k: v * 1.5 for k, v in model.state_dict().items()}
    expected = torch.func.functional_call(model, parameters, (IMAGE.float(),))
    torch.testing.assert_close(torch.func.functional_call(fused, parameters, (IMAGE.float(),)), expected)
