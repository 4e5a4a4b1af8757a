"""A model to start from: described without its weights, built with them, at another size or with another encoding."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from tests.helpers import randn, shaken
from vit2dpe import MAE, ViT, from_timm, load_run, set_policy, use_policy
from vit2dpe.errors import CheckpointError, ConfigError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.models.timm_api import recorded_policies
from vit2dpe.training.checkpoint import save_model, write_checkpoint, write_policy
from vit2dpe.training.start import describe

MICRO = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
SIZES = dict(img_size=(16, 24), patch_size=8, class_token=False, global_pool="avg", **MICRO)
NAMES = {  # of timm, made small
    "vit_tiny_patch16_224": MICRO | dict(img_size=(32, 64)),
    "eva02_tiny_patch14_224": MICRO | dict(img_size=(28, 56)),
    "vit_small_patch16_rope_mixed_224": MICRO | dict(img_size=(32, 64)),
    "beit_base_patch16_224": MICRO | dict(img_size=(32, 64)),
    "swin_tiny_patch4_window7_224": dict(
        embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5, img_size=(56, 112)
    ),
    "vit2dpe_tiny_patch8_64": MICRO | dict(position="sincos+rope(base=10)", img_size=(16, 24)),
    "test_resnet": dict(num_classes=5),
}


def stored(name, folder):
    """A timm name with weights of a local file in place of timm's, as a user writes it, and the model."""
    torch.manual_seed(0)
    model = shaken(timm.create_model(name, **NAMES[name]))
    file = folder / "weights.safetensors"
    save_file(model.state_dict(), file)
    overlay = dict(file=str(file), num_classes=5, custom_load=False)
    given = NAMES[name] | dict(pretrained_cfg_overlay=overlay)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})", model


def image(model, size=None):
    return randn(2, 3, *(size or getattr(model.patch_embed, "img_size", (32, 32))), seed=1)


@torch.no_grad()
def logits(model, x):
    return model.eval()(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_its_own_encoding_computes_what_timm_computes(name, tmp_path):
    text, theirs = stored(name, tmp_path)
    start = describe(text)
    assert start.size == tuple(NAMES[name].get("img_size", start.size))
    ours, loaded = start.load()
    x = randn(2, 3, *start.size, seed=1)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=0, atol=2e-5)
    assert loaded.left == []
    assert start.mean == tuple(theirs.pretrained_cfg["mean"]) == tuple(ours.pretrained_cfg["mean"])
    assert str(start).startswith(f"{text}: weights")


