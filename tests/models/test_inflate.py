"""Weights of images in models of videos: where a still video gives the logits of its image, and where it does not."""

import copy

import pytest
import torch

from vit2dpe import ConfigError, Swin, ViT, build, inflate, set_policy, use_policy
from vit2dpe.encodings import ENCODINGS, Dims, LearnedTable, named_encodings
from vit2dpe.encodings.along import Along
from vit2dpe.models.inflate import word_of_video
from vit2dpe.positions import Positions
from vit2dpe.resolution.policies import POLICIES, LogTemperature
from vit2dpe.testing import tensors
from vit2dpe.training import load_run, save_model

IMAGE = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5)
X = torch.linspace(-1, 1, 2304).sin().view(2, 3, 16, 24)


def still(frames: int) -> torch.Tensor:
    return X[:, :, None].expand(-1, -1, frames, -1, -1)


def trained(word, **more):
    """A ViT whose tables are not what they were drawn as."""
    torch.manual_seed(0)
    model = ViT(word, **IMAGE | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("word", ENCODINGS)
def test_a_still_video_gives_the_logits_of_its_image(word):
    model = trained(word, class_token=False, global_pool="avg")
    video = inflate(model, frames=4, time=None)
    for frames in (2, 4, 8):
        torch.testing.assert_close(video(still(frames)), model(X), atol=1e-5, rtol=0)


BEGIN_AT_NOTHING = ["learned", "t5", "relative", "decomposed", "shaw(sides=qk)", "irpe", "learned(axes=(0, 1, 2))"]


@pytest.mark.parametrize("time", [*BEGIN_AT_NOTHING, "rope", "factorized+rope"])
def test_the_middle_frame_of_a_tubelet_and_a_time_that_begins_at_nothing(time):
    model = trained("learned+rope", reg_tokens=1)
    video = inflate(model, frames=9, tubelet=3, kernel="centre", time=time)
    before = torch.randn(2, 3, 3, 16, 24)
    before[:, :, 1] = X
    torch.testing.assert_close(video(before), model(X), atol=1e-5, rtol=0)
    order = torch.arange(9).flip(0)
    moving = torch.randn(2, 3, 9, 16, 24)
    if "rope" not in time:
        torch.testing.assert_close(video(moving), video(moving[:, :, order]), atol=1e-5, rtol=0)
    with torch.no_grad():  # then it learns
        new = [p for p in video.parameters() if p.ndim and not p.any()]
        assert bool(new) is (time != "rope")
        for parameter in new:
            parameter += 10 * torch.randn_like(parameter)
    assert (video(moving) - video(moving[:, :, order])).abs().max() > 1e-3


def test_a_class_token_notices_that_patches_are_there_several_times():
    model = trained("rope")
    video = inflate(model, frames=4, time=None)
    torch.testing.assert_close(video(still(2)), model(X), atol=1e-5, rtol=0)
    assert (video(still(4)) - model(X)).abs().max() > 1e-4


def test_the_model_of_images_stays_and_kernels_are_of_conv3d():
    model = trained("learned")
    before = copy.deepcopy(model.state_dict())
    model.patch_embed.proj.weight.requires_grad_(False)
    video = inflate(model, frames=6, tubelet=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.position.along is None
    assert model.train_grid == (2, 3)
    assert video.patch_embed.proj.weight.shape == (48, 3, 3, 8, 8)
    assert not video.patch_embed.proj.weight.requires_grad
    torch.testing.assert_close(video.patch_embed.proj.weight.sum(2), model.patch_embed.proj.weight)
    assert video.train_grid == (2, 2, 3)
    assert list(video.state_dict()) != list(model.state_dict())
    assert set(inflate(model, time=None).state_dict()) == set(model.state_dict()), "no name changes"


@pytest.mark.parametrize("word", ["learned+rope_mixed", "none", "rope(base=20)"])
def test_saved_by_the_word_of_videos(word, tmp_path):
    model, sizes = inflate(trained(word), time="learned+t5"), dict(img_size=(8, 16, 24), patch_size=(2, 8, 8))
    save_model(tmp_path, model, IMAGE | sizes | dict(position=word_of_video(word, "learned+t5")))
    moving = torch.randn(2, 3, 12, 24, 24)
    assert torch.equal(load_run(tmp_path)(moving), model(moving))
    model.set_input_size((16, 24, 24))
    assert [part.pos_embed.shape for part in model.modules() if isinstance(part, LearnedTable)][-1] == (1, 8, 48)
    assert model(moving).isfinite().all()


def test_a_policy_goes_over():
    model = trained("rope", class_token=False, global_pool="avg")
    set_policy(model, "interpolate", temperature="log")
    large = torch.nn.functional.interpolate(X, (32, 40))
    video = inflate(model, frames=2, time=None)
    wanted = model(large)
    torch.testing.assert_close(video(large[:, :, None].expand(-1, -1, 2, -1, -1)), wanted, atol=1e-5, rtol=0)
    with use_policy(video, "extrapolate"):
        assert (video(large[:, :, None].expand(-1, -1, 2, -1, -1)) - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("word", ["none", "rope", "learned+rope"])
def test_a_temperature_is_that_of_the_sum(word):
    """Whether the encoding of images stays by itself, or is joined by that of time."""
    model = ViT(word, **IMAGE)
    if word == "none":
        model.position.own_temperature = LogTemperature((2, 3))
    else:
        set_policy(model, "interpolate", temperature="log")
    video = inflate(model, frames=4, time="learned")
    assert video.position.own_temperature == LogTemperature((2, 2, 3))
    assert [one for one in named_encodings(video).values() if one.own_temperature] == [video.position]
    assert model.position.own_temperature == LogTemperature((2, 3))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: inflate(Swin(img_size=32, embed_dim=24, depths=(1,), num_heads=(2,))),
            "of a ViT of images, got a Swin",
        ),
        (lambda: inflate(inflate(ViT("none", **IMAGE))), "of a ViT of images"),
        (lambda: inflate(ViT("none", **IMAGE), kernel="center"), "did you mean 'centre'"),
        (lambda: inflate(ViT("none", window=2, **IMAGE)), "a model without windows"),
        (lambda: inflate(ViT("none", patch_stride=4, **IMAGE)), "patches that do not overlap"),
        (lambda: inflate(ViT("none", **IMAGE), time="rope/none"), "time is one word for all blocks.*got 'rope/none'"),
        (lambda: inflate(ViT("none", **IMAGE), time=3), "time is one word for all blocks.*got 3"),
        (lambda: word_of_video("rope", "rope/none"), "time is one word for all blocks"),
        (lambda: inflate(ViT("none", **IMAGE), frames=7), "multiple of tubelet, got 7 and 2"),
        (lambda: inflate(ViT("rope/none", **IMAGE)), "inflate it with time=None"),
        (lambda: build("rope(axes=3)", Dims(48, 3, (2, 3, 4))), "axes names axes of the grid, from 0 to 2.*got 3"),
        (lambda: build("rope(axes=(1, 1))", Dims(48, 3, (2, 3, 4))), "axes names axes of the grid"),
        (lambda: build("rope(axes=time)", Dims(48, 3, (2, 3, 4))), "axes names axes of the grid"),
    ],
)
def test_what_cannot_be(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize("word", [name for name in ENCODINGS if name not in ("none", "lookhere")])
def test_an_encoding_of_some_axes_is_that_of_the_smaller_grid(word):
    """On columns and time, in this order: the Signal at places of a volume is that at their two coordinates."""
    torch.manual_seed(0)
    dims = Dims(48, 2, (3, 4, 5))
    some = build(word, Dims(48, 2, (5, 3))).eval()
    there = build(f"{word}(axes=(2, 0))", dims).eval()
    there.load_state_dict(some.state_dict())
    at = Positions.grid((3, 4, 5)).with_prefix(1)
    flat = Positions.grid((5, 3)).with_prefix(1)
    index = (at.coords[0, :, 2] * 3 + at.coords[0, :, 0]).long()
    wanted = tensors(some(flat.take(index)))
    for name, value in tensors(there(at)).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("word", "policy"),
    [("rope", "yarn"), ("alibi", "interpolate"), ("rope_dinov3", "interpolate"), ("learned", "interpolate")],
)
def test_a_spacing_of_each_axis_goes_with_the_axes(word, policy):
    """Columns and time of a volume are as far apart as they are on a grid of their own."""
    some, there = build(word, Dims(48, 2, (5, 3))).eval(), build(f"{word}(axes=(2, 0))", Dims(48, 2, (3, 4, 5))).eval()
    there.load_state_dict(some.state_dict())
    some.own_policy = there.own_policy = POLICIES[policy]((5, 3))
    at = Positions.grid((3, 4, 5), spacing=(0.5, 2.0, 0.25))
    flat = Positions.grid((5, 3), spacing=(0.25, 0.5))
    index = torch.arange(3)[:, None] + 3 * torch.arange(5)  # of the places whose row is the first
    wanted = tensors(some(flat.take(index.flatten())))
    found = tensors(there(at.take((torch.arange(3)[:, None] * 20 + torch.arange(5)).flatten())))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)


