"""One ONNX file for an encoding: batch, height and width are free, and onnxruntime's logits are ours."""

from functools import partial

import onnxruntime
import pytest
import torch

from tests.helpers import micro_vit
from tests.models.test_trace import Masked, masked
from vit2dpe import Swin, use_policy
from vit2dpe.attention.windows import _rolled
from vit2dpe.encodings import ENCODINGS
from vit2dpe.testing import randomise

# Pooled over patches: at depth 1 a class token, which stands nowhere, sees no bias.
SIZES = ((1, 32, 32), (3, 48, 20), (2, 56, 88))  # batch, height, width
QUICK = ("relative",)  # and learned+rope, in docs/tools.md
create = partial(micro_vit, depth=1, global_pool="avg")


def export(model, path, free=None, size=(32, 48), grad=False):
    batch, rows, cols = (torch.export.Dim(name, min=1, max=128) for name in ("batch", "rows", "cols"))
    with torch.set_grad_enabled(grad):
        torch.onnx.export(
            model,
            (torch.randn(2, 3, *size),),
            path,
            dynamo=True,
            dynamic_shapes={"images": free or {0: batch, 2: 4 * rows, 3: 4 * cols}},
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check(model, session, sizes=SIZES):
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", [pytest.param(w, marks=pytest.mark.slow) for w in [*ENCODINGS, "learned+rope"]])
def test_one_file_for_all_sizes(position, tmp_path):
    model = create(position)
    check(model, export(model, str(tmp_path / "model.onnx")))


@pytest.mark.need("C3")
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
@pytest.mark.parametrize("mode", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eval", "train"])
@pytest.mark.parametrize("position", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow)
                                      for w in [*ENCODINGS, "sincos+rope+relative"]])  # fmt: skip
def test_with_gradients_on(position, mode, tmp_path):
    """Nothing is frozen, and nothing is said about gradients."""
    position = "rope_dinov3(rescale=1)" if mode and position == "rope_dinov3" else position  # else places are drawn
    model = create(position).train(mode)
    check(model, export(model, str(tmp_path / "model.onnx"), grad=True))


@pytest.mark.need("C3")
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
@pytest.mark.slow
@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("position", ["relative", "logcpb", "rope_mixed", "alibi"])
def test_a_swin_with_gradients_on(position, mode, tmp_path):
    model = swin(**STAGES, position=position).train(mode)
    check(model, export(model, str(tmp_path / "model.onnx"), size=(48, 72), grad=True), [(1, 64, 40), (8, 44, 60)])


def swin(**changes):
    torch.manual_seed(0)
    sizes = dict(img_size=48, patch_size=4, embed_dim=24, depths=(2,), num_heads=(2,), window_size=5, num_classes=7)
    return randomise(Swin(**sizes | changes)).eval()


STAGES = dict(depths=(2, 2), num_heads=(2, 2), window_size=3)
ANY = {0: torch.export.Dim("batch", max=64), **{i: torch.export.Dim(f"side{i}", min=20, max=256) for i in (2, 3)}}


@pytest.mark.need("C1")
@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, None),
        pytest.param(STAGES, None, marks=pytest.mark.slow),
        pytest.param(STAGES, {0: torch.export.Dim("batch", max=64)}, marks=pytest.mark.slow),
        pytest.param(STAGES, ANY, marks=pytest.mark.slow),
        pytest.param(STAGES | dict(position="logcpb", qk="cosine", post_norm=True), None, marks=pytest.mark.slow),
        pytest.param(dict(padding="attend"), None, marks=pytest.mark.slow),
        pytest.param(dict(padding="timm"), ANY, marks=pytest.mark.slow),
        pytest.param(STAGES | dict(padding="timm"), ANY, marks=pytest.mark.slow),
    ],
    ids=["one stage", "stages", "batch alone", "any pixels", "V2", "attend", "timm", "timm stages"],
)
def test_windows_shifted_and_filled_at_any_batch(changes, free, tmp_path):
    model, size = swin(**changes), (61, 97) if free is ANY else (48, 72)
    session = export(model, str(tmp_path / "model.onnx"), free, size)
    sizes = [size] if free is not None and free is not ANY else [(48, 72), (64, 40), (44, 60)]
    sizes += [(41, 43)] if free is ANY else []
    check(model, session, [(batch, *sizes[i % len(sizes)]) for i, batch in enumerate((1, 2, 8, 3))])


