"""The bench refuses to time what is not equal, and its counters count; clockless gates of what a rotary model costs."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch

from benchmarks import BenchConfig, bench, contenders, interval, kernels, peak_bytes, saved_bytes
from benchmarks.measure import buffer_bytes, step_kernels
from benchmarks.table import markdown, verdict
from vit2dpe import ConfigError, PositionEncoding, Swin, ViT, frozen
from vit2dpe.cli import main
from vit2dpe.signal import Table
from vit2dpe.spec import parse_size

SIZES = dict(img_size=(32, 48), patch_size=8, embed_dim=32, num_heads=2, depth=3, num_classes=2)
IMAGES = torch.randn(2, 3, 32, 48)


def test_a_row_has_ratios_counts_and_a_file(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = "--models vit_small_patch16_rope_224 --sizes 32x48 --batch 1 --depth 1 --repeats 2 --modes training"
    assert main(["bench", *arguments.split(), "--out", str(out)]) == 0
    about = json.loads(out.read_text())
    (row,) = about["rows"]
    assert row["difference"] < 1e-5
    assert row["saved_limit"] <= row["saved_ours"] < row["saved_peer"]
    assert row["kernels_limit"] < row["kernels_ours"]
    assert row["peer_ours"][1] <= row["peer_ours"][0] <= row["peer_ours"][2]
    assert "vit_small_patch16_rope_224, 32x48, training, batch 1, 1 blocks:" in capsys.readouterr().out


def run(tmp_path, **settings):
    """The rows of a bench at 32x48, one block, one image, one repetition."""
    small = dict(sizes="32x48", batch=1, depth=1, repeats=1, block=0, out=str(tmp_path / "bench.json"))
    return bench(BenchConfig(**small | settings))


ROPE, MIXED = "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"
BIAS = "vit_relpos_small_patch16_224(rel_pos_type=bias)"


def alter(name, how, monkeypatch):
    """Ours differs from the peer from now on, as `how(model)` says."""
    made = contenders.from_timm

    def broken(peer, position=None):
        model = made(peer, position)
        if position is None:
            how(model)
        return model

    monkeypatch.setattr(contenders, "from_timm", broken)


def test_what_is_not_equal_gets_no_ratio(monkeypatch, tmp_path):
    alter(ROPE, lambda model: model.blocks[0].mlp.fc1.weight.data.mul_(1.1), monkeypatch)
    (row,) = run(tmp_path, models=ROPE, modes="inference")
    assert "does not compute" in row["failed"]
    assert "peer_ours" not in row
    assert "does not compute" in markdown([row])[-1]


def test_what_has_other_gradients_gets_no_ratio_in_training(monkeypatch, tmp_path):
    """The outputs are the same; the table receives no gradient."""
    alter(BIAS, lambda model: model.blocks[0].attn.position.requires_grad_(False), monkeypatch)
    inference, training = run(tmp_path, models=BIAS, modes="inference,training")
    assert "peer_ours" in inference
    assert "gradients" in training["failed"]
    assert "peer_ours" not in training


@pytest.mark.parametrize("level", ["attention", "block"])
@pytest.mark.parametrize("model", [ROPE, MIXED, BIAS])
def test_parts_of_a_model_are_the_same_function(level, model, tmp_path):
    inference, training = run(tmp_path, models=model, level=level, repeats=0, modes="inference,training")
    assert inference["difference"] < 1e-5
    assert training["gradient_difference"] < 1e-4
    assert inference["kernels_ours"] < inference["kernels_peer"] or model == BIAS


@pytest.mark.parametrize("model", [ROPE, MIXED, "rotary_embedding_torch", "x_transformers"])
def test_the_rotation_alone_is_the_same_function(model, tmp_path):
    inference, training = run(tmp_path, models=model, level="op", repeats=0, modes="inference,training")
    assert inference["difference"] < 1e-6
    assert training["gradient_difference"] < 1e-5
    assert inference["kernels_ours"] == inference["kernels_limit"] + 1
    assert inference["kernels_peer"] >= 13


def test_a_rotation_of_halves_of_a_head_is_not_compared(tmp_path):
    for model in ("vit_small_patch16_dinov3", "vit_small_patch16_224"):
        (row,) = run(tmp_path, models=model, level="op", repeats=0, modes="inference")
        assert "does not turn neighbouring channels" in row["failed"]
    for package in ("rotary_embedding_torch", "x_transformers"):
        (row,) = run(tmp_path, models=package, repeats=0, modes="inference")
        assert "level=op alone" in row["failed"]


MICRO = "hidden_size=32, num_attention_heads=2, intermediate_size=64, patch_size=8"


@pytest.mark.parametrize("name", ["transformers_vitmae", "transformers_dinov3"])
def test_models_of_transformers_are_the_same_function(name, tmp_path):
    model = f"{name}({MICRO})"
    inference, training = run(tmp_path, models=model, sizes="32", repeats=0, modes="inference,training")
    assert inference["difference"] < 1e-5
    assert training["gradient_difference"] < 1e-5
    made = contenders.contenders(model, (32, 32), 1, 1)
    images = torch.randn(2, 3, 32, 32)
    assert float((made["limit"](images) - made["ours"](images)).detach().abs().max()) > 1e-3
    (row,) = run(tmp_path, models=model, sizes="32x48", repeats=0, modes="inference")
    assert "square images, got 32x48" in row["failed"]
    (row,) = run(tmp_path, models=f"{name}(hiden_size=32)", sizes="32", repeats=0, modes="inference")
    assert "has no hiden_size" in row["failed"]


@pytest.mark.parametrize(
    "model",
    [
        "transformers_vitmae(hidden_size=56, num_attention_heads=2, intermediate_size=61, patch_size=8, "
        "decoder_hidden_size=28, decoder_num_attention_heads=2, decoder_intermediate_size=61)",
        "transformers_dinov3(hidden_size=56, num_attention_heads=2, intermediate_size=61, patch_size=8)",
        f"transformers_dinov3({MICRO}, use_gated_mlp=true)",
    ],
)
def test_widths_inside_mlps_of_transformers_are_what_they_are(model, tmp_path):
    """56 * (61 / 56) and 28 * (61 / 28) are below 61, so that a ratio alone would lose a channel."""
    (row,) = run(tmp_path, models=model, sizes="32", repeats=0, modes="inference")
    assert row["difference"] < 1e-5


XT = "dim=32, heads=2"
TEXT = f"x_transformers_text({XT})"


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (f"x_transformers_vit({XT}, patch_size=8, ff_mult=3)", "32"),
        (TEXT, "1x48"),
        (f"{TEXT[:-1]}, rel_pos_bias=true)", "1x48"),
        ("x_transformers_text(dim=48, heads=6, alibi_pos_bias=true, rotary_pos_emb=true)", "1x48"),
    ],
)
def test_models_of_x_transformers_are_the_same_function(model, size, tmp_path):
    inference, training = run(tmp_path, models=model, sizes=size, depth=2, repeats=0, modes="inference,training")
    assert inference["difference"] < 1e-5
    assert training["gradient_difference"] < 1e-5
    made = contenders.contenders(model, parse_size(size), 1, 1)
    x = contenders.tokens(made, 2, parse_size(size))
    assert float((made["limit"](x) - made["ours"](x)).detach().abs().max()) > 1e-3
    assert bool(contenders.encodings_of(made["peer"])) == ("rel_pos" in model)


def test_only_tokens_that_go_in_ask_for_gradients(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("benchmarks.measure.saved_bytes", lambda module, x: asked.append(x.requires_grad) or 0)
    run(tmp_path, models=TEXT, sizes="1x8", repeats=0, modes="training")
    assert asked == [True] * 3
    run(tmp_path, models=ROPE, repeats=0, modes="training")
    assert asked[3:] == [False] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(models="x_transformers_vit(hads=2)"),
            "option of x_transformers_vit 'hads'; did you mean 'heads'",
        ),
        (
            dict(models="x_transformers_text(rotary_pos_emb=3)"),
            "rotary_pos_emb of x_transformers_text is true or",
        ),
        (dict(models="x_transformers_vit(dim=0)"), "dim of x_transformers_vit is a whole number of at least 1, got 0"),
        (dict(models="x_transformers_vit(heads=1)"), "needs two heads or more"),
        (dict(models="x_transformers_vit(patch_size=7)", sizes="32"), "divisible by the patch size"),
        (dict(models=f"{TEXT[:-1]}, rel_pos_bias=true, alibi_pos_bias=true)", sizes="1x8"), "you can only choose"),
        (dict(models="x_transformers_vit"), "square images, got 32x48"),
        (dict(models="x_transformers_text"), "takes sizes 1xN, N tokens, as in 1x256; got 32x48"),
        (dict(models="x_transformers_text", level="block"), "measured as a whole, got level=block"),
        (dict(models="x_transformers(heads=3)", level="op"), "no arguments"),
        (dict(models=TEXT, sizes="1x8", modes="first"), "patches that this model does not name"),
    ],
)
def test_what_x_transformers_is_not_measured_with(settings, message, tmp_path):
    (row,) = run(tmp_path, **dict(repeats=0, modes="inference") | settings)
    assert message in row["failed"]


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    for model, level in (("x_transformers", "op"), (TEXT, "encoder")):
        (row,) = run(tmp_path, models=model, level=level, sizes="1x8" if model == TEXT else "32", modes="inference")
        assert "pip install x-transformers" in row["failed"]


@pytest.mark.parametrize("model", [MIXED, BIAS])
def test_tables_alone_are_the_same_numbers_with_the_same_gradients(model, tmp_path):
    row = run(tmp_path, models=model, level="table", modes="training", depth=2)[0]
    assert row["difference"] < 1e-5
    assert row["gradient_difference"] < 1e-4
    assert "peer_ours" in row
    assert "ours_limit" not in row


@pytest.mark.parametrize("fused", ["true", "false"])
def test_shifted_windows(fused, tmp_path):
    model = f"swin_tiny_patch4_window7_224(fused={fused}, depths=(2,), num_heads=(3,), embed_dim=12)"
    row = run(tmp_path, models=model, sizes="56", level="attention", block=1, modes="training", depth=None, repeats=0)[
        0
    ]
    assert row["difference"] < 1e-5
    assert row["gradient_difference"] < 1e-4


def test_half_precision_and_the_first_forward_at_a_size(tmp_path):
    half, auto = (run(tmp_path, models=ROPE, modes="inference", precision=p)[0] for p in ("bfloat16", "autocast"))
    assert 0 < half["difference"] < 0.1
    assert auto["difference"] < 0.1
    (row,) = run(tmp_path, models=ROPE, modes="first", repeats=2)
    assert row["kernels_first"] == row["kernels_later"]
    assert len(row["first_later"]) == 3


def test_the_same_command_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    first = run(tmp_path, models=ROPE, modes="inference")
    monkeypatch.setattr("benchmarks.run._row", lambda *args: pytest.fail("measured again"))
    assert run(tmp_path, models=ROPE, modes="inference") == json.loads(json.dumps(first))
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, models=ROPE, modes="inference", repeats=2)


def test_a_row_that_cannot_run_says_why(tmp_path):
    (row,) = run(tmp_path, models="cait_xxs24_224", modes="inference")
    assert "Cait is not covered" in row["failed"]
    (row,) = run(tmp_path, models="vit_small_patch16_224", level="table", modes="inference")
    assert "learns no rotations" in row["failed"]


def test_the_table_is_printed_from_files(tmp_path, capsys):
    run(tmp_path, models=ROPE, modes="inference", least=1e-3, most=1e-3)
    capsys.readouterr()
    assert main(["bench", "--table", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| row | peer / ours |")
    assert f"| {ROPE}, 32x48, inference, batch 1, 1 blocks |" in lines[2]
    assert "peer/ours >= 0.001: met, ours/limit <= 0.001: missed" in lines[2]
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        bench(BenchConfig(table=str(tmp_path / "none.json")))


def test_a_row_misses_where_its_interval_lies_wholly_on_the_wrong_side():
    said = [verdict(dict(least=1.1, peer_ours=found)) for found in ((1.0, 0.9, 1.09), (1.0, 0.9, 1.11))]
    assert [word.rpartition(" ")[2] for word in said] == ["missed", "met"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(modes="both"), "inference, training"),
        (dict(models="vit_smal"), "unknown model 'vit_smal'"),
        (dict(models="x_transformers_tex"), "unknown model 'x_transformers_tex'; did you mean 'x_transformers_text'"),
        (dict(level="layer"), "unknown level"),
        (dict(precision="bf16"), "unknown precision 'bf16'; did you mean 'bfloat16'"),
        (dict(modes="first", level="block"), "whole models"),
        (dict(modes="first", how="blocks"), "eager mode"),
        (dict(level="op,bloc"), "unknown level 'bloc'; did you mean 'block'"),
        (dict(level=""), "unknown level ''"),
        (dict(how="eager,compile"), "unknown way 'compile'; did you mean 'compiled'"),
        (dict(how="graph"), "graph is a CUDA graph, got device=cpu"),
        (dict(how="blocks", level="encoder,attention"), "blocks are those of whole models"),
        (dict(how="blocks", compile=True), "compile is how=compiled, got how=blocks"),
        (dict(device="cuda:77"), "device 'cuda:77' cannot be used here"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **settings)


def test_peak_bytes_are_those_alive_at_once():
    def steps():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        del a
        c = b + 1
        return c.view(10, 100).t()

    assert peak_bytes(steps) == 8000


def test_the_interval_holds_the_median():
    assert interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    median, low, high = interval([float(i) for i in range(101)])
    assert (median, low, high) == (50.0, 40.0, 61.0)


def test_a_rotary_model_saves_what_one_without_saves_and_adds_one_kernel_a_block():
    nothing, rotary = (ViT(word, **SIZES).train() for word in ("none", "rope"))
    deeper = ViT("rope", **SIZES | dict(depth=6)).train()
    assert saved_bytes(rotary, IMAGES) < 1.02 * saved_bytes(nothing, IMAGES)
    blocks = kernels(deeper, IMAGES) - kernels(rotary, IMAGES)
    plain = ViT("none", **SIZES | dict(depth=6)).train()
    assert blocks - (kernels(plain, IMAGES) - kernels(nothing, IMAGES)) == 3


@pytest.mark.parametrize(("word", "theirs"), [("logcpb", "mlp-swin"), ("logcpb(form=cr)", "mlp"), ("relative", "bias")])
def test_a_bias_costs_no_more_operations_a_block_than_timms(word, theirs):
    """What the blocks have in common is made once a forward; timm keeps it in buffers of every block."""
    sizes = dict(img_size=(32, 48), patch_size=8, embed_dim=32, num_heads=2, num_classes=2)
    relpos = timm.models.VisionTransformerRelPos

    def a_block(make):
        return (kernels(make(6).eval(), IMAGES) - kernels(make(3).eval(), IMAGES)) / 3

    ours = a_block(lambda depth: ViT(word, depth=depth, **sizes))
    assert ours <= a_block(lambda depth: relpos(rel_pos_type=theirs, depth=depth, **sizes))
    assert ours - a_block(lambda depth: ViT("none", depth=depth, **sizes)) <= 8


@pytest.mark.parametrize(("word", "most"), [("rope", 5), ("rope_mixed", 32)])
def test_a_rotation_adds_few_operations_to_a_training_step(word, most):
    """Of each block, forward and backward; timm's rotary attention adds 26 and more."""

    def a_block(word):
        few, many = (ViT(word, **SIZES | dict(depth=depth)).train() for depth in (3, 6))
        return (step_kernels(many, IMAGES) - step_kernels(few, IMAGES)) / 3

    assert 0 < a_block(word) - a_block("none") <= most


