"""Every preset of `rope` is the function that it names, in float64, channel by channel; what is not one is refused."""

import math

import pytest
import torch
from torch.nn.functional import pad

from tests.encodings.preset_originals import FOUND, ORIGINALS, Float64, unlike_pairs
from vit2dpe import ConfigError, Dims, Positions, TextDecoder, ViT, build
from vit2dpe.encodings.conventions import channels_of, natural
from vit2dpe.encodings.presets import PRESETS, REFUSED

GRIDS = {1: (2000,), 2: (24, 60), 3: (2, 24, 60), 4: (2, 24, 30, 2)}


def places(name, extent):
    """What the row says of places, (N, d) float64."""
    coords = Positions.grid(extent).coords[0].double()
    if name == "qwen_image":
        return coords - torch.tensor([0.0, math.ceil(extent[1] / 2), math.ceil(extent[2] / 2)], dtype=torch.float64)
    if name == "cosmos":
        return coords * torch.tensor([24 / 30, 1.0, 1.0], dtype=torch.float64)
    if name == "eva02":
        return coords * 16 / torch.tensor(extent)
    if name == "perception_encoder":  # its start, 1, comes on top
        return (coords + 1) * 24 / torch.tensor(extent) - 1
    return coords * 24 / extent[1] if name == "sam3" else coords


def made(name, extent, width, options=""):
    return build(f"rope(preset={name}{options})", Dims(2 * width, 2, extent)).eval()


def angles(encoding, coords, extent):
    """(N, Dh/2)"""
    return encoding.angle(Positions(coords[None], extent)).dense()[0, 0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_names(name):
    """Each channel, where `channels_of` has it: places, frequencies, axes and pairs at once; rows are not columns.

    `off` is what the original's own tables lack of float64, told within a factor of ten: other machines round
    otherwise."""
    row, original = PRESETS[name], ORIGINALS[name]
    if FOUND is None and row.source.startswith("diffusers"):
        pytest.skip("diffusers is not installed")
    extent = (44, 44) if name == "llama4_vision" else GRIDS[len(natural(row))]
    at = places(name, extent)
    with Float64():
        cos, sin = original(at, extent)
    released, _ = original(at.float(), extent)
    width = row.head_dim or (80 if name == "minimax_m3_vl" else cos.shape[-1])
    order, still = channels_of(name, width), (0, width - cos.shape[-1])
    assert sorted(order) == list(range(width))
    cos, sin, released = pad(cos, still, value=1.0), pad(sin, still), pad(released.double(), still, value=1.0)
    encoding = made(name, extent, width)
    angle = angles(encoding, at, extent).repeat_interleave(2, -1)
    assert angle.dtype == cos.dtype == torch.float64
    torch.testing.assert_close(angle.cos(), cos[:, order], rtol=0, atol=1e-9)
    torch.testing.assert_close(angle.sin(), sin[:, order], rtol=0, atol=1e-9)
    off = float((released[:, order] - angle.cos()).abs().max())
    assert row.off / 10 <= max(off, 1e-15) <= 3 * row.off
    if "rows" in row.axes:
        first = natural(row).index("rows")
        swapped = at.clone()
        swapped[:, [first, first + 1]] = at[:, [first + 1, first]]
        assert (angles(encoding, swapped, extent).cos().repeat_interleave(2, -1) - cos[:, order]).abs().max() > 0.5


@pytest.mark.parametrize("name", ["vjepa2", "ernie_image"])
def test_what_is_refused_turns_no_pairs(name):
    if FOUND is None and name == "ernie_image":
        pytest.skip("diffusers is not installed")
    first, second = unlike_pairs(name)
    assert (first - second).abs().max() > 0.1


# the option ---------------------------------------------------------------------------------------------------------


def test_an_unknown_preset_is_refused_by_the_nearest():
    dims = Dims(256, 2, (3, 4, 5))
    for word, what in {
        "rope(preset=fluks)": "did you mean 'flux'",
        "rope(preset=3)": "unknown preset of rope '3'",
        "rope(prest=flux)": "did you mean 'preset'",
        "rope(preset=flux, bse=3)": "did you mean 'base'",
        "rope_mixed(preset=flux)": "unknown option",
    }.items():
        with pytest.raises(ConfigError, match=what):
            build(word, dims)
    with pytest.raises(ConfigError, match="unknown option of CentredRoPE 'start'"):
        build("rope(preset=dinov3, start=1)", Dims(256, 2, (3, 4)))
    for name, reason in REFUSED.items():
        with pytest.raises(ConfigError) as error:
            build(f"rope(preset={name})", dims)
        assert name in str(error.value)
        assert str(error.value).endswith(reason)


@pytest.mark.parametrize(
    ("name", "width", "extent", "what"),
    [
        ("flux", 64, (3, 5), "heads 128 wide, got 64.*write sections= of your own"),
        ("pixtral", 128, (3, 5), "heads 64 wide, got 128.*write step="),
        ("gemma4", 64, (7,), "heads 512 wide"),
        ("sam2", 64, (7,), "axes rows, columns, and the grid has 1"),
        ("sam2", 64, (2, 3, 5), "axes rows, columns, and the grid has 3"),
        ("llama", 64, (3, 5), "axes length, and the grid has 2"),
        ("qwen2vl", 128, (3, 5), "axes time, rows, columns, and the grid has 2"),
    ],
)
def test_other_heads_and_axes_are_refused(name, width, extent, what):
    with pytest.raises(ConfigError, match=what):
        made(name, extent, width)


def test_an_option_beside_it_wins():
    extent = (2, 3, 5)
    got = made("flux", extent, 64, ", sections=(4, 14, 14), base=50")
    want = build("rope(sections=(4, 14, 14), base=50)", Dims(128, 2, extent))
    coords = Positions.grid(extent).coords[0]
    assert torch.equal(angles(got, coords, extent), angles(want, coords, extent))


@pytest.mark.parametrize("name", ["flux", "hunyuan", "cosmos", "flux2", "allegro"])
def test_an_image_is_a_video_of_one_frame(name):
    """On rows and columns alone the pairs of the other axes stand still, behind the others."""
    row, grid = PRESETS[name], (4, 7)
    axes = natural(row)
    whole = [1 if axis not in ("rows", "columns") else grid[axis == "columns"] for axis in axes]
    video = angles(made(name, tuple(whole), row.head_dim), Positions.grid(whole).coords[0], tuple(whole))
    image = angles(made(name, grid, row.head_dim), Positions.grid(grid).coords[0], grid)
    turning = video[:, (video != 0).any(0)]
    assert torch.equal(image[:, : turning.shape[1]], turning)
    assert not image[:, turning.shape[1] :].any()


def test_models_take_presets():
    vit = ViT("rope(preset=kandinsky5)", img_size=(16, 24), patch_size=8, embed_dim=128, depth=1, num_heads=2)
    assert vit(torch.randn(1, 3, 16, 24)).isfinite().all()
    text = TextDecoder("rope(preset=llama3)", vocab_size=5, context=8, embed_dim=32, depth=1, num_heads=2)
    assert text(torch.randint(5, (2, 6))).isfinite().all()
