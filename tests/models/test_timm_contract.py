"""What timm's tools do with a timm model works with ours: every registered name, every encoding, micro sizes."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import get_graph_node_names

import vit2dpe.models  # noqa: F401
from tests.helpers import MICRO, micro_vit, randn
from vit2dpe.encodings import ENCODINGS
from vit2dpe.models import ViT
from vit2dpe.models.features import take_indices
from vit2dpe.testing import randomise

NAMES = timm.list_models("vit2dpe_*", exclude_filters="vit2dpe_from_timm")
X = randn(2, 3, 32, 48)
MICRO = MICRO | dict(depth=3)
create = partial(micro_vit, depth=3)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_timm_citizen(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["input_size"][-1] == int(name.rsplit("_", 1)[-1])
    state = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state
    assert model.num_classes == 1000
    assert len(model.feature_info) == len(model.layers if "swin" in name else model.blocks)


@pytest.mark.parametrize("position", ENCODINGS)
def test_features_head_and_gradients(position):
    model = create(position, reg_tokens=1, global_pool="avg")
    with torch.no_grad():
        features = model.forward_features(X)
        logits = model(X)
        assert features.shape == (2, 2 + 96, 48)
        assert torch.equal(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        final, maps = model.forward_intermediates(X)
        assert torch.equal(final, features)
        assert [tuple(m.shape) for m in maps] == [(2, 48, 8, 12)] * 3
        (tokens, prefix), = model.forward_intermediates(
            X, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )  # fmt: skip
        assert tokens.shape == (2, 96, 48)
        assert prefix.shape == (2, 2, 48)
        assert torch.equal(maps[-1].flatten(2).mT, model.forward_intermediates(X, [-1], output_fmt="NLC")[1][0])
        early = model.forward_intermediates(X, [0], stop_early=True, output_dict=True, intermediates_only=True)
        assert torch.equal(early["image_intermediates"][0], maps[0])
    model.set_grad_checkpointing()
    final, _ = model.forward_intermediates(X)
    torch.testing.assert_close(final, features, rtol=1e-4, atol=1e-4)
    model.set_grad_checkpointing(False)
    model(X).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize(
    ("indices", "chosen"),
    [(None, [0, 1, 2]), (2, [1, 2]), ([0, -1], [0, 2]), (0, None), (4, None), ([3], None), ([-4], None), ([], None)],
)
def test_layers_are_chosen_as_in_timm(indices, chosen):
    if chosen is None:
        with pytest.raises(ValueError, match=r"numbered from 0 to 2, or -3 to -1: got"):
            take_indices(3, indices)
    else:
        assert take_indices(3, indices) == (chosen, chosen[-1])


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
def test_fx_traces_exactly_and_serves_other_sizes(position):
    model = create(position, reg_tokens=1)
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    names, _ = get_graph_node_names(model, tracer_kwargs=tracer)
    graph = create_feature_extractor(model, {names[-1]: "out"})
    with torch.no_grad():
        for x in (X, X[..., :16, :24]):
            assert torch.equal(graph(x)["out"], model(x))


@pytest.mark.parametrize("position", ENCODINGS)
def test_features_only_and_patch_drop(position):
    features = timm.create_model("vit2dpe_tiny_patch4_32", position=position, features_only=True, **MICRO)
    assert [tuple(f.shape) for f in features(X)] == [(2, 48, 8, 12)] * 3
    assert features.feature_info.channels() == [48] * 3
    model = create(position, patch_drop_rate=0.5).train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], args[2].coords.shape)))
    model(X).sum().backward()
    assert seen == [(1 + 48, torch.Size([2, 48, 2]))], "half of the tokens, each sample its own, places with them"


def test_dropped_patches_keep_their_places():
    """With a rate that drops nothing but shuffles, a model in training mode gives the logits of evaluation."""
    model = create("sincos+relative+rope", global_pool="avg", class_token=False)
    plain = model(X)
    model.patch_drop.rate = 1e-20
    torch.testing.assert_close(model.train()(X), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "token", "map", ""])
def test_classifier_reset(pool):
    model = create(global_pool=pool)
    model.reset_classifier(0)
    assert torch.equal(model(X), model.forward_head(model.forward_features(X), pre_logits=True))
    model.reset_classifier(5)
    assert model.get_classifier().weight.shape == (5, 48)
    assert model(X).shape[-1] == 5
    model.reset_classifier(0, "")
    assert model(X).shape == (2, 97, 48)
    assert timm.create_model("vit2dpe_tiny_patch4_32", **{**MICRO, "num_classes": 0})(X).shape == (2, 48)


@pytest.mark.parametrize(
    "position", ["learned", "windowed+rope_mixed", "factorized", "relative", "logcpb+fourier", "t5+fire"]
)
def test_optimizer_groups(position):
    model = create(position, reg_tokens=1)
    inside = {n for n, _ in model.named_parameters() if "position" in n}
    assert inside <= model.no_weight_decay()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        stage = name.split(".")[0]
        layer = int(name.split(".")[1]) + 1 if stage == "blocks" else {"norm": 3, "head": 4}.get(stage, 0)
        assert scale[id(p)] == pytest.approx(0.5 ** (4 - layer)), name


@pytest.mark.parametrize("position", ENCODINGS)
def test_meta_build_then_load_or_init(position):
    model = create(position)
    with torch.device("meta"):
        empty = ViT(position, img_size=32, patch_size=4, **MICRO)
    loaded = copy.deepcopy(empty).to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), model(X))
    drawn = empty.to_empty(device="cpu")
    for p in drawn.parameters():
        torch.nn.init.constant_(p, float("nan"))
    drawn.init_weights()
    assert all(p.isfinite().all() for p in drawn.parameters())
    assert drawn(X).isfinite().all()


def test_device_and_dtype():
    model = ViT("rope+learned+relative", img_size=32, patch_size=4, dtype=torch.bfloat16, device="cpu", **MICRO)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert model.position(model.positions(32, 32)).q_rotation.cos.dtype == torch.float32
    assert next(ViT("rope", device="meta", **MICRO).parameters()).is_meta


@pytest.mark.parametrize("position", ["learned", "windowed", "factorized", "relative", "relative(resize=geometric)"])
def test_set_input_size_is_the_resize_made_for_good(position):
    model = create(position)
    with torch.no_grad():
        wide = model(X)
        model.set_input_size((32, 48))
        torch.testing.assert_close(model(X), wide, rtol=1e-5, atol=1e-5)
    assert model.train_grid == (8, 12)
    again = create(position, img_size=(32, 48))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("name", ["vit2dpe_tiny_patch4_32", "vit2dpe_swin_tiny_patch2_window4_32"])
def test_another_patch_is_timms(tmp_path, name):
    """The kernel is resampled as in timm, the grid follows, and a hub folder gives the same model back."""
    micro = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 2)) if "swin" in name else MICRO
    model = randomise(timm.create_model(name, position="relative+learned", img_size=(32, 48), **micro)).eval()
    before, kernel, reduction = model.train_grid, model.patch_embed.proj.weight, model.feature_info[-1]["reduction"]
    patch = tuple(2 * side for side in model.patch_embed.patch_size)
    theirs = timm.models.VisionTransformer(
        img_size=(32, 48), patch_size=model.patch_embed.patch_size, embed_dim=kernel.shape[0], depth=1, num_heads=2
    )
    theirs.patch_embed.load_state_dict(model.patch_embed.state_dict(), strict=False)
    theirs.set_input_size(img_size=(48, 64), patch_size=patch)
    if "swin" not in name:  # a Swin fills images up
        with pytest.raises(ValueError, match="multiple of the patch"):
            model.set_input_size(patch_size=5)
    assert model.train_grid == before
    model.set_input_size((48, 64), patch_size=patch)
    assert torch.equal(model.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert model.train_grid == tuple(side // p for side, p in zip((48, 64), patch, strict=True))
    assert model.feature_info[-1]["reduction"] == 2 * reduction
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    "position", ["learned", "windowed", "factorized", "relative", "relative(resize=geometric)+rope"]
)
@pytest.mark.parametrize(("old", "new"), [((28, 56), (56, 112)), ((32, 72), (48, 48)), ((64, 64), (40, 80))])
def test_tables_of_another_grid_come_out_right(position, old, new, caplog):
    """7x14 into 14x28, 8x18 into 12x12, 16x16 into 10x20: loading equals running the original at the new size."""
    source = create(position, img_size=old, depth=1)
    target = create(position, img_size=new, depth=1)
    with caplog.at_level("INFO", logger="vit2dpe.models.weights"):
        target.load_state_dict(source.state_dict())
    assert "resized from" in caplog.text
    x = torch.randn(1, 3, *new)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)
    same = create(position, img_size=old, depth=1)
    same.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True))


def test_a_flat_table_of_unknown_grid_is_refused():
    model = create("learned", depth=1)
    state = model.state_dict()
    state["pos_embed"] = torch.zeros(1, 1 + 7 * 10, 48)
    with pytest.raises(ValueError, match="does not say which grid"):
        model.load_state_dict(state)


def test_files_at_another_size_class_count_and_channel_count(tmp_path):
    """timm's overlay with a file: another size, head and channels; `position` survives save_for_hf and local-dir."""
    from safetensors.torch import save_file

    source = create("learned+rope")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = timm.create_model(
        "vit2dpe_tiny_patch4_32", pretrained=True, position="learned+rope", in_chans=1, img_size=(48, 32),
        pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.safetensors"), num_classes=7),
        **{**MICRO, "num_classes": 3},
    )  # fmt: skip
    assert model.position.terms[0].pos_embed.shape == (1, 12, 8, 48)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert model(torch.randn(1, 1, 48, 32)).shape == (1, 3)
    save_for_hf(source, tmp_path / "hub", model_args=dict(position="learned+rope", **MICRO))
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(X), source(X))