def test_blocks_of_a_swin_dispatch_no_more_than_timms_and_windows_are_cut_once_a_stage():
    sizes = dict(img_size=56, patch_size=4, window_size=7, embed_dim=12, num_heads=(3,), num_classes=2)
    images = torch.randn(1, 3, 56, 56)

    def count(make, depth):
        return kernels(make(depths=(depth,), drop_path_rate=0.0, **sizes).eval(), images)

    ours, theirs = (count(make, 6) - count(make, 2) for make in (Swin, timm.models.SwinTransformer))
    assert ours < theirs
    assert count(Swin, 2) <= 90


@pytest.mark.parametrize("init_values", [None, 1e-5])
def test_a_rotary_model_of_twelve_blocks_dispatches_few_operations(init_values):
    """149 with its table, 140 without, with LayerScale or not; timm's has 304 with it."""
    model = ViT("rope", init_values=init_values, **SIZES | dict(depth=12)).eval()
    assert kernels(model, IMAGES) <= 149
    with frozen(model):
        kernels(model, IMAGES)
        assert kernels(model, IMAGES) <= 140


def test_a_new_size_costs_no_more_than_a_later_one():
    """Nothing is kept on a shape: the first forward dispatches what the second does."""
    for word in ("rope", "relative", "learned"):
        model = ViT(word, **SIZES).eval()
        images = torch.randn(1, 3, 40, 56)
        assert kernels(model, images) == kernels(model, images)


