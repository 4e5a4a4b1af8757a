"""One ONNX file for an encoding: batch, height and width are free, and onnxruntime's logits are ours."""

from functools import partial

import onnxruntime
import pytest
import torch

from tests.helpers import micro_vit
from vit2dpe import use_policy
from vit2dpe.encodings import ENCODINGS

# Pooled over patches: at depth 1 a class token, which stands nowhere, sees no bias.
SIZES = ((1, 32, 32), (3, 48, 20), (2, 56, 88))  # batch, height, width
QUICK = ("relative",)  # and learned+rope, in docs/tools.md
create = partial(micro_vit, depth=1, global_pool="avg")


def export(model, path):
    batch, rows, cols = (torch.export.Dim(name, min=1, max=128) for name in ("batch", "rows", "cols"))
    with torch.no_grad():
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 32, 48),),
            path,
            dynamo=True,
            dynamic_shapes={"images": {0: batch, 2: 4 * rows, 3: 4 * cols}},
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check(model, session):
    for batch, height, width in SIZES:
        images = torch.randn(batch, 3, height, width)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow)
                                      for w in [*ENCODINGS, "learned+rope"]])  # fmt: skip
def test_one_file_for_all_sizes(position, tmp_path):
    model = create(position)
    check(model, export(model, str(tmp_path / "model.onnx")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position", "policy", "temperature"),
    [("rope", "ntk", "log"), ("rope_mixed", "yarn", "none"), ("alibi+sincos", "interpolate", "yarn")],
)
def test_a_policy_goes_into_the_file(position, policy, temperature, tmp_path):
    model = create(position)
    with use_policy(model, policy, temperature=temperature):
        check(model, export(model, str(tmp_path / "model.onnx")))


def test_torchscript_is_refused():
    """What the exporters cannot do: TorchScript, the stated exception."""
    with pytest.raises(ValueError, match="Unknown type annotation"), pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.script(create("rope"))
