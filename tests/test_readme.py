"""The README's Python examples run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="installed without the README")
def test_python_examples_run(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "train(images" not in block]  # quotes examples/invert_trained_layer.py
    assert len(blocks) >= 6
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "fused 1 of 1 Conv+BN pairs\n  0 → 1 → 2\n" in capsys.readouterr().out
    assert names["info"] == 0
    assert type(names["model"]) is torch.nn.Sequential
