"""The rotation's kernels for CUDA without a GPU: in Triton's interpreter, on shapes alone, compiled for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.devices import Device
from vit2dpe import Attention, Dims, Positions, Rotation, Signal, ViT, build, explain
from vit2dpe.attention.kernels import rotary

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not made for this system")


def run(script: str, *arguments: str, **environment: str) -> list[dict]:
    """The lines of JSON that a script beside this file prints, in a process of its own."""
    settings = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@needs_triton
def test_the_interpreted_kernels_give_the_numbers_of_the_plain_path():
    """float32, float16 and float64 to the bit; bfloat16 to the last place, which Triton's interpreter cuts off."""
    found = run("interpreted.py", TRITON_INTERPRET="1")
    assert len({row["case"] for row in found}) == 13
    for row in found:
        most = 1 if row["dtype"] == "bfloat16" else 0
        angle = row["ulps"].pop("angle", 0.0)  # a sum over images and heads, in another order
        assert max(row["ulps"].values()) <= most, row
        assert angle <= 8, (row, angle)


@needs_triton
@pytest.mark.slow
def test_compiled_for_an_h100_no_register_is_spilled(tmp_path):
    """And what is written in half precision is written in runs of 16 bytes."""
    found = run("assembled.py", TRITON_CACHE_DIR=str(tmp_path))
    assert {row["kernel"] for row in found} == {"forward", "backward", "learned", "fold"}
    for row in found:
        assert row["spilled"] == 0, row
        assert row["stack"] == 0, row
        assert row["registers"] <= 128, row
        if row["kernel"] in ("forward", "backward"):
            assert row["stores"] == ["v4"], row


@needs_triton
@pytest.mark.slow
def test_compiled_models_take_cosine_and_sine_once_and_turn_queries_and_keys_in_one_launch(tmp_path):
    """Of three blocks: one launch each, one for the table, two for places."""
    none, rope, mixed = run("inductor.py", "none", "rope", "rope_mixed", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert none["turning"] == 0
    assert rope["turning"] == 1
    assert 3 < rope["launches"] - none["launches"] <= 6
    assert mixed["launches"] - none["launches"] <= 7


@pytest.mark.parametrize("learned", [False, True])
def test_on_shapes_alone_a_rotation_is_one_operation(learned):
    with FakeTensorMode():
        packed = torch.empty(2, 5, 3, 2, 8, device="cuda", dtype=torch.bfloat16)
        turn = torch.empty(1, 2, 5, 4, device="cuda", dtype=torch.complex64)
        assert torch.ops.vit2dpe.rotate_packed_.default(packed, turn) is None
        given = [torch.empty(2, 2, 5, 8, device="cuda", dtype=torch.bfloat16)] * (5 if learned else 3)
        name = "rotate_packed_backward_learned" if learned else "rotate_packed_backward"
        found = getattr(torch.ops.vit2dpe, name).default(*given, turn)
        gradient = found[0] if learned else found
        assert (gradient.shape, gradient.dtype, gradient.device.type) == (packed.shape, torch.bfloat16, "cuda")
        if learned:
            assert (found[1].shape, found[1].dtype) == (turn.shape, turn.dtype)


@needs_triton
@pytest.mark.parametrize(("device", "path"), [("cuda", "triton"), ("cpu", "in place")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_of_the_projection_selects_the_kernel(device, path, dtype):
    with FakeTensorMode():
        cos = torch.empty(1, 1, 5, 4, device=device)
        signal = Signal(q_rotation=(own := Rotation(cos, cos)), k_rotation=own)
        qkv = torch.empty(2, 5, 48, device=device, dtype=dtype)
        assert rotary.select(qkv, signal, True, None).path == path
        # What the plain path serves on the CPU it serves there.
        assert rotary.select(qkv, signal, False, None).path == "functional"
        assert rotary.select(qkv, signal, True, "compiling").path == "functional"


def test_no_path_depends_on_what_the_machine_has():
    sources = (ROOT / "vit2dpe" / "attention").rglob("*.py")
    assert [path.name for path in sources if "is_available" in path.read_text()] == []


@needs_triton
@pytest.mark.parametrize("word", ["rope", "rope_mixed"])
def test_where_triton_is_not_installed_complex_numbers_serve(word, monkeypatch):
    """Of labelled tensors, whose numbers are real: outputs and gradients are the CPU's either way."""

    def gradients(place: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer, position = Attention(16, 2), build(word, Dims(16, 2, (2, 5)))
        at = Positions.grid((2, 5), device=place).with_prefix(1)
        layer.to(place), position.to(place)
        out = layer(torch.linspace(-1, 1, 3 * 11 * 16).view(3, 11, 16).to(place), position(at))
        out.square().sum().backward()
        return [out, layer.qkv.weight.grad, *(p.grad for p in position.parameters())]

    expected = gradients("cpu")
    for present in (True, False):
        monkeypatch.setattr(rotary, "TRITON", present)
        with Device("cuda"):
            found = gradients("cuda")
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@needs_triton
def test_explain_names_the_kernel():
    model = ViT("rope", img_size=(16, 24), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    with Device("cuda"):
        (line,) = explain(model.to("cuda"), torch.zeros(1, 3, 16, 24).to("cuda"))
    assert line.rotation.path == "triton"
    assert str(line).startswith("blocks.0.attn: rotation triton (eager mode, ")