def test_describing_a_name_reads_no_weights(tmp_path, monkeypatch):
    text, _ = stored("vit_tiny_patch16_224", tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    start = describe(text)
    assert (start.position, start.size, start.patch, start.channels) == ("learned", (32, 64), (16, 16), 3)
    assert start.settings == dict(
        position="learned", patch=16, width=48, depth=2, heads=3, mlp_ratio=4.0, pool="token", class_token=True
    )
    with pytest.raises(ConfigError, match="timm could not load the weights of vit_tiny_patch16_224"):
        start.load()


def test_a_name_with_a_file_of_weights(tmp_path):
    _, theirs = stored("vit_tiny_patch16_224", tmp_path)
    given = NAMES["vit_tiny_patch16_224"] | dict(checkpoint_path=str(tmp_path / "weights.safetensors"))
    model, _ = describe(f"vit_tiny_patch16_224({', '.join(f'{key}={value!r}' for key, value in given.items())})").load()
    torch.testing.assert_close(logits(model, image(model)), logits(theirs, image(model)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("position", ["none", "rope", "alibi", "relative", "learned", "learned+rope", "sincos"])
def test_another_encoding_has_every_other_weight(position, tmp_path):
    """As `from_timm` with that word: bit by bit, but for what is drawn anew."""
    text, theirs = stored("vit_tiny_patch16_224", tmp_path)
    model, loaded = describe(text).load(position, num_classes=5)
    reference = from_timm(theirs, position).state_dict()
    for name, value in model.state_dict().items():
        assert name in loaded.left or torch.equal(value, reference[name]), name
    assert all("position" in name for name in loaded.left)
    dropped = [] if "learned" in position else ["position.pos_embed"]
    assert [name for name in loaded.unused if "position" in name] == dropped
    assert torch.isfinite(logits(model, image(model))).all()


def test_a_word_keeps_the_options_and_weights_of_the_encoding_it_names(tmp_path):
    text, _ = stored("vit2dpe_tiny_patch8_64", tmp_path)
    start = describe(text)
    assert start.changed("rope").arguments["position"] == "rope(base=10)"
    assert start.changed("rope(base=7)").arguments["position"] == "rope(base=7)"
    assert describe(stored("eva02_tiny_patch14_224", tmp_path)[0]).load("learned")[1].left == []


def test_a_table_of_the_same_shape_in_another_encoding_is_not_taken(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path, ViT("fire", **SIZES), dict(SIZES, position="fire"))
    model, loaded = describe(tmp_path).load("logcpb")
    own = {name for name in model.state_dict() if "position" in name}
    assert own <= set(loaded.left)


def test_another_size_resizes_the_tables(tmp_path):
    text, theirs = stored("vit_tiny_patch16_224", tmp_path)
    model, loaded = describe(text).load(size=(48, 96))
    assert loaded.left == []
    reference = from_timm(theirs, img_size=(48, 96))
    torch.testing.assert_close(logits(model, image(model)), logits(reference, image(model)), rtol=0, atol=1e-6)


def test_grey_images_and_other_classes(tmp_path):
    model, loaded = describe(stored("vit_tiny_patch16_224", tmp_path)[0]).load(num_classes=7, channels=1)
    assert loaded.adapted == ("patch_embed.proj.weight",)
    assert loaded.left == ["head.weight", "head.bias"]
    assert model(randn(1, 1, 32, 64)).shape == (1, 7)


def test_what_is_loaded_is_saved_and_started_from_again(tmp_path):
    text, _ = stored("vit_tiny_patch16_224", tmp_path)
    start = describe(text)
    spec = start.changed("rope", num_classes=5)
    model = start.load("rope", num_classes=5)[0]
    save_model(tmp_path / "run", model)
    (tmp_path / "weights.safetensors").unlink()
    again = describe(tmp_path / "run")
    assert json.dumps(again.changed("rope", num_classes=5)) == json.dumps(ModelSpec(spec.kind, again.spec.arguments))
    assert torch.equal(logits(again.load()[0], image(model)), logits(model, image(model)))
    assert describe(tmp_path / "run" / "model.safetensors").load("none")[1].left == []


def test_a_run_of_timms_own_model_changes_its_encoding_too(tmp_path):
    torch.manual_seed(0)
    theirs = shaken(timm.create_model("vit_tiny_patch16_224", **NAMES["vit_tiny_patch16_224"]))
    save_model(tmp_path, theirs)
    start = describe(tmp_path)
    torch.testing.assert_close(logits(start.load()[0], image(theirs)), logits(theirs, image(theirs)), rtol=0, atol=2e-5)
    assert "position.pos_embed" in start.load("rope")[1].unused


def test_of_a_masked_autoencoder_the_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = {**SIZES, "num_classes": 0, "fc_norm": False, "position": "rope", "img_size": [16, 24]}
    model = ModelSpec("MAE", dict(encoder=encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)).build()
    assert isinstance(model, MAE)
    arguments = dict(encoder=encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    save_model(tmp_path, shaken(model), arguments, mean=[0.5], std=[0.2])
    start = describe(tmp_path)
    assert (start.position, start.size, start.mean) == ("rope", (16, 24), (0.5,))
    classifier, loaded = start.load(num_classes=3)
    assert loaded.left == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert torch.equal(classifier.blocks[1].attn.qkv.weight, model.encoder.blocks[1].attn.qkv.weight)


def test_a_head_of_other_classes_is_drawn_anew(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path, ViT("rope", **SIZES), dict(SIZES, position="rope"), classes=list("abcde"))
    start = describe(tmp_path)
    model = start.spec.build()
    assert start.load_into(model, start.spec, list("edcba")).left == []
    assert start.load_into(model, start.spec, list("vwxyz")).left == ["head.weight", "head.bias"]


def hub(folder):
    torch.manual_seed(0)
    model = shaken(timm.create_model("vit2dpe_tiny_patch8_64", **NAMES["vit2dpe_tiny_patch8_64"]))
    save_for_hf(model, folder, safe_serialization=True)
    return model


def sharded(file, folder):
    """The tensors of a file in two, with an index."""
    state = load_file(file)
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder.mkdir(exist_ok=True)
    for part, inside in parts.items():
        save_file({name: state[name] for name in inside}, folder / part)
    where = {name: part for part, inside in parts.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))


def test_a_hub_folder_its_file_and_its_file_in_parts(tmp_path):
    model = hub(tmp_path / "hub")
    for source in (tmp_path / "hub", f"local-dir:{tmp_path / 'hub'}", tmp_path / "hub" / "model.safetensors"):
        start = describe(source)
        assert start.position == "sincos+rope(base=10)"
        assert torch.equal(logits(start.load()[0], image(model)), logits(model, image(model)))
    sharded(tmp_path / "hub" / "model.safetensors", tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"architecture of .*parts is not known: .* --model.width"):
        describe(tmp_path / "parts")
    bare = describe(tmp_path / "parts", architecture=start.spec)
    assert torch.equal(logits(bare.load()[0], image(model)), logits(model, image(model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update({"norm.weight": "../w.safetensors"}), "in the folder of the index"),
        (lambda index: index["weight_map"].update({"other": "model-00001-of-00002.safetensors"}), "lacks other"),
        (lambda index: index["weight_map"].update({"norm.weight": "x.safetensors"}), r"x\.safetensors is missing"),
        (lambda index: index.pop("weight_map"), "has no weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, change, message):
    hub(tmp_path / "hub")
    sharded(tmp_path / "hub" / "model.safetensors", tmp_path / "parts")
    path = tmp_path / "parts" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    spec = describe(tmp_path / "hub").spec
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path / "parts", architecture=spec).load()


def test_a_file_of_another_architecture_is_refused(tmp_path):
    hub(tmp_path / "hub")
    torch.save(load_file(tmp_path / "hub" / "model.safetensors"), tmp_path / "w.pth")
    spec = ModelSpec("ViT", {**SIZES, "embed_dim": 24, "position": "rope"})
    with pytest.raises(CheckpointError, match="is of another architecture"):
        describe(tmp_path / "w.pth", architecture=spec).load()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vit_tiny_patch16_2244", "did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224.augrek", "did you mean"),
        ("vit2dpe_tiny_patch4_32", "timm has no weights for vit2dpe_tiny_patch4_32"),
        ("vit_tiny_patch16_224(img_size=64", "a name with arguments is written"),
        ("nothing.safetensors", r"nothing at nothing\.safetensors"),
        ("/nowhere", "nothing at /nowhere"),
        ("google/vit-base", "hf-hub:google/vit-base"),
    ],
)
def test_what_is_not_there_is_refused_by_its_name(source, message):
    with pytest.raises(ConfigError, match=message):
        describe(source)


def test_an_encoding_that_cannot_be_exchanged_says_why(tmp_path):
    start = describe(stored("test_resnet", tmp_path)[0])
    assert start.position is None
    assert start.load(num_classes=3)[1].left == ["fc.weight", "fc.bias"]
    with pytest.raises(ConfigError, match="test_resnet: ResNet is not covered"):
        start.load("rope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is no run"):
        describe(Path(tmp_path / "empty"))


POLICY, TEMPERATURE = "interpolate(power=0.5)", "log(power=2)"


def tuned(folder, kind, position="rope"):
    """A run with a policy that was written beside its arguments, as `tune` does it."""
    torch.manual_seed(0)
    sizes = dict(SIZES, position=position)
    if kind == "ViT":
        save_model(folder / "last", shaken(ViT(**sizes), seed=None), sizes, classes=list("abcde"))
    else:
        named = {"vit2dpe_from_timm": dict(base="vit_tiny_patch16_224")}.get(kind, {})
        save_model(folder / "last", shaken(timm.create_model(kind, **named, **sizes), seed=None))
    write_policy(folder / "last", POLICY, TEMPERATURE)
    return folder


@pytest.mark.parametrize("kind", ["ViT", "vit2dpe_tiny_patch8_64", "vit2dpe_from_timm"])
def test_the_policy_of_a_run_goes_with_its_encoding(kind, tmp_path):
    run = tuned(tmp_path / "run", kind)
    start = describe(run)
    assert POLICY in str(start)
    model, loaded = start.load()
    x = image(model, (32, 24))
    assert loaded.left == []
    assert torch.equal(logits(model, x), logits(load_run(run), x))
    with use_policy(model, "extrapolate"):
        assert not torch.allclose(logits(model, x), logits(load_run(run), x), atol=1e-4)
    write_checkpoint(tmp_path / "next", start.changed(), {"model": model.state_dict()})
    again = describe(tmp_path / "next")
    assert torch.equal(logits(again.load()[0], x), logits(model, x)), "a run that started from it, and so on"
    for one in (start, again):
        for word in ("learned", "learned+rope", "none"):
            assert not {"policy", "temperature"} & one.changed(word).arguments.keys()
            assert torch.isfinite(logits(one.load(word)[0], x)).all()
        assert recorded_policies(one.load("rope(base=10)")[0])[-1] == (POLICY, TEMPERATURE)


def test_another_policy_than_that_of_the_arguments_is_saved_beside_them(tmp_path):
    start = describe(tuned(tmp_path, "ViT"))
    model, spec = start.load()[0], start.changed()
    set_policy(model, "ntk")
    save_model(tmp_path / "next", model, spec.arguments)
    x = image(model, (32, 24))
    for again in (load_run(tmp_path / "next"), describe(tmp_path / "next").load()[0]):
        assert torch.equal(logits(again, x), logits(model, x))
