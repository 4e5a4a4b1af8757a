"""Policies change what they should and nothing else; the sweep measures any module by two modes that never mix."""

import math

import pytest
import timm
import torch

from vit2dpe import ViT
from vit2dpe.encodings import AxialRoPE, Dims, MixedRoPE, SinCos, build
from vit2dpe.positions import Positions
from vit2dpe.resolution.apply import policies_of, use_policy
from vit2dpe.resolution.policies import NTK, Interpolate, LogTemperature, YaRN, YaRNTemperature
from vit2dpe.resolution.sweep import evaluate, fit_size, sweep
from vit2dpe.spec import parse_size
from vit2dpe.testing import randomise, tensors

TRAIN, LARGE = (3, 4), (6, 10)
ALL = {"sincos": 2, "alibi": 2, "rope": 4, "rope_mixed": 4, "learned": 2, "relative": 2}


def micro(position="rope", **kwargs):
    torch.manual_seed(0)
    model = ViT(
        position, img_size=(12, 16), patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5,
        **{"class_token": False, "global_pool": "avg", **kwargs},
    )  # fmt: skip
    return randomise(model).eval()


def batches(n=2, size=(12, 16)):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 3, *size, generator=generator), torch.arange(4)) for _ in range(n)]


@pytest.mark.parametrize("word", ALL)
def test_at_the_training_size_no_policy_changes_a_bit(word):
    model = micro(word)
    assert len(policies_of(model)) == ALL[word]
    x = batches()[0][0]
    with torch.no_grad():
        plain = model(x)
        for policy in policies_of(model):
            for temperature in ("none", "log", "yarn"):
                with use_policy(model, policy, temperature=temperature):
                    assert torch.equal(model(x), plain), (policy, temperature)


@pytest.mark.parametrize("word", ["sincos", "alibi", "rope", "rope_mixed"])
def test_elsewhere_every_policy_changes_something_and_is_put_back(word):
    model = micro(word)
    x, keys = torch.randn(2, 3, 24, 40), list(model.state_dict())
    with torch.no_grad():
        plain = model(x)
        seen = [plain]
        for policy in policies_of(model)[1:]:
            with use_policy(model, policy):
                assert list(model.state_dict()) == keys
                seen.append(model(x))
        with pytest.raises(RuntimeError, match="inside"), use_policy(model, "interpolate", temperature="log"):
            raise RuntimeError("inside")
        assert torch.equal(model(x), plain)
    for i, a in enumerate(seen):
        assert not any(torch.allclose(a, b, atol=1e-6) for b in seen[:i])


def test_interpolated_places_stay_inside_the_training_grid():
    at = Interpolate(TRAIN).place(Positions.grid(LARGE))
    assert at.extent == TRAIN
    low, high = at.coords.amin((0, 1)), at.coords.amax((0, 1))
    assert low.tolist() == pytest.approx([0.5 * 3 / 6 - 0.5, 0.5 * 4 / 10 - 0.5])
    assert high.tolist() == pytest.approx([5.5 * 3 / 6 - 0.5, 9.5 * 4 / 10 - 0.5])
    corner = Interpolate(TRAIN, align="corner").place(Positions.grid(LARGE))
    assert corner.coords.amax((0, 1)).tolist() == pytest.approx([5 * 3 / 6, 9 * 4 / 10])


@pytest.mark.parametrize("axes", [1, 2])
def test_ntk_is_a_change_of_base(axes):
    """w_i s^(-t_i) is the bank of base · s^(c / (c - 2)), c channels an axis; each axis by its own growth."""
    head_dim, train, extent = 16 * axes, (8, 5)[:axes], (20, 30)[:axes]
    rope = AxialRoPE(head_dim, axes=axes, base=50.0)
    found = NTK(train).rescale(rope.frequencies(torch.device("cpu")), extent)
    for axis, (small, large) in enumerate(zip(train, extent, strict=True)):
        base = 50.0 * (large / small) ** (16 / (16 - 2))
        bank = AxialRoPE(head_dim, axes=axes, base=base).frequencies(torch.device("cpu"))[axis]
        torch.testing.assert_close(found[axis], bank, rtol=1e-12, atol=1e-15)


def test_ntk_and_yarn_leave_a_shrunk_axis_alone():
    w = MixedRoPE(16, 3).frequencies(torch.device("cpu"))
    for policy in (NTK((8, 8)), YaRN((8, 8), beta_fast=2.0, beta_slow=0.1)):
        found = policy.rescale(w, (4, 16))
        assert torch.equal(found[0], w[0])
        assert not torch.allclose(found[1], w[1])


def test_yarn_keeps_fast_and_interpolates_slow_frequencies():
    w = AxialRoPE(64, axes=1, base=10_000.0).frequencies(torch.device("cpu"))
    found = YaRN((2048,)).rescale(w, (8192,))
    turns = w * 2048 / (2 * math.pi)
    assert torch.equal(found[turns > 32], w[turns > 32])
    torch.testing.assert_close(found[turns < 1], w[turns < 1] / 4)
    between = (turns > 1) & (turns < 32)
    assert ((found < w) & (found > w / 4))[between].all()


def test_length_temperature_keeps_the_peak_and_its_inverse_destroys_it():
    """Logits of N(0, 2): top-1 weight among 196 keys, among 576 with, without and against the temperature."""
    heat = LogTemperature((14, 14))((24, 24))
    assert heat == pytest.approx(math.log(576) / math.log(196))
    generator = torch.Generator().manual_seed(0)
    few, many = (2**0.5 * torch.randn(4000, n, generator=generator) for n in (196, 576))
    peak = {name: t.softmax(-1).amax(-1).mean().item() for name, t in {
        "trained": few, "plain": many, "times": many * heat, "divided": many / heat}.items()}  # fmt: skip
    assert abs(peak["times"] - peak["trained"]) < abs(peak["plain"] - peak["trained"])
    assert peak["divided"] < peak["plain"] < peak["times"]
    assert YaRNTemperature((4, 4))((16, 4)) == pytest.approx((0.1 * math.log(2) + 1) ** 2)


