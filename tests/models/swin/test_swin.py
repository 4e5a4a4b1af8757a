"""Swin with every encoding: trains, runs at any size and precision, compiles, exports, does as timm's users expect."""

import copy

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy
from torchvision.models.feature_extraction import get_graph_node_names

import vit2dpe.models  # noqa: F401 - registers the names with timm
from tests.helpers import randn
from vit2dpe import ConfigError, PositionEncoding, Positions, set_policy, sweep, use_policy
from vit2dpe.encodings import ENCODINGS, Alibi, MixedRoPE, RelativeBias
from vit2dpe.models import Swin
from vit2dpe.resolution.apply import policies_of
from vit2dpe.testing import randomise

NAME = "vit2dpe_swin_tiny_patch2_window4_32"
# Grids of 8x12 and 4x6; two rows and two columns of windows in the first stage, and in the second two columns.
MICRO = dict(img_size=(16, 24), window_size=(4, 6), embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=6)
V2 = dict(qk="cosine", post_norm=True)
WORDS = [*ENCODINGS, "sincos+rope_mixed", "learned+relative"]


def micro(position="relative", **kwargs):
    torch.manual_seed(0)
    return Swin(position, **{**MICRO, "patch_size": 2, "drop_path_rate": 0.0, **kwargs})


def drawn(position="relative", **kwargs):
    return randomise(micro(position, **kwargs)).eval()


def images(batch=2, height=16, width=24, seed=0):
    return randn(batch, 3, height, width, seed=seed)


X = images()


def all_but(*now):
    """All words; those that are not named here are slow."""
    return [pytest.param(word, marks=() if word in now else pytest.mark.slow) for word in WORDS]


