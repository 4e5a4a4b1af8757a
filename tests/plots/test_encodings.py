"""Pictures of encodings: their data against a computation by hand, and that every name can be drawn."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from vit2dpe.attention.contract import probed
from vit2dpe.encodings import ENCODINGS, Builder, Dims, PositionEncoding, build
from vit2dpe.errors import ConfigError
from vit2dpe.plots import encodings as show

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")

WIDE = (5, 8)
HEADS = 3
DIMS = Dims(width=48, heads=HEADS, grid=WIDE)


def draw(words, grid=WIDE, **options):
    return show.draw(words, grid, width=DIMS.width, heads=HEADS, **options)


def panels(figure):
    """The axes of panels; colour bars are children of theirs, not of the figure."""
    return figure.axes


def texts(figure):
    return [text.get_text() for text in figure.texts]


def encoding(word, seed=0):
    torch.manual_seed(seed)
    return build(word, DIMS)


def expected_panels(word, grid):
    """2 similarities, a kernel for each head or for all, and a bias for each head."""
    at = show.Positions.grid(grid)
    built = build(word, Dims(DIMS.width, HEADS, grid)).eval()
    signal = probed(built(at))
    rotations = 0 if signal.q_rotation is None else signal.q_rotation.cos.shape[1]
    biases = signal.bias[0].dense().shape[1] if signal.bias else 0
    count = 2 * ("token" in built.gives)
    return count + min(rotations, show.HEADS) + min(biases, show.HEADS)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("grid", [WIDE, (16,)], ids=str)
def test_every_name_is_drawn_with_the_panels_it_gives(name, grid):
    try:
        build(name, Dims(DIMS.width, HEADS, grid))
    except ConfigError as error:
        with pytest.raises(ConfigError, match=str(error)[:20]):
            draw([name], grid)
        return
    figure = draw([name], grid)
    assert len(panels(figure)) == expected_panels(name, grid)
    assert name in texts(figure)[0]
    for ax in panels(figure):
        assert ax.get_xlabel() == ("place" if len(grid) == 1 else "column")
        data = ax.lines[1].get_ydata() if len(grid) == 1 else ax.images[0].get_array()
        assert np.shape(data) == grid


def test_none_says_that_there_is_nothing():
    figure = draw(["none"])
    assert not panels(figure)
    assert any("nothing" in text for text in texts(figure))


def test_all_draws_every_name_and_says_why_one_refuses(monkeypatch):
    class Refuses(PositionEncoding):
        def __init__(self):
            raise ConfigError("one axis is not enough")

    monkeypatch.setitem(ENCODINGS, "refuses", Builder(Refuses, lambda dims: {}))
    seen = texts(draw(["all"]))
    for name in ENCODINGS:
        assert any(text.split(" (")[0] == name for text in seen)
    assert "refused: one axis is not enough" in seen
    with pytest.raises(ConfigError, match="one axis"):
        draw(["refuses"])


def test_picture_of_rope_by_hand():
    base, pairs = 100.0, DIMS.width // HEADS // 4  # for each axis
    image = np.array(panels(draw(["rope"]))[0].images[0].get_array())
    by_hand = np.zeros(WIDE)
    for row in range(WIDE[0]):
        for column in range(WIDE[1]):
            waves = [base ** (-k / pairs) for k in range(pairs)]
            along = [math.cos((2 - row) * w) for w in waves] + [math.cos((4 - column) * w) for w in waves]
            by_hand[row, column] = sum(along) / len(along)
    np.testing.assert_allclose(image, by_hand, atol=1e-6)


def test_picture_of_relative_by_hand():
    table = encoding("relative", seed=3).relative_position_bias_table.detach()
    for head, ax in enumerate(panels(draw(["relative"], seed=3))):
        image = np.array(ax.images[0].get_array())
        for row in range(WIDE[0]):
            for column in range(WIDE[1]):
                offset = (2 - row + WIDE[0] - 1, 4 - column + WIDE[1] - 1)
                assert image[row, column] == float(table[head][offset])


def test_picture_of_learned_by_hand():
    table = encoding("learned", seed=3).pos_embed[0].detach().double()
    centre, corner = (np.array(ax.images[0].get_array()) for ax in panels(draw(["learned"], seed=3)))
    for image, query in ((centre, (2, 4)), (corner, (0, 0))):
        dots = (table * table[query]).sum(-1) / (table.norm(dim=-1) * table[query].norm())
        np.testing.assert_allclose(image, dots.numpy(), atol=1e-6)


class Depth(PositionEncoding):
    """A bias that is the row of the key, and hides the last column."""

    gives = frozenset({"bias"})

    def bias(self, q, k):
        rows = k.coords[..., 0].expand(q.coords.shape[1], -1)[None, None]
        return rows.masked_fill(k.coords[..., 1] == WIDE[1] - 1, float("-inf"))


def test_rows_run_downward_and_hidden_keys_are_no_part_of_the_scale(monkeypatch):
    monkeypatch.setitem(ENCODINGS, "depth", Builder(Depth, lambda dims: {}))
    (ax,) = panels(draw(["depth"]))
    image = ax.images[0]
    data = np.ma.masked_invalid(image.get_array())
    assert data[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert image.origin == "upper"
    assert ax.get_ylim() == (4.5, -0.5)
    assert data.mask[:, -1].all()
    assert data.mask.sum() == WIDE[0]
    assert (image.norm.vmin, image.norm.vmax) == (-4.0, 4.0)
    assert "grey: hidden" in ax.get_title(loc="left")
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[4.0, 2.0]]]  # the query: column 4, row 2


def test_one_scale_for_a_kind_and_titles_that_name_the_head():
    figure = draw(["alibi", "relative", "rope", "rope_mixed"])
    scales = [(ax.images[0].norm.vmin, ax.images[0].norm.vmax) for ax in panels(figure)]
    most = max(abs(np.array(ax.images[0].get_array())).max() for ax in panels(figure)[:6])
    assert set(scales[:6]) == {(-most, most)}
    assert set(scales[6:]) == {(-1.0, 1.0)}
    assert "head 1" in panels(figure)[1].get_title(loc="left")
    assert texts(figure) == ["alibi", "relative (at initialisation)", "rope", "rope_mixed (at initialisation)"]


def test_a_sum_shows_its_parts_and_what_they_give_together():
    figure = draw(["sincos+rope(base=10)"])
    assert texts(figure) == ["sincos", "rope(base=10)"]
    figure = draw(["alibi+relative"])
    assert texts(figure)[-1] == "alibi+relative, summed (at initialisation)"
    images = [np.array(ax.images[0].get_array()) for ax in panels(figure)]
    np.testing.assert_allclose(images[0] + images[3], images[6], atol=1e-6)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = (panels(draw(["relative"], seed=seed))[0].images[0].get_array() for seed in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_save_writes_a_png(tmp_path):
    path = show.save(["rope", "relative"], WIDE, tmp_path / "new" / "picture.png", width=48)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5_000


def test_refusals_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'rope'"):
        draw(["ropee"])
    with pytest.raises(ValueError, match="one or two axes"):
        draw(["sincos"], (2, 3, 4))
    with pytest.raises(ValueError, match="at least one"):
        draw([])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[recipes\]\""):
        draw(["rope"])
