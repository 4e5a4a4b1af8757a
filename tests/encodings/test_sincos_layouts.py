"""Every layout of SinCos is its formula, written as loops over Python floats, and its original where timm or HF has it.

Tolerance 1e-7 in float32 (one rounding of numbers up to 1), 1e-12 in float64.
"""

import math

import pytest
import torch
from timm.layers import build_sincos2d_pos_embed
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    build_2d_sinusoidal_position_embedding,
)

from tests.encodings.originals import exchanged, same
from vit2dpe import Positions
from vit2dpe.encodings import SinCos

ATOL = {torch.float32: 1e-7, torch.float64: 1e-12}
BASE = 10_000.0


def blocks(places, count, last):
    """[sin ... | cos ...] for one place after another; ω_k = BASE^(-k / last)."""
    row = []
    for p in places:
        row += [math.sin(p * BASE ** (-k / last)) for k in range(count)]
        row += [math.cos(p * BASE ** (-k / last)) for k in range(count)]
    return row


def pairs(places, count):
    """[sin cos sin cos ...] for one place after another."""
    row = []
    for p in places:
        for k in range(count):
            row += [math.sin(p / BASE ** (2 * k / (2 * count))), math.cos(p / BASE ** (2 * k / (2 * count)))]
    return row


def mae(place, dim):
    y, x = place
    return blocks((x, y), dim // 4, dim // 4)


def big_vision(place, dim):
    y, x = place
    return blocks((x, y), dim // 4, dim // 4 - 1)


def timm(place, dim):
    y, x = blocks(place[:1], dim // 4, dim // 4), blocks(place[1:], dim // 4, dim // 4)
    return y[: dim // 4] + x[: dim // 4] + y[dim // 4 :] + x[dim // 4 :]


def wzlxjtu(place, dim):
    return pairs(place[::-1], dim // (2 * len(place)))


def tatp22(place, dim):
    """Channels of an axis: the width over the axes, rounded up to a whole even number; the surplus is cut."""
    even = 2 * math.ceil(dim / (2 * len(place)))
    return pairs(place, even // 2)[:dim]


CASES = [
    *[(layout, (3, 5), dim) for layout in (mae, big_vision, timm, wzlxjtu) for dim in (8, 24)],
    *[(tatp22, (3, 5), dim) for dim in (8, 9, 10, 11)],
    *[(tatp22, (2, 3, 4), dim) for dim in (6, 7, 10, 11, 12)],
    *[(layout, (7,), dim) for layout in (wzlxjtu, tatp22) for dim in (2, 8)],
    (tatp22, (7,), 5),
]


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize(("layout", "extent", "dim"), CASES)
def test_layout_is_its_formula(layout, extent, dim, dtype):
    ours = SinCos(dim, axes=len(extent), layout=layout.__name__).to(dtype)
    at = Positions.grid(extent)
    token = ours(at).token
    assert token.dtype == dtype
    theirs = torch.tensor([[layout(tuple(p), dim) for p in at.coords[0].tolist()]], dtype=torch.float64)
    # On a line there is nothing to exchange but sine and cosine.
    wrong = ours(exchanged(at)).token if len(extent) > 1 else token.roll(1, -1)
    same(token, theirs, wrong, ATOL[dtype])


@pytest.mark.parametrize("layout", [mae, big_vision, timm, wzlxjtu, tatp22])
def test_layouts_differ(layout):
    at = Positions.grid((3, 5))
    mine = SinCos(16, layout=layout.__name__)(at).token
    for other in {"mae", "big_vision", "timm", "wzlxjtu", "tatp22"} - {layout.__name__}:
        assert (mine - SinCos(16, layout=other)(at).token).abs().max() > 0.1


@pytest.mark.parametrize("extent", [(3, 5), (9, 4)])
def test_timm_layout_is_timms_function(extent):
    """1e-6: timm's angles are float32."""
    ours, at = SinCos(16, layout="timm"), Positions.grid(extent)
    same(ours(at).token[0], build_sincos2d_pos_embed(list(extent), 16), ours(exchanged(at)).token[0], 1e-6)


def test_transformers_vit_mae_is_the_default():
    """Square: the model takes no other. The row of the class token is zero in both."""
    config = ViTMAEConfig(
        hidden_size=16, image_size=10, patch_size=2, decoder_hidden_size=8, decoder_num_hidden_layers=0
    )
    encoder, decoder = ViTMAEEmbeddings(config), ViTMAEDecoder(config, 25)
    encoder.initialize_weights()
    at = Positions.grid((5, 5)).with_prefix(1)
    for table in (encoder.position_embeddings, decoder.decoder_pos_embed):
        ours = SinCos(table.shape[-1])
        same(ours(at).token, table.detach(), ours(exchanged(at)).token, 1e-7)


@pytest.mark.parametrize("extent", [(3, 5), (9, 4)])
def test_transformers_sincos_for_new_models_has_rows_first(extent):
    """Different on purpose: "mae" has MAE's columns in the first half; transformers swaps the halves for MAE too."""
    ours, at, dim = SinCos(16), Positions.grid(extent), 16
    theirs = build_2d_sinusoidal_position_embedding(*extent, dim)
    rows_first, wrong = (ours(where).token[0].roll(dim // 2, -1) for where in (at, exchanged(at)))
    same(rows_first, theirs, wrong, 1e-7)
    assert (ours(at).token[0] - theirs).abs().max() > 0.1