# every encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize(("position", "v2"), [(word, {}) for word in WORDS] + [("logcpb", V2), ("rope+learned", V2)])
def test_a_few_steps_lower_the_loss_and_leave_nothing_untrained(position, v2):
    model, x, labels = micro(position, **v2), images(6), torch.arange(6)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), []
    for _ in range(8):
        losses.append(cross_entropy(model(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.9 * float(losses[0].detach())
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", WORDS)
@torch.no_grad()
def test_any_size_runs_and_copies_and_loads_give_the_same(position):
    model = drawn(position)
    again = micro(position).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    for size in ((16, 24), (10, 7), (2, 2), (40, 16), (33, 50)):
        x = images(1, *size)
        logits = model(x)
        assert logits.shape == (1, 6)
        assert bool(logits.isfinite().all())
        assert torch.equal(again(x), logits)
        assert torch.equal(copied(x), logits)
    for policy in policies_of(model):
        with use_policy(model, policy, temperature="log"):
            assert bool(model(images(1, 33, 50)).isfinite().all())


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", WORDS)
def test_half_precision_stays_near(position):
    model = micro(position, **(V2 if position == "logcpb" else {})).eval()
    with torch.no_grad():
        exact = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            near = model(X).float()
        half = copy.deepcopy(model).bfloat16()(X.bfloat16())
    assert half.dtype == torch.bfloat16
    size = float(exact.std())
    assert float((near - exact).abs().max()) < 0.1 * size + 0.02
    assert float((half.float() - exact).abs().max()) < 0.2 * size + 0.02
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(X).float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", all_but("relative", "logcpb", "sincos+rope_mixed"))
def test_compiles_whole(position):
    """One stage with a plain and a shifted block, at a size that is filled up."""
    model, x = drawn(position, depths=(2,), num_heads=(2,)), images(2, 14, 26)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_no_image_gives_no_logits():
    model = micro().eval()
    assert model(images(batch=0)).shape == (0, model.num_classes)


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", all_but("relative"))
def test_export_with_dynamic_height_and_width(position):
    """One torch.export program for all sizes with several windows along both axes of every stage."""
    model = drawn(position, depths=(2, 1), dynamic_img_pad=False)
    rows, cols = torch.export.Dim("rows", min=5, max=32), torch.export.Dim("cols", min=7, max=32)
    x = images(2, 24, 40)
    program = torch.export.export(model, (x,), dynamic_shapes={"images": {2: 4 * rows, 3: 4 * cols}}).module()
    for size in ((24, 40), (36, 44), (32, 60)):
        x = images(2, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def test_exports_with_windows_that_scale():
    model = drawn("rope", window_policy="scale", depths=(1,), num_heads=(2,), dynamic_img_pad=False)
    rows, cols = torch.export.Dim("rows", min=5, max=32), torch.export.Dim("cols", min=7, max=32)
    shapes = {"images": {2: 4 * rows, 3: 4 * cols}}
    program = torch.export.export(model, (images(2, 48, 80),), dynamic_shapes=shapes, strict=False).module()
    x = images(2, 40, 72)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def test_encodings_live_where_they_act():
    model = micro("sincos+rope_mixed+alibi")
    assert type(model.position).__name__ == "SinCos"
    for stage, heads in zip(model.layers, (2, 4), strict=True):
        assert isinstance(stage.position, Alibi)
        own = [block.attn.position for block in stage.blocks]
        assert all(isinstance(part, MixedRoPE) and part.freqs.shape == (2, heads, 4) for part in own)
        assert not torch.equal(own[0].freqs, own[1].freqs)
    tables = [tuple(p.shape) for name, p in micro().named_parameters() if "table" in name]
    assert tables == [(2, 7, 11)] * 2 + [(4, 7, 11)] * 2
    depths = [stage.blocks[i].attn.position.slope_here for stage in micro("lookhere").layers for i in (0, 1)]
    assert depths == pytest.approx([1.5, 1.5 - 1 / 3, 1.5 - 2 / 3, 0.5]), "its slope falls over the whole model"


@torch.no_grad()
def test_a_function_from_dims_builds_per_stage_and_block():
    seen = []

    def make(dims):
        seen.append((dims.width, dims.heads, dims.grid, dims.block))
        return RelativeBias(dims.heads, dims.grid) + Alibi(dims.heads)

    model = micro(make)
    assert {(16, 2, (4, 6), 0), (16, 2, (4, 6), 1), (32, 4, (4, 6), 2), (32, 4, (4, 6), 3)} < set(seen)
    word = micro("relative+alibi")
    word.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(word.eval()(X), model.eval()(X))


class Absolute(PositionEncoding):
    gives = frozenset({"bias"})

    def bias(self, q, k):
        return k.coords[..., None, :, 0][:, None]


class Both(Alibi):
    gives = frozenset({"bias", "token"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(position=lambda dims: Absolute()), "Absolute is not relative: .* every window of a Swin has the same pl"),
        (dict(position=lambda dims: Both(dims.heads)), "Both gives tokens and bias at once"),
        (dict(position=RelativeBias(2, (4, 6))), "a spec or a function from Dims to an encoding, got RelativeBias"),
        (dict(position="relativ"), "unknown encoding 'relativ'; did you mean 'relative'"),
        (dict(window_policy="stretch"), "unknown window_policy 'stretch'"),
        (dict(padding="zeros"), "unknown padding 'zeros'"),
        (dict(global_pool="token"), "unknown global_pool 'token'"),
        (dict(qk="cosin"), "unknown qk 'cosin'; did you mean 'cosine'"),
        (dict(depths=(2, 2, 2)), r"got \(2, 2, 2\) and \(2, 4\)"),
        (dict(window_size=(4, 6, 8)), "one for each of 2 stages"),
        (dict(window_size=0), "at least 1"),
        (dict(dynamic_img_pad=False, img_size=(15, 24)), "multiple of the patch 2x2"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro(**arguments)


# windows at other sizes -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_windows_keep_their_side_or_scale_with_the_grid():
    model, seen = drawn("relative"), []
    for stage in model.layers:
        stage.position.register_forward_pre_hook(lambda _, args: seen.append(args[0].extent))
    for policy, expected in (("keep", [(4, 6)] * 2), ("scale", [(6, 6)] * 2)):
        with use_policy(model, policy):
            model(images(1, 24, 24))
        assert seen == expected
        seen.clear()
    assert model.window_policy == "keep"


@torch.no_grad()
def test_scaled_windows_resize_tables_and_evaluate_networks_anew():
    """A model at 24x36 whose table was resized by hand is the model at 16x24 with scaled windows."""
    for word in ("relative", "relative(resize=geometric)", "logcpb", "alibi", "rope_mixed"):
        small = drawn(word, window_policy="scale")
        wide = copy.deepcopy(small)
        wide.set_input_size((24, 36))
        assert wide.window_sizes == ((6, 9), (6, 9))
        if "relative" in word:
            assert wide.layers[0].blocks[0].attn.position.relative_position_bias_table.shape == (2, 11, 17)
        x = images(1, 24, 36)
        torch.testing.assert_close(small(x), wide(x), rtol=1e-5, atol=1e-5)
        wide.window_policy = "keep"
        torch.testing.assert_close(small(x), wide(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_policies_measure_from_the_window():
    """Kept windows are the training windows: no policy and no temperature changes anything. Scaled ones are not."""
    model, x = drawn("rope+alibi"), images(1, 32, 48)
    plain = model(x)
    with use_policy(model, "keep+interpolate", temperature="log"):
        assert torch.equal(model(x), plain)
    results = {}
    for word in ("scale", "scale+extrapolate", "scale+interpolate"):
        with use_policy(model, word):
            results[word] = model(x)
    assert torch.equal(results["scale"], results["scale+extrapolate"])
    assert float((results["scale"] - results["scale+interpolate"]).abs().max()) > 1e-3
    with use_policy(model, "scale", temperature="log"):
        hot = model(x)
    factor = [stage.position.temperature for stage in model.layers]
    assert factor == [None, None]
    assert float((hot - results["scale"]).abs().max()) > 1e-3
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_a_policy_for_good_measures_from_the_window_too():
    model, x = drawn("rope+sincos"), images(1, 32, 48)
    at_home, expected = model(X), {}
    for word in ("interpolate", "scale+interpolate", "scale"):
        with use_policy(model, word):
            expected[word] = model(x)
        chosen = copy.deepcopy(model)
        set_policy(chosen, word)
        assert torch.equal(chosen(x), expected[word])
        assert torch.equal(chosen(X), at_home), "nothing changes at the size of training"
        assert chosen.window_policy == ("scale" if "scale" in word else "keep")
    assert len({float(logits.sum()) for logits in expected.values()}) == 3
    with pytest.raises(ConfigError, match="train is one grid, and Swin has windows of other extents"):
        set_policy(model, "interpolate", train=(8, 12))
    with pytest.raises(ConfigError, match="RelativeBias cannot ntk"):
        set_policy(micro(), "scale+ntk")


def test_policies_are_named_and_refused_with_the_reason():
    both = ("keep+resize", "keep+interpolate", "scale+resize", "scale+interpolate")
    assert policies_of(micro("relative")) == both
    assert policies_of(micro("alibi", window_policy="scale"))[0] == "scale+extrapolate"
    with (
        pytest.raises(ConfigError, match="cannot extrapolate: a table has no entries beyond the grid"),
        use_policy(micro(), "scale+extrapolate"),
    ):
        pass
    vit = timm.create_model("vit2dpe_tiny_patch4_32", depth=1, embed_dim=24, num_heads=3)
    with pytest.raises(ConfigError, match="says what windows do, and ViT has none"), use_policy(vit, "scale+resize"):
        pass


def test_sweep_takes_a_swin():
    rows = sweep(drawn("rope_mixed"), [(images(4), torch.arange(4))], [(16, 24), (20, 30)], ["keep", "scale+ntk"])
    assert [(row["policy"], row["height"], row["train_width"]) for row in rows] == [
        ("keep", 16, 24), ("keep", 20, 24), ("scale+ntk", 16, 24), ("scale+ntk", 20, 24),
    ]  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-5)


@torch.no_grad()
def test_a_small_grid_is_a_cut_out_of_the_window():
    """Masked places do not count: an image smaller than a window sees the middle of the table, unresized."""
    large, x = drawn("relative", depths=(1,), num_heads=(2,), img_size=(16, 24)), images(1, 4, 6)
    small = drawn("relative", depths=(1,), num_heads=(2,), img_size=(4, 6))
    assert small.window_sizes == ((2, 3),)
    state = large.state_dict()
    name = "layers.0.blocks.0.attn.position.relative_position_bias_table"
    state[name] = state[name][:, 2:-2, 3:-3]
    small.load_state_dict(state)
    torch.testing.assert_close(large(x), small(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_moving_the_image_by_whole_windows_moves_the_features():
    """Nothing but the window knows where a token is: what is far from the edges moves along."""
    model = drawn("relative+rope", depths=(2,), num_heads=(2,))
    content = images(1, 16, 24)
    canvas = torch.zeros(2, 3, 48, 72)
    canvas[0, :, 16:32, 24:48] = content
    canvas[1, :, 24:40, 36:60] = content  # one window on
    here, there = model.forward_features(canvas)
    torch.testing.assert_close(here[8:16, 12:24], there[12:20, 18:30], rtol=1e-5, atol=1e-5)


# what timm's users expect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["relative", "learned+rope"])
def test_features_head_and_gradients(position):
    model = drawn(position)
    with torch.no_grad():
        features, logits = model.forward_features(X), model(X)
        assert features.shape == (2, 4, 6, 32)
        assert torch.equal(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        final, maps = model.forward_intermediates(X, norm=True)
        assert torch.equal(final, features)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 12), (2, 32, 4, 6)]
        assert torch.equal(maps[-1].permute(0, 2, 3, 1), features)
        (early,) = model.forward_intermediates(X, [0], stop_early=True, output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(early.permute(0, 3, 1, 2), maps[0])
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.train().set_grad_checkpointing(enable)
        model(X).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(bool(grad.any()) for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_classifier_pruning_and_pools():
    model = drawn()
    model.reset_classifier(0)
    assert torch.equal(model(X), model.forward_head(model.forward_features(X), pre_logits=True))
    model.reset_classifier(5, "max")
    assert model.get_classifier().weight.shape == (5, 32)
    assert (model(X).shape, model.num_classes, model.global_pool) == ((2, 5), 5, "max")
    model.reset_classifier(0, "")
    assert model(X).shape == (2, 4, 6, 32)
    pruned = drawn()
    expected = pruned.forward_intermediates(X, [0], intermediates_only=True)[0]
    assert pruned.prune_intermediate_layers([0]) == [0]
    assert torch.equal(pruned(X).permute(0, 3, 1, 2), expected)


def test_features_only_and_fx():
    small = {**MICRO, "img_size": (16, 24)}
    features = timm.create_model(NAME, features_only=True, **small)
    assert [tuple(f.shape) for f in features(X)] == [(2, 16, 8, 12), (2, 32, 4, 6)]
    assert features.feature_info.channels() == [16, 32]
    assert features.feature_info.reduction() == [2, 4]
    model = drawn("sincos+relative")
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    names, _ = get_graph_node_names(model, tracer_kwargs=tracer)
    graph = create_feature_extractor(model, {names[-1]: "out"})
    with torch.no_grad():
        for x in (X, images(2, 10, 30)):
            assert torch.equal(graph(x)["out"], model(x))
            assert torch.equal(torch.fx.Interpreter(graph).run(x)["out"], model(x))  # which hands no dictionary on


def test_each_stage_sees_places_on_its_own_device():
    model, seen = micro("rope", window_size=(2, 3)), []
    for part in (model.layers[1], model.norm, model.head):
        part.to("meta")
    model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].to("meta"), *args[1:]))
    for stage in model.layers:
        stage.position.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert model(X).is_meta
    assert [(at.extent, str(at.coords.device)) for at in seen] == [((2, 3), "cpu"), ((2, 3), "meta")]


@pytest.mark.parametrize("position", ["relative", "logcpb+learned", "t5+rope_mixed"])
def test_optimizer_groups(position):
    model = micro(position, **V2)
    inside = {name for name, _ in model.named_parameters() if "position" in name or "logit_scale" in name}
    assert model.no_weight_decay() == inside
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1, layer_decay=0.5)
    group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scale = {name: group[id(p)]["lr_scale"] for name, p in model.named_parameters()}
    assert all(group[id(p)]["weight_decay"] == 0 for name, p in model.named_parameters() if name in inside)
    order = ["patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight", "layers.0.blocks.1.mlp.fc1.weight",
             "layers.1.blocks.0.mlp.fc1.weight", "layers.1.blocks.1.mlp.fc1.weight", "head.fc.weight"]  # fmt: skip
    assert [scale[name] for name in order] == sorted(scale[name] for name in order)
    assert len({scale[name] for name in order}) == len(order)
    for name in scale:
        if ".attn.position." in name:
            assert scale[name] == scale[name.split(".attn.")[0] + ".mlp.fc1.weight"]
        elif name.startswith("position."):
            assert scale[name] == scale["patch_embed.proj.weight"]
        elif ".position." in name or ".downsample." in name:
            assert scale[name] == scale[".".join(name.split(".")[:2]) + ".blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize("position", ["relative", "logcpb", "rope_mixed+fourier"])
def test_meta_build_then_load_or_init(position):
    model = drawn(position, **V2)
    with torch.device("meta"):
        empty = micro(position, **V2)
    loaded = copy.deepcopy(empty).to_empty(device="cpu").eval()
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
    fresh = empty.to_empty(device="cpu")
    for p in fresh.parameters():
        torch.nn.init.constant_(p, float("nan"))
    fresh.init_weights()
    assert all(bool(p.isfinite().all()) for p in fresh.parameters())
    assert bool((fresh.layers[0].blocks[0].norm1.weight == 0).all()), "a V2 block starts as the identity"


def test_set_input_size_and_the_way_to_a_file(tmp_path):
    from timm.models import save_for_hf

    model = drawn("relative+learned")
    model.set_input_size((24, 48), window_size=(6, 4))
    assert (model.train_grid, model.window_sizes) == ((12, 24), ((6, 4), (6, 4)))
    again = micro("relative+learned", img_size=(24, 48), window_size=(6, 4)).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    x = images(1, 24, 48)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    model.set_input_size(window_ratio=(2, 4))
    assert model.window_sizes == ((6, 12), (3, 6))
    model.set_input_size(patch_size=4)
    assert (model.patch_embed.patch_size, model.train_grid) == ((4, 4), (6, 12))

    named = randomise(timm.create_model(NAME, position="rope_mixed", **MICRO)).eval()
    save_for_hf(named, tmp_path, model_args=dict(position="rope_mixed", **MICRO))
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(back(X), named(X))


def test_sizes_are_refused_where_told():
    with pytest.raises(ConfigError, match="dynamic_img_size=True"):
        micro(dynamic_img_size=False)(images(1, 16, 16))
    with pytest.raises(ConfigError, match="multiple of the patch"):
        micro(dynamic_img_pad=False)(images(1, 15, 24))
    assert isinstance(micro().positions(15, 24), Positions)


def test_the_cifar_model_has_the_size_it_should():
    model = timm.create_model(NAME, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.05e6, rel=0.01)
    assert model.window_sizes == ((4, 4),) * 3
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
