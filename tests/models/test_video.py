"""ViT and MAE on videos, volumes and lines: (B, C, T, H, W) in tubelets, frames before rows before columns."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_patch_embed
from torch.export import Dim

from vit2dpe import MAE, ConfigError, Swin, ViT, explain, sweep, to_timm, use_policy
from vit2dpe.encodings import ENCODINGS
from vit2dpe.models.kernels import resampled
from vit2dpe.models.simmim import SimMIM
from vit2dpe.positions import Positions
from vit2dpe.resolution.apply import policies_of
from vit2dpe.training import load_run, save_model

VIDEO = dict(img_size=(4, 16, 24), patch_size=(2, 8, 8), embed_dim=48, depth=1, num_heads=2)  # a grid of 2x2x3
DECODER = dict(decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=2)


def videos(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("word", ENCODINGS)
def test_every_encoding_with_more_frames_and_larger_ones(word):
    if word == "lookhere":
        with pytest.raises(ConfigError, match="lookhere has directions on 1 or 2 axes, got axes=3"):
            ViT(word, **VIDEO)
        return
    model = MAE(ViT(word, num_classes=0, **VIDEO), decoder_position=word, tube=True, **DECODER)
    model(videos(4, 16, 24), 0.5)[0].backward()
    encoding = [p.grad for name, p in model.named_parameters() if ".position" in name or "decoder_position" in name]
    assert all(grad is not None and grad.isfinite().all() for grad in encoding)
    own = model.eval().encoder(videos(8, 24, 24))
    for policy in policies_of(model):
        with torch.no_grad(), use_policy(model, policy):
            out = model.encoder(videos(8, 24, 24))
            assert out.isfinite().all()
            assert policy != policies_of(model)[0] or torch.allclose(out, own, atol=1e-6), "the first is the default"


def test_tokens_are_tubelets_in_the_order_of_their_places():
    model = ViT("none", num_classes=0, **VIDEO)
    for i, (t, h, w) in enumerate(Positions.grid((2, 2, 3)).coords[0].long().tolist()):
        x = torch.zeros(1, 3, 4, 16, 24)
        x[:, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] = 1
        tokens, at = model.patch_embed(x)
        lit = (tokens[0] - model.patch_embed.proj.bias).abs().sum(-1) > 1e-6
        assert lit.nonzero().flatten().tolist() == [i]
        torch.testing.assert_close(
            tokens[0, i], model.patch_embed.proj.weight.flatten(1).sum(1) + model.patch_embed.proj.bias
        )
        assert at.coords[0, i].tolist() == [t, h, w]
    assert model.patch_embed.proj.weight.shape == (48, 3, 2, 8, 8), "the name and layout of a Conv3d, as VideoMAE's"


def test_features_have_the_axes_of_the_video():
    model = ViT("rope", num_classes=5, **VIDEO).eval()
    x = videos(8, 16, 40)
    final, (features,) = model.forward_intermediates(x, indices=1, norm=True)
    assert features.shape == (2, 48, 4, 2, 5)
    torch.testing.assert_close(features.flatten(2).mT, final[:, 1:])


@pytest.mark.parametrize("word", ["rope", "sincos"])
def test_a_policy_of_time_alone(word):
    """Interpolating more frames is having the places of time scaled, by hand, and those of rows as they are."""
    model = ViT(word, **VIDEO)
    at, by_hand = Positions.grid((6, 2, 3)), Positions.grid((6, 2, 3)).coords.clone()
    by_hand[..., 0] = (by_hand[..., 0] + 0.5) * 2 / 6 - 0.5
    wanted = model.position(Positions(by_hand, (2, 2, 3)))
    with use_policy(model, "interpolate(power=(1, 0, 0))"):
        found = model.position(at)
    for name in ("token", "q_rotation"):
        if (one := getattr(found, name)) is not None:
            torch.testing.assert_close(one, getattr(wanted, name), atol=1e-6, rtol=0)
    with use_policy(model, "interpolate"):
        torch.testing.assert_close(model.position(at), found), "rows and columns have their own size"


def test_patches_of_a_video_are_those_of_videomae():
    """transformers 5, `VideoMAEForPreTraining.forward`: frames, rows and columns of a patch, channels fastest."""
    model = MAE(ViT("none", num_classes=0, **VIDEO), **DECODER)
    x = videos(4, 16, 24)
    theirs = x.transpose(1, 2).reshape(2, 2, 2, 3, 2, 8, 3, 8).permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(2, 12, 384)
    assert torch.equal(model.patchify(x), theirs)
    assert torch.equal(model.unpatchify(theirs, 4, 16, 24), x)


@pytest.mark.parametrize("tube", [False, True])
def test_what_is_hidden_of_a_video(tube):
    model = MAE(ViT("rope", num_classes=0, **VIDEO), tube=tube, norm_pix=True, **DECODER)
    x = videos(8, 16, 24)
    keep, mask = model.choose(x, 0.5, generator=torch.Generator().manual_seed(1))
    assert keep.shape == (2, 12)
    assert torch.equal(torch.ones(2, 24).scatter(1, keep, 0.0), mask)
    frames = mask.unflatten(1, (4, 6))
    assert bool((frames == frames[:, :1]).all()) is tube
    shown = model.reconstruct(x, 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        shown.hidden,
        mask.view(2, 1, 4, 2, 3).bool().repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4),
    )
    assert torch.equal(shown.pasted[~shown.hidden.expand_as(x)], x[~shown.hidden.expand_as(x)])


def test_a_line():
    model = ViT("rope", img_size=(64,), patch_size=(4,), in_chans=2, embed_dim=48, depth=1, num_heads=2, num_classes=0)
    line = torch.randn(2, 2, 96)
    assert model.forward_intermediates(line, 1, intermediates_only=True)[0].shape == (2, 48, 24)
    mae = MAE(model, **DECODER)
    assert mae.reconstruct(line).painted.shape == line.shape
    assert torch.equal(mae.unpatchify(mae.patchify(line), 96), line)


def test_a_video_is_filled_up_at_the_end_of_each_axis():
    model = ViT("rope", dynamic_img_pad=True, **VIDEO).eval()
    x, filled = videos(3, 10, 20), torch.zeros(2, 3, 4, 16, 24)
    filled[:, :, :3, :10, :20] = x
    assert torch.equal(model(x), model(filled))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ViT(img_size=(8, 32, 32)), r"img_size must name the axes that .*Got img_size=\(8, 32"),
        (lambda: ViT(patch_size=(2, 8, 8)), "patch_size must name the axes that img_size names"),
        (lambda: ViT(img_size=(32, 32), patch_size=(2, 8, 8)), "patch_size must name the axes that img_size names"),
        (lambda: ViT(img_size=(8,) * 4, patch_size=(8,) * 4), "1 to 3 axes"),
        (lambda: ViT(img_size=(8, 32, 32), patch_size=(2, 8, 5)), "patch 2x8x5: got 8x32x32; nearest: 8x32x30"),
        (lambda: ViT("none", **VIDEO)(torch.zeros(1, 3, 16, 24)), "has the 3 axes of a patch, got sides"),
        (lambda: ViT("none", **VIDEO).set_input_size(32), "a size is 3 whole numbers, one of an axis, got 32"),
        (lambda: ViT("none", **VIDEO).predict(torch.zeros(16, 24, 3, dtype=torch.uint8)), "pictures have two axes"),
        (lambda: sweep(ViT("none", **VIDEO), [], [(16, 24)]), "sizes are those of images"),
        (lambda: to_timm(ViT("none", **VIDEO)), "timm has no ViT of videos or lines"),
        (lambda: Swin(img_size=(8, 32, 32)), r"img_size must be one number or two \(rows, columns\)"),
        (lambda: SimMIM(ViT("none", num_classes=0, **VIDEO), mask_unit=8), "SimMIM is of images"),
        (
            lambda: MAE(ViT("none", num_classes=0, **VIDEO | dict(img_size=16, patch_size=8)), tube=True),
            "tubes are of videos, three axes",
        ),
        (
            lambda: timm.create_model("vit2dpe_tiny_patch8_64", img_size=(8, 64, 64), patch_size=(2, 8, 8)),
            "by the class",
        ),
    ],
)
def test_other_axes_are_refused_by_one_sentence(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_saved_and_read_again(tmp_path: Path):
    given = dict(position="learned+rope", num_classes=3, **VIDEO)
    model = ViT(**given).eval()
    model.set_input_size((8, 16, 16))
    assert model.train_grid == (4, 2, 2)
    assert model.position.terms[0].pos_embed.shape == (1, 4, 2, 2, 48)
    save_model(tmp_path, model, given)
    again, x = load_run(tmp_path), videos(8, 16, 16)
    assert torch.equal(again(x), model(x))
    model.save_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "8x16x16 pixels, 4x2x2 patches of 2x8x8" in card
    assert "any sides that the patch divides" in card
    assert "torch.randn(1, model.in_chans, 8, 16, 16)" in card
    assert "load_run" in card
    assert "timm.create_model" not in card


def test_another_patch():
    """Axis by axis it is timm's resampling where there are two axes; a constant video gives what it gave."""
    kernel = torch.randn(5, 3, 8, 6)
    by_axes = resampled(kernel.unsqueeze(2), (1, 4, 12)).squeeze(2)
    torch.testing.assert_close(by_axes, resample_patch_embed(kernel, [4, 12]), atol=1e-5, rtol=1e-4)
    model = ViT("none", num_classes=0, global_pool="avg", **VIDEO).eval()
    other = copy.deepcopy(model)
    other.set_input_size((8, 16, 24), (4, 8, 8))
    assert other.train_grid == (2, 2, 3)
    assert other.patch_embed.proj.weight.shape == (48, 3, 4, 8, 8)
    still = videos(1, 16, 24).expand(-1, -1, 8, -1, -1)
    torch.testing.assert_close(other(still), model(still[:, :, :4]), atol=1e-4, rtol=1e-4)


def test_traced_whole():
    model = ViT("rope", num_classes=3, **VIDEO).eval()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(videos(4, 16, 24)), model(videos(4, 16, 24)))


@pytest.mark.slow
def test_one_exported_program_of_all_sizes():
    model = ViT("rope", num_classes=3, **VIDEO).eval()
    free = {0: Dim("batch", max=64)} | {
        i: by * Dim(name, min=2, max=64) for i, name, by in ((2, "t", 2), (3, "h", 8), (4, "w", 8))
    }
    with torch.no_grad():
        program = torch.export.export(model, (videos(8, 24, 32),), dynamic_shapes=(free,)).module()
        torch.testing.assert_close(program(videos(6, 32, 40)), model(videos(6, 32, 40)))


def test_explained_at_a_size_of_three_numbers():
    assert len(explain(ViT("rope", **VIDEO), (4, 16, 24))) == 1
