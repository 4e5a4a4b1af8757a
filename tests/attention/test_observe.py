"""Maps are the weights that the fused kernel used; looking changes nothing; what is read off them is right."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.helpers import randn
from vit2dpe import Attention, Positions, Signal, Swin, ViT, attend, attention_maps
from vit2dpe.attention import functional as attention
from vit2dpe.attention.maps import entropy, mean_distance, rollout, summary
from vit2dpe.attention.observe import weights
from vit2dpe.cli import main
from vit2dpe.errors import ConfigError
from vit2dpe.models import MAE
from vit2dpe.models.swin.stage import WindowAttention
from vit2dpe.plots import attention as show_attention
from vit2dpe.signal import Dense, LowRank, Rotation
from vit2dpe.testing import randomise

SIZE = dict(img_size=(8, 12), patch_size=4, num_classes=3, embed_dim=16, depth=3, num_heads=2)


def vit(position="sincos+alibi+rope+relative", seed=0, **more):
    torch.manual_seed(seed)
    return randomise(ViT(position, **SIZE, **more)).eval()


def images(batch=2, size=(8, 12)):
    return randn(batch, 3, *size, seed=1)


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g).to(dtype) for n in (5, 6, 6))
    angles = [torch.randn(1, 1, n, 2, generator=g, dtype=torch.float64) for n in (5, 6)]
    turns = [Rotation(a.cos().float(), a.sin().float()) for a in angles]
    bias = (
        Dense(torch.randn(1, 3, 5, 6, generator=g)),
        LowRank(*(torch.randn(1, 3, n, 2, generator=g) for n in (5, 6))),
    )
    return q, k, v, Signal(q_rotation=turns[0], k_rotation=turns[1], bias=bias, temperature=1.3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_weights_times_values_are_the_fused_output(masked, scale):
    q, k, v, signal = inputs()
    mask = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(2)) > 0.5 if masked else None
    if mask is not None:
        mask[1, 0, 2] = False  # a query that may attend to nothing
    found = weights(q, k, signal, mask, scale)
    torch.testing.assert_close(found @ v, attend(q, k, v, signal, mask, scale), rtol=0, atol=2e-6)
    sums = torch.ones(2, 3, 5)
    if mask is not None:
        sums[1, :, 2] = 0.0
        assert bool((found[~mask.expand(-1, 3, -1, -1)] == 0).all())
    torch.testing.assert_close(found.sum(-1), sums)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_a_vit_s_maps_are_what_its_blocks_used(more):
    model, values, outs = vit(**more), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.qkv.register_forward_hook(lambda m, i, o, name=name: values.update({name: o.chunk(3, -1)[2]}))
            module.proj.register_forward_pre_hook(lambda m, i, name=name: outs.update({name: i[0]}))
    with torch.no_grad(), attention_maps(model) as maps:
        model(images())
    n = 6 + model.num_prefix_tokens
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    for name, one in maps.items():
        assert (one.shape, one.dtype) == ((2, 2, n, n), torch.float32)
        torch.testing.assert_close(one.sum(-1), torch.ones(2, 2, n))
        v = values[name].unflatten(-1, (2, -1)).transpose(1, 2)
        torch.testing.assert_close((one @ v).transpose(1, 2).flatten(2), outs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_looking_changes_nothing_and_leaves_no_trace(training):
    model = vit(attn_drop_rate=0.3, drop_path_rate=0.2).train(training)

    def run():
        torch.manual_seed(5)
        model.zero_grad()
        out = model(images())
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in model.parameters()]

    out, grads = run()
    with attention_maps(model) as maps:
        again, grads_again = run()
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert not any(one.requires_grad for one in maps.values())
    kept = {name: one.clone() for name, one in maps.items()}
    model(images() + 1)
    assert all(torch.equal(one, kept[name]) for name, one in maps.items())  # the context is over
    assert attention.OBSERVER.get() is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_error_inside_ends_the_look():
    model = vit()
    with pytest.raises(ConfigError, match="multiple of the patch"), attention_maps(model):
        model(images(size=(9, 9)))
    with pytest.raises(ConfigError, match="do not nest"), attention_maps(model), attention_maps(model):
        pass
    assert attention.OBSERVER.get() is None
    with attention_maps(model) as maps:
        with pytest.raises(ConfigError):
            model(images(size=(9, 9)))
        model(images())
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]  # names are right after an error


def test_a_compiled_model_can_be_looked_into():
    model = vit("rope")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(images())
        with attention_maps(model) as maps:
            torch.testing.assert_close(compiled(images()), expected, rtol=0, atol=1e-5)
        assert len(maps) == 3
        maps.clear()
        torch.testing.assert_close(compiled(images()), expected, rtol=0, atol=0)
        assert not maps


class Windows(nn.Module):
    """Attention inside windows of 2 x 2 of a grid of 4 x 6: B counts windows."""

    def __init__(self):
        super().__init__()
        self.attn = Attention(16, 2)

    def forward(self, x):
        x = x.view(-1, 2, 2, 3, 2, 16).transpose(2, 3).reshape(-1, 4, 16)
        return self.attn(x)


def test_windows_and_cross_attention():
    torch.manual_seed(0)
    model = Windows()
    with attention_maps(model) as maps:
        model(torch.randn(2, 24, 16))
    assert maps["attn"].shape == (12, 2, 4, 4)
    with pytest.raises(ConfigError, match="same tokens"):
        rollout([maps["attn"], torch.rand(12, 2, 4, 5)])


@pytest.mark.need("A6b")
@torch.no_grad()
def test_maps_of_a_swin_are_those_of_all_its_windows():
    """Times the values, put back and projected, they are what each attention returns: shifted, filled up or neither."""
    torch.manual_seed(0)
    sizes = dict(img_size=(24, 40), patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4)
    model, seen = Swin("relative", **sizes).eval(), {}
    for name, part in model.named_modules():
        if isinstance(part, WindowAttention):
            part.register_forward_hook(lambda part, given, out, name=name: seen.update({name: (part, given, out)}))
    with attention_maps(model) as maps:
        for _ in range(2):  # a second call has maps of its own
            model(torch.randn(3, 3, 24, 40))
    assert maps.keys() == seen.keys()
    for name, (part, (x, signal, windows), out) in seen.items():
        v = part.split(windows.split(x), signal)[2]
        assert maps[name].shape == (*v.shape[:3], 16)
        mixed = (maps[name] @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(part.proj(windows.join(mixed, 3)), out, atol=1e-5, rtol=1e-5)


class Own(nn.Module):
    """Calls `attend` itself, after a child with children."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)))

    def forward(self, x):
        x = self.before(x)[:, None]
        return attend(x, x, x)[:, 0]