def test_a_temperature_is_set_once_for_a_sum_and_its_blocks():
    model = micro("sincos+rope_mixed+alibi")
    at = Positions.grid(LARGE)
    with use_policy(model, temperature="log"):
        assert model.position(at).temperature == pytest.approx(math.log(60) / math.log(12))
        assert all(block.attn.position(at).temperature is None for block in model.blocks)


@pytest.mark.parametrize(
    ("word", "policy", "reason"),
    [
        ("learned", "ntk", "no rotary frequencies"),
        ("sincos", "yarn", "no rotary frequencies"),
        ("rope", "resize", "no table"),
        ("learned+rope", "ntk", "LearnedTable cannot ntk"),
        ("rope", "subtable", "no table to take a part of"),
        ("learned", "extrapolate", "no entries beyond"),
        ("rope", "interpolat", "did you mean 'interpolate'"),
        ("rope", "interpolate(aling=corner)", "did you mean 'align'"),
        ("rope", "interpolate(align=edge)", "half_pixel, corner"),
        ("rope", "yarn(beta_fast=0.1)", "beta_fast > beta_slow"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(word, policy, reason):
    with pytest.raises(ValueError, match=reason), use_policy(micro(word), policy):
        raise AssertionError("entered")


def test_a_policy_reaches_what_the_encoding_sees():
    """`interpolate` on a model equals the encoding called with scaled places by hand."""
    model = micro("sincos")
    at = Positions.grid(LARGE)
    with use_policy(model, "interpolate"):
        found = model.position(at).token
    ratio = torch.tensor([3 / 6, 4 / 10])
    by_hand = SinCos(32)(Positions((at.coords + 0.5) * ratio - 0.5, TRAIN)).token
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-6)


def test_queries_and_keys_are_both_placed():
    encoding = build("rope", Dims(32, 2, TRAIN))
    encoding.own_policy = Interpolate(TRAIN)
    at, other = Positions.grid(LARGE), Positions.grid(LARGE).take(torch.tensor([5, 7]))
    whole, part = tensors(encoding(at)), tensors(encoding(at, other))
    assert torch.equal(part["k_rotation.cos"], whole["q_rotation.cos"][..., [5, 7], :])
    assert torch.equal(part["q_rotation.cos"], whole["q_rotation.cos"])


def test_sweep_rows_say_what_was_measured():
    model = micro("rope")
    rows = sweep(
        model, batches(), [(12, 16), (24, 32), (8, 24)], modes=("scale", "canvas"), temperatures=("none", "log")
    )
    assert len(rows) == 4 * 2 * 2 * 3
    assert {(r["train_height"], r["train_width"]) for r in rows} == {(12, 16)}
    assert all(r["n"] == 8 for r in rows)
    at_train = [r for r in rows if (r["height"], r["width"]) == (12, 16)]
    assert len({(r["top1"], r["loss"]) for r in at_train}) == 1, "at the training size all rows are one measurement"
    by_hand = evaluate(model, batches())
    assert at_train[0]["top1"] == by_hand["top1"]
    assert at_train[0]["loss"] == by_hand["loss"]


def test_sweep_takes_a_timm_model():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=4, dynamic_img_size=True
    )
    rows = sweep(model, batches(size=(32, 32)), [(32, 32), (48, 64)], modes=("scale",), train_size=(32, 32))
    assert [(r["policy"], r["height"], r["width"]) for r in rows] == [("default", 32, 32), ("default", 48, 64)]
    with pytest.raises(ValueError, match="needs a model of ours"):
        sweep(model, batches(size=(32, 32)), [(32, 32)], ["interpolate"], train_size=(32, 32))


def test_canvas_shows_the_same_pixels_and_their_mirror_image():
    x = torch.arange(12.0).view(1, 1, 3, 4).expand(1, 3, -1, -1)
    wide = fit_size(x, (5, 8), "canvas", (3, 4))
    assert torch.equal(wide[0, 0, 1:4, 2:6], x[0, 0])
    assert torch.equal(wide[0, 0, 0], wide[0, 0, 1])  # the row above mirrors the first
    assert torch.equal(wide[0, 0, 1, :2], x[0, 0, 0, :2].flip(0))
    assert torch.equal(fit_size(x, (1, 2), "canvas", (3, 4))[0, 0], x[0, 0, 1:2, 1:3])  # smaller: its middle
    assert fit_size(x, (6, 10), "scale", (3, 4)).shape == (1, 3, 6, 10)
    assert torch.equal(fit_size(x, (3, 4), "scale", (3, 4)), x)


def test_the_crop_ratio_is_the_same_at_every_size():
    """A bright frame of one eighth of the side is gone at every size when the middle three quarters are kept."""
    x = torch.ones(1, 1, 32, 48)
    x[..., 4:-4, 6:-6] = 0
    for size in ((16, 24), (32, 48), (64, 96), (24, 24)):
        assert fit_size(x, size, "scale", (32, 48), crop=0.75).abs().max() < 1e-6
        assert fit_size(x, size, "scale", (32, 48)).max() > 0.5


@pytest.mark.parametrize("text", ["32x", "x32", "0", "32x48x3", "big", "-4"])
def test_sizes_are_written_plainly(text):
    assert parse_size("32") == (32, 32)
    assert parse_size("32x48") == (32, 48)
    with pytest.raises(ValueError, match="32 or 32x48"):
        parse_size(text)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        evaluate(micro(), iter([]))