@pytest.mark.need("C1b")
def test_no_remainder_by_a_free_number():
    """ONNX has none of a tensor by a free number; places that timm rolls are those of `%`."""

    class Rolled(torch.nn.Module):
        def forward(self, x):
            return _rolled(torch.arange(x.shape[1]).view(x.shape), 7, x.shape[1] - 3)

    x = torch.zeros(1, 9)
    free = {"x": {1: torch.export.Dim("places", min=5, max=64)}}
    program = torch.export.export(Rolled(), (x,), dynamic_shapes=free)
    assert "remainder.Scalar" not in str(program.graph)
    for size in (5, 9, 40):
        expected = [(i + 7) % (size - 3) if i < size - 3 else i for i in range(size)]
        assert program.module()(torch.zeros(1, size)).flatten().tolist() == expected


@pytest.mark.need("C2a")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*The axis name. batch will not be used")
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no_grad"])
@pytest.mark.parametrize("position", ["rope", "relative"])
@pytest.mark.parametrize("kind", ["MAE", "SimMIM", "Swin"])
def test_masked_models_at_any_batch(kind, position, grad):
    """Of one size: how many patches are kept is a number of the file."""
    model, (images, noise) = Masked(masked(kind, position)).eval(), (torch.randn(2, 3, 32, 48), torch.rand(2, 24))
    free = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in ("images", "noise")}
    with torch.set_grad_enabled(grad):
        file = torch.onnx.export(model, (images, noise), dynamo=True, dynamic_shapes=free, verbose=False)
    session = onnxruntime.InferenceSession(file.model_proto.SerializeToString())
    for batch in (1, 5):
        given = {"images": torch.randn(batch, 3, 32, 48), "noise": torch.rand(batch, 24).round(decimals=1)}
        found = session.run(None, {name: x.numpy() for name, x in given.items()})
        with torch.no_grad():
            for ours, theirs in zip(found, model(**given), strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=1e-4)


@pytest.mark.need("C1a")
@pytest.mark.slow
def test_images_that_the_patch_does_not_divide(tmp_path):
    model = create("relative", dynamic_img_pad=True)
    check(model, export(model, str(tmp_path / "model.onnx"), ANY, (61, 97)), [(1, 64, 96), (8, 41, 43)])


@pytest.mark.need("C1a")
def test_no_size_is_divided_as_a_negative_number():
    """ONNX rounds -41 // 4 towards zero: patches at the edge would be lost."""

    class Grid(torch.nn.Module):
        def forward(self, x):
            return x.new_zeros(patches.grid(*x.shape))

    patches = create("none", dynamic_img_pad=True).patch_embed
    program = torch.export.export(Grid(), (torch.zeros(41, 43),), dynamic_shapes={"x": {0: ANY[2], 1: ANY[3]}})
    assert "neg" not in str(program.graph)
    assert "* -1" not in str(program.graph)
    assert program.module()(torch.zeros(50, 61)).shape == (13, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position", "policy", "temperature"),
    [("rope", "ntk", "log"), ("rope_mixed", "yarn", "none"), ("alibi+sincos", "interpolate", "yarn")],
)
def test_a_policy_goes_into_the_file(position, policy, temperature, tmp_path):
    model = create(position)
    with use_policy(model, policy, temperature=temperature):
        check(model, export(model, str(tmp_path / "model.onnx")))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of torch 2.14
def test_torchscript_is_refused():
    """What the exporters cannot do: TorchScript, the stated exception."""
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(create("rope"))