def test_sections_of_no_pairs_are_the_same_rotation():
    dims, at = Dims(48, 2, (3, 4, 5)), Positions.grid((3, 4, 5))
    one, other = (build(word, dims)(at).q_rotation for word in ("rope(axes=(1, 2))", "rope(sections=(0, 6, 6))"))
    assert torch.equal(one.cos, other.cos)
    assert torch.equal(one.sin, other.sin)


def test_policies_measure_the_axes_that_are_read():
    """More frames stretch the rotation of time, and leave that of rows and columns as it is."""
    model = ViT("rope(axes=(1, 2))+rope(axes=0)", **IMAGE | dict(img_size=(4, 16, 24), patch_size=(2, 8, 8)))
    space, time = model.position.terms
    at = Positions.grid((6, 2, 3))
    with use_policy(model, "ntk+interpolate(power=(1, 0, 0))", temperature="log"):
        assert [part.policy.train for part in (space, time)] == [(2, 3), (2,)]
    with use_policy(model, "interpolate(power=(0.5, 1, 1))"):
        assert (space.policy.power, time.policy.power) == ((1, 1), (0.5,))
        found = time(at).q_rotation
        wanted = build("rope", Dims(48, 2, (2,)))(Positions(((at.coords[..., :1] + 0.5) * (1 / 3) ** 0.5 - 0.5), (2,)))
        torch.testing.assert_close(found.sin, wanted.q_rotation.sin, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            space(at).q_rotation.sin, build("rope", Dims(48, 2, (2, 3)))(Along((1, 2)).places(at)).q_rotation.sin
        )
