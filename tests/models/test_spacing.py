"""Places in units of the world: pixels of another size than in training, the same places, the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import MICRO, shaken, within
from vit2dpe import MAE, ConfigError, Dims, Positions, Swin, ViT, build, sweep, use_policy
from vit2dpe.encodings import ENCODINGS
from vit2dpe.study.evaluate import evaluate_model
from vit2dpe.study.settings import EvaluateConfig
from vit2dpe.testing import randomise, tensors

GRID = (3, 5)
CONTINUOUS = [
    "sincos",
    "fourier",
    "alibi",
    "alibi(distance=squared)",
    "kerple",
    "lookhere",
    "rope",
    "rope_mixed",
    "rope_golden",
    "t5",
    "logcpb",
]
close = within(2e-6)


def vit(word, **more):
    torch.manual_seed(0)
    return shaken(ViT(word, img_size=(24, 40), patch_size=8, **MICRO | more))


def encoding(word):
    torch.manual_seed(0)
    return randomise(build(word, Dims(48, 3, GRID))).eval()


# places ------------------------------------------------------------------------------------------------------------


def test_places_of_a_finer_grid():
    """The outer edge stays at -1/2, or the first place where it is put; extent and span are two things."""
    at = Positions.grid((2, 3), spacing=0.5)
    assert at.coords[0].tolist() == [[y, x] for y in (-0.25, 0.25) for x in (-0.25, 0.25, 0.75)]
    assert (at.extent, at.span, at.on_grid, at.whole) == ((2, 3), (1.0, 1.5), False, False)
    each = Positions.grid((2, 2), spacing=(2, 0.25), origin=(1, -1.5))
    assert each.coords[0].tolist() == [[1, -1.5], [1, -1.25], [3, -1.5], [3, -1.25]]
    assert each.span == (4, 0.5)
    for kept in (each.take(torch.tensor([3, 0])), each.take(torch.tensor([[3], [0]])), each.with_prefix(2)):
        assert kept.spacing == (2, 0.25)
    assert (
        Positions.grid((4, 4), spacing=0.1).coords[0, -1, 0]
        == torch.tensor(3 * 0.1 - 0.45, dtype=torch.float64).float()
    )


def test_a_spacing_of_one_is_the_grid():
    at = Positions.grid(GRID, spacing=(1, 1.0))
    assert (at.on_grid, at.whole, at.spacing, at.span) == (True, True, (), GRID)
    moved = Positions.grid(GRID, origin=2)  # a crop of something larger
    assert moved.coords[0, 0].tolist() == [2, 2]
    assert not moved.on_grid


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(spacing=0), "above 0, got 0"),
        (dict(spacing=(1, -1)), "above 0"),
        (dict(spacing=(1, 2, 3)), r"one finite number or 2.*\(1, 2, 3\)"),
        (dict(spacing=float("nan")), "finite"),
        (dict(origin="left"), "origin must be"),
    ],
)
def test_what_is_no_spacing(given, message):
    with pytest.raises(ValueError, match=message):
        Positions.grid(GRID, **given)


# encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", CONTINUOUS)
@torch.no_grad()
def test_the_same_place_gets_the_same(word):
    """Of patches a third as large every third, from the second on, lies where one of training does."""
    one = encoding(word)
    middles = torch.tensor([(3 * row + 1) * 15 + 3 * column + 1 for row in range(3) for column in range(5)])
    finer = tensors(one(Positions.grid((9, 15), spacing=1 / 3).take(middles)))
    for name, tensor in tensors(one(Positions.grid(GRID))).items():
        close(finer[name], tensor, 2e-6 * max(1.0, float(tensor.abs().max())))


@pytest.mark.parametrize("policy", ["interpolate", "ntk", "yarn"])
@torch.no_grad()
def test_policies_measure_what_a_grid_covers(policy):
    """The world of training in finer patches is no other size; twice as much of it is."""
    model, signals = vit("rope"), {}
    for name, at in {
        "finer": Positions.grid((6, 10), spacing=0.5),
        "finer and larger": Positions.grid((12, 20), spacing=0.5),
        "larger": Positions.grid((6, 10)),
    }.items():
        with use_policy(model, policy, temperature="log"):
            signals[name] = model.position(at)
        signals[name, "plain"] = model.position(at)
    close(signals["finer"].q_rotation.cos, signals["finer", "plain"].q_rotation.cos, 0.0)
    assert signals["finer"].temperature == signals["larger"].temperature  # it counts tokens
    change = (signals["finer and larger"].q_rotation.cos - signals["finer and larger", "plain"].q_rotation.cos).abs()
    assert float(change.max()) > 1e-2
    # Twice the side in patches of half the size: a pair of rows of them around each of the places.
    fine = signals["finer and larger"].q_rotation
    angle = torch.atan2(fine.sin, fine.cos)[0, 0].unflatten(0, (12, 20))
    coarse = torch.atan2(signals["larger"].q_rotation.sin, signals["larger"].q_rotation.cos)[0, 0].unflatten(0, (6, 10))
    close((angle[2:4, 2:4].mean((0, 1))), coarse[1, 1], 1e-5)


@torch.no_grad()
def test_dinov3_measures_places_by_the_image():
    """Its coordinates run from -1 to 1 over the image, whatever a pixel is."""
    one = encoding("rope_dinov3")
    close(one(Positions.grid((6, 10), spacing=0.5)).q_rotation.cos, one(Positions.grid((6, 10))).q_rotation.cos, 1e-6)


# models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["sincos+rope_mixed", "kerple"])
@torch.no_grad()
def test_a_vit_with_finer_pixels(word):
    """Twice the pixels of the same world are what the policy makes of them; of more of the world it is not."""
    model = vit(word)
    images = torch.randn(2, 3, 48, 80)
    found, part = model(images, spacing=0.5), model(images[..., :40], spacing=0.5)
    with use_policy(model, "interpolate"):
        close(found, model(images), 2e-5)
        assert float((part - model(images[..., :40])).abs().max()) > 1e-4
    assert float((found - model(images)).abs().max()) > 1e-3
    assert torch.equal(model(images, spacing=1.0), model(images))


def test_an_mae_hides_and_reconstructs_places_of_the_world():
    torch.manual_seed(0)
    encoder = ViT("rope", img_size=(24, 40), patch_size=8, **MICRO | dict(num_classes=0))
    model = shaken(MAE(encoder, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3))
    images, noise = torch.randn(2, 3, 48, 80), torch.rand(2, 60)
    loss, prediction, _ = model(images, noise=noise, spacing=0.5)
    loss.backward()
    with use_policy(model, "interpolate"), torch.no_grad():
        close(prediction.detach(), model(images, noise=noise)[1], 2e-5)


TABLES = ["learned", "windowed", "factorized", "relative", "relative(symmetric=true)"]


@pytest.mark.parametrize("word", TABLES)
@torch.no_grad()
def test_tables_are_read_between_their_places_by_interpolate_alone(word):
    """By default they are resized to the extent, which knows of no spacing."""
    model, images = vit(word), torch.randn(1, 3, 48, 80)
    with pytest.raises(ValueError, match=r"spacing \(0\.5, 0\.5\).*interpolate"):
        model(images, spacing=0.5)
    with use_policy(model, "interpolate"):
        close(model(images, spacing=0.5), model(images), 2e-5)


@torch.no_grad()
def test_no_encoding_stands_in_the_way():
    """Each takes a spacing, or is one of the tables above, or takes whole places alone and says so."""
    at = Positions.grid((6, 10), spacing=0.5)
    for name in set(ENCODINGS) - {"learned", "windowed", "factorized", "relative"}:
        one = encoding(name)
        if one.continuous:
            assert all(bool(tensor.isfinite().all()) for tensor in tensors(one(at)).values())
        else:
            with pytest.raises(ValueError, match=r"whole|spacing"):
                tensors(one(at))


def test_swin_takes_none():
    model = Swin(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(1,), num_heads=(3,), num_classes=2)
    with pytest.raises(ConfigError, match="Swin takes no spacing"):
        sweep(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], [(32, 32)], spacing=0.5)


def test_sweep_and_predict_hand_it_on():
    model = vit("sincos")
    images, labels = torch.randn(8, 3, 48, 80), torch.arange(8) % 7
    spaced, plain = (sweep(model, [(images, labels)], [(48, 80)], ["extrapolate"], spacing=s)[0] for s in (0.5, None))
    scaled = sweep(model, [(images, labels)], [(48, 80)], ["interpolate"])[0]
    assert abs(spaced["loss"] - scaled["loss"]) < 1e-5
    assert abs(spaced["loss"] - plain["loss"]) > 1e-4
    picture = (torch.rand(48, 80, 3) * 255).byte()
    (first, second) = (model.predict(picture, 7, size=(48, 80), spacing=s) for s in (0.5, None))
    with use_policy(model, "interpolate"):
        third = model.predict(picture, 7, size=(48, 80))
    assert first.classes == third.classes
    assert max(abs(a - b) for a, b in zip(first.probabilities, third.probabilities, strict=True)) < 1e-5
    assert first.probabilities != second.probabilities


def test_evaluate_writes_it_down(tmp_path):
    """As a last column, where it was given."""
    name = "vit2dpe_tiny_patch4_32(position=sincos, depth=1, embed_dim=48, num_heads=3, num_classes=10)"
    rows = {}
    for spacing in (None, 0.5):
        given = dict(model=name, untrained=True, data="digits", sizes="64", policies="extrapolate", limit=10)
        config = EvaluateConfig.of(**given, device="cpu", spacing=spacing, out=str(tmp_path / str(spacing)))
        torch.manual_seed(0)
        rows[spacing] = evaluate_model(config)[0]
    assert (rows[0.5].spacing, rows[None].spacing) == (0.5, None)
    assert rows[0.5].loss != rows[None].loss
    header, line = (tmp_path / "0.5" / "results.csv").read_text().splitlines()
    assert header.endswith(",spacing")
    assert line.endswith(",0.5")
    assert "spacing" not in (tmp_path / "None" / "results.csv").read_text()
    with pytest.raises(ConfigError, match=r"spacing.*above 0.*-1"):
        EvaluateConfig.of(spacing=-1)
    given |= dict(model=name.replace("sincos", "learned"), device="cpu", spacing=0.5, out=str(tmp_path / "learned"))
    with pytest.raises(ConfigError, match="does not take 64x64 images: a table lies on the grid"):
        evaluate_model(EvaluateConfig.of(**given | dict(policies="interpolate,resize")))
    assert evaluate_model(EvaluateConfig.of(**given | dict(policies="interpolate")))[0].policy == "interpolate"