@pytest.mark.parametrize("word", ["rope", "sincos", "relative(shared=true)"])
def test_tables_are_made_once_a_forward_whatever_the_depth(word, monkeypatch):
    made, original = [], PositionEncoding._signal
    monkeypatch.setattr(PositionEncoding, "_signal", lambda *args: made.append(1) or original(*args))
    for depth in (1, 3):
        ViT(word, **SIZES | dict(depth=depth))(IMAGES)
    assert len(made) == 2


def test_the_index_of_a_table_is_made_once_a_forward_and_is_no_buffer(monkeypatch):
    made, original = [], Table._index
    monkeypatch.setattr(Table, "_index", lambda self: made.append(1) or original(self))
    model = ViT("relative", **SIZES).eval()
    with torch.no_grad():
        model(IMAGES)
    assert len(made) == 1
    assert buffer_bytes(model) == 0


@pytest.mark.parametrize("size", [(28, 28), (20, 36)])
def test_a_trained_table_keeps_about_half_of_what_timms_keeps(size, tmp_path):
    """448 px at patch 16 is 28 x 28. A matrix of biases is the larger, the less width there is beside it."""
    model = f"{BIAS[:-1]}, patch_size=4, embed_dim=96, num_heads=6)"
    word = f"{4 * size[0]}x{4 * size[1]}"
    (row,) = run(tmp_path, models=model, sizes=word, modes="training", depth=2, repeats=0)
    assert row["saved_peer"] >= 1.9 * row["saved_ours"]
    assert row["saved_ours"] <= 1.05 * row["saved_limit"]


def test_a_large_grid_is_served_with_a_tenth_of_timms_memory(tmp_path):
    """48 x 48 patches; with all twelve blocks timm's buffers alone are 486 MiB, here it is two blocks."""
    model = f"{BIAS[:-1]}, patch_size=2, embed_dim=48, num_heads=6)"
    (row,) = run(tmp_path, models=model, sizes="96", modes="inference", depth=2, repeats=0)
    assert row["peak_peer"] + row["buffers_peer"] >= 10 * (row["peak_ours"] + row["buffers_ours"])


def test_settings_are_refused_before_a_line_is_printed(tmp_path, capsys):
    for wrong in (["--sizes", "32,0"], ["--modes", "trainin"], ["--level", "blok"]):
        assert main(["bench", *wrong, "--out", str(tmp_path / "bench.json")]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