def test_a_map_is_named_after_the_innermost_module_that_is_still_running():
    model = nn.Sequential(Own(), nn.Sequential(Own()))
    with attention_maps(model) as maps:
        model(torch.randn(2, 5, 16))
    assert list(maps) == ["0", "1.0"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stock_modules_are_looked_into_as_well(training, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.2, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x, bias = torch.randn(3, 5, 16), torch.randn(5, 5)
    x = x if batch_first else x.transpose(0, 1)
    torch.manual_seed(1)
    with torch.set_grad_enabled(training):
        expected = model(x)
        torch.manual_seed(1)
        with attention_maps(model) as maps:
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        assert list(maps) == ["layers.0.self_attn", "layers.1.self_attn"]
        assert all(one.shape == (3, 4, 5, 5) for one in maps.values())
        with attention_maps(model) as maps:
            model(x, mask=bias)
    first, attn = maps["layers.0.self_attn"], model.layers[0].self_attn
    rows = x if batch_first else x.transpose(0, 1)
    q, k, _ = (
        nn.functional.linear(rows, attn.in_proj_weight, attn.in_proj_bias).view(3, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
    )
    torch.testing.assert_close(first, (q @ k.transpose(-1, -2) / 2 + bias).softmax(-1), rtol=0, atol=1e-6)


def test_rollout_by_hand():
    g = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 4, 4, generator=g).softmax(-1) for _ in range(2))
    found = rollout({"a": first, "b": second})
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))
    for sample in range(2):
        a, b = (0.5 * torch.eye(4) + 0.5 * m[sample].mean(0) for m in (first, second))
        torch.testing.assert_close(found[sample], b @ a)
    assert torch.equal(rollout([first], residual=1.0), torch.eye(4).expand(2, 4, 4))
    torch.testing.assert_close(rollout([first], residual=0.0), first.mean(1))


def test_entropy_of_one_key_and_of_all():
    one = torch.zeros(2, 3, 5, 8)
    one[:, 0, :, 2] = 1.0
    one[:, 1] = 1 / 8
    one[:, 2, :, :2] = 0.5
    torch.testing.assert_close(entropy(one), torch.tensor([0.0, math.log(8), math.log(2)]))