def test_sizes_are_refused_or_padded_as_told():
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        create(dynamic_img_size=False)(X)
    model = create("sincos", dynamic_img_pad=True)
    assert model(torch.randn(1, 3, 30, 45)).shape == (1, 7)
    filled = torch.nn.functional.pad(X[..., :30, :45], (0, 3, 0, 2))
    with torch.no_grad():
        assert torch.equal(model(X[..., :30, :45]), model(filled))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
def test_export_with_dynamic_height_and_width(position):
    """One torch.export program for all sizes. Where the exporter cannot, the test says so by name."""
    model = create(position, depth=2, global_pool="avg")  # so that a wrong bias reaches the logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.1 if "cpb_mlp.2" in name else 1)  # a bias at its bound would hide one too
    rows, cols = torch.export.Dim("rows", min=3, max=32), torch.export.Dim("cols", min=3, max=32)
    program = torch.export.export(model, (X,), dynamic_shapes={"images": {2: 4 * rows, 3: 4 * cols}}).module()
    for size in ((32, 32), (48, 20), (24, 64)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit2dpe_tiny_patch4_32", "vit2dpe_swin_tiny_patch2_window4_32"])
def test_an_argument_that_no_model_has_is_a_type_error_as_timms_tests_ask(name):
    with pytest.raises(TypeError, match="qk_nrom"):
        timm.create_model(name, qk_nrom=True)