def test_mean_distance_counts_places_and_not_the_prefix():
    at = Positions.grid((2, 3)).with_prefix(1)
    one = torch.zeros(1, 3, 7, 7)
    one[:, 0] = torch.eye(7)  # everybody looks at itself
    one[:, 1, :, 0] = 0.75  # the prefix takes most, the rest goes to the first place
    one[:, 1, :, 1] = 0.25
    one[:, 2] = 1 / 7
    from_corner = [0, 1, 2, 1, math.sqrt(2), math.sqrt(5)]
    between = [math.hypot(a // 3 - b // 3, a % 3 - b % 3) for a in range(6) for b in range(6)]
    expected = torch.tensor([0.0, sum(from_corner) / 6, sum(between) / 36])
    torch.testing.assert_close(mean_distance(one, at), expected)
    with pytest.raises(ConfigError, match=r"\(7, 7\) tokens, the positions 0 \+ 6"):
        mean_distance(one, at.with_prefix(0))


def test_summary_tells_near_from_far():
    flat, near = ViT("none", **SIZE).eval(), ViT("alibi", **SIZE).eval()
    with torch.no_grad():
        for block in (*flat.blocks, *near.blocks):
            block.attn.qkv.weight.zero_()  # content tells nothing apart
    rows = summary(flat, images())
    assert [(row["module"], row["head"]) for row in rows] == [(f"blocks.{i}.attn", h) for i in range(3) for h in (0, 1)]
    assert all(row["entropy"] == pytest.approx(math.log(7), abs=1e-5) for row in rows)
    wide = [summary(model, images(size=(32, 48)))[0]["distance"] for model in (flat, near)]
    assert wide[0] > rows[0]["distance"] * 2  # measured in patches, it grows with the grid
    assert wide[1] < wide[0] * 0.95


@pytest.mark.parametrize("more", [{}, {"class_token": False, "global_pool": "avg", "in_chans": 1}])
def test_pictures(more, tmp_path):
    model = vit("rope", **more)
    rng = torch.Generator().manual_seed(0)
    pixels = (torch.rand(20, 30, 3, generator=rng) * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    out = show_attention.save(model, tmp_path / "cat.png", tmp_path / "new" / "attention.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figure = show_attention.draw(model, images(1)[:, : model.in_chans])
    titles = [ax.get_title() for ax in figure.axes if ax.images]
    assert titles[0] == "image"
    assert titles[1].startswith("rollout")
    assert [t.split(",")[0] for t in titles[2:5]] == ["blocks.0.attn: mean", "head 0", "head 1"]
    assert len(titles) == 2 + 3 * 3
    with torch.no_grad(), attention_maps(model) as maps:
        model(images(1)[:, : model.in_chans])
    query = 0 if model.cls_token is not None else 1 * 3 + 1
    shown = torch.tensor(figure.axes[4].images[0].get_array().tolist())
    assert figure.axes[4].get_title().startswith("head 0")
    torch.testing.assert_close(shown, maps["blocks.0.attn"][0, 0, query, model.num_prefix_tokens :].view(2, 3))


def test_a_masked_autoencoder_is_seen_by_its_encoder(tmp_path):
    mae = MAE(ViT("rope", **SIZE | dict(num_classes=0)), decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    Image.new("RGB", (40, 60), (200, 30, 60)).save(tmp_path / "cat.png")
    assert show_attention.save(mae, tmp_path / "cat.png", tmp_path / "a.png").stat().st_size > 5000
    theirs = timm.create_model("test_vit")
    with pytest.raises(ConfigError, match=r"this is a VisionTransformer; vit2dpe\.from_timm makes one"):
        show_attention.save(theirs, tmp_path / "cat.png", tmp_path / "a.png")


def test_the_command_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 60), (200, 30, 60)).save("cat.jpg")
    command = ["show", "--attention", "--model", "vit2dpe_tiny_patch4_32", "--image", "cat.jpg"]
    assert main([*command, "--size", "16x24"]) == 0
    assert capsys.readouterr().out.strip() == "attention.png"
    assert (tmp_path / "attention.png").stat().st_size > 5000
    for wrong, says in (
        (["show", "--attention", "--image", "cat.jpg"], "--run FOLDER"),
        ([*command, "--run", "x"], "one of the two"),
        (["show", "--attention", "--model", "vit2dpe_tiny_patch4_32"], "--image FILE"),
        ([*command[:-1], "dog.jpg"], "dog.jpg"),
        ([*command, "--size", "17"], "multiple of the patch"),
        (["show"], "at least one"),
        (["show", "rope", "--image", "cat.jpg", "--size", "16"], "--image, --size: add --attention"),
        ([*command[:3], "vit2dpe_swin_tiny_patch2_window4_32", *command[4:]], "drawn of a ViT of this library"),
    ):
        assert main(wrong) == 2
        said = capsys.readouterr().err
        assert says in said
        assert "unreadable" not in said
