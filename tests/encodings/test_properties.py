"""What encodings promise beyond the contract: symmetries, formulas, padding, far places, every grid, chance."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import randn, within
from vit2dpe import ENCODINGS, Dims, Positions, ViT, attend, build, rotate
from vit2dpe.attention.contract import probed
from vit2dpe.encodings import Jitter
from vit2dpe.encodings.sincos import LAYOUTS
from vit2dpe.testing import randomise, tensors

few = partial(settings, derandomize=True, deadline=None)
GRIDS = {1: (7,), 2: (3, 5)}
DIMS = {d: Dims(width=48, heads=6, grid=grid, depth=4) for d, grid in GRIDS.items()}
ROTARY = [name for name in ENCODINGS if "rotation" in build(name, DIMS[2]).gives]


def drawn(word, dims, seed=0):
    torch.manual_seed(seed)
    return randomise(build(word, dims)).eval()


close = within(1e-6)


def line(places, extent=70_000):
    return Positions(torch.tensor(places, dtype=torch.float32)[None, :, None], (extent,))


# 1. samples of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("name", ENCODINGS)
@few(max_examples=4)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 6), min_size=3, max_size=3), prefix=st.integers(0, 2))
@torch.no_grad()
def test_a_sample_in_a_padded_batch_gets_what_it_gets_alone(name, axes, seed, lengths, prefix):
    """Places of its own for each sample (fractional where it may), padding masked: attend gives what it gives alone."""
    encoding, size = drawn(name, DIMS[axes], seed), math.prod(GRIDS[axes])
    index = torch.stack([torch.randperm(size)[:6] for _ in lengths])
    at = Positions.grid(GRIDS[axes]).take(index).with_prefix(prefix)
    if encoding.continuous:  # a table ends half a patch behind its outermost places
        moved = torch.rand(3, 1, axes) - 0.5 if encoding.resizes else 3 * torch.randn(3, 1, axes)
        at = Positions(at.coords + moved, at.extent, prefix)
    x, project = torch.randn(3, prefix + 6, 48), torch.randn(3, 48, 48) / 7

    def output(at, x, mask=None):
        signal = encoding(at)
        x = x if signal.token is None else x + signal.token
        return attend(*((x @ w).unflatten(-1, (6, -1)).transpose(1, 2) for w in project), signal, mask)

    real = torch.arange(prefix + 6) < prefix + torch.tensor(lengths)[:, None]  # (B, N)
    together = output(at, x, real[:, None, None])
    for b, length in enumerate(lengths):
        alone = Positions(at.coords[b : b + 1, :length], at.extent, prefix)
        close(together[b : b + 1, :, : prefix + length], output(alone, x[b : b + 1, : prefix + length]), 2e-5)


@pytest.mark.parametrize("name", ENCODINGS)
@torch.no_grad()
def test_other_keys_for_the_same_queries_are_never_those_of_before(name):
    """What places share lives as long as both of them: a key's address that is used again brings nothing back."""
    encoding, at = drawn(name, DIMS[2]), Positions.grid(GRIDS[2])
    torch.manual_seed(0)
    orders = [torch.randperm(15) for _ in range(30)]
    fresh = [tensors(encoding(Positions.grid(GRIDS[2]), at.take(order))) for order in orders]
    for order, expected in zip(orders, fresh, strict=True):
        found = tensors(encoding(at, at.take(order)))  # these keys are gone when the next ones come
        for field, tensor in found.items():
            close(tensor, expected[field])


# 2. rotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTARY)
@few(max_examples=10)
@given(places=st.lists(st.tuples(*[st.floats(-1e5, 1e5, width=32)] * 2), min_size=4, max_size=4))
def test_rotations_keep_norms(name, places):
    """|R(p) x| = |x| in each pair of channels, wherever p is."""
    at = Positions(torch.tensor(places)[None], GRIDS[2])
    turn = drawn(name, DIMS[2])(at).q_rotation
    x = randn(2, 6, 4, 8)
    pairs = [tensor.unflatten(-1, (-1, 2)).norm(dim=-1) for tensor in (x, rotate(x, turn))]
    torch.testing.assert_close(*pairs, rtol=2e-6, atol=1e-6)


# 3. the picture transposed -----------------------------------------------------------------------------------------


def halves(width):  # the first half for the second
    return [*range(width // 2, width), *range(width // 2)]


@torch.no_grad()
def copy_transposed(mine, other):
    """Parameters of `mine` with the two axes exchanged, into `other`: for each name, which dimensions or entries."""
    for (name, source), target in zip(mine.named_parameters(), other.parameters(), strict=True):
        kind = name.split(".")[0]
        if kind in ("pos_embed", "pos_embed_window", "relative_position_bias_table"):
            source = source.transpose(1, 2)
        elif kind == "tables":
            source = dict(mine.named_parameters())[f"tables.{1 - int(name[-1])}"]
        elif kind in ("freqs", "relative_attention_bias"):
            source = source.flip(0)
        elif name == "cpb_mlp.0.weight":
            source = source.flip(1)
        target.copy_(source)


PARAMETERS = dict(token=None, pair=None, head=None)  # nothing moves but the parameters
MIRROR = {
    "none": PARAMETERS,
    "learned": PARAMETERS,
    "windowed": PARAMETERS,
    "factorized": PARAMETERS,
    "relative": PARAMETERS,
    "logcpb": PARAMETERS,
    "t5": PARAMETERS,
    "fourier": PARAMETERS,
    "rope_mixed": PARAMETERS,
    "fire": PARAMETERS,  # it has a network of the distance, which has no axes: identical
    "alibi": PARAMETERS,  # it has none at all: identical
    "alibi(distance=squared)": PARAMETERS,
    "sincos": PARAMETERS | dict(token=halves(48)),
    "sincos(layout=big_vision)": PARAMETERS | dict(token=halves(48)),
    "sincos(layout=wzlxjtu)": PARAMETERS | dict(token=halves(48)),
    "sincos(layout=tatp22)": PARAMETERS | dict(token=halves(48)),
    "sincos(layout=timm)": PARAMETERS | dict(token=[*halves(24), *(24 + i for i in halves(24))]),
    "rope": PARAMETERS | dict(pair=halves(4)),
    "rope_dinov3": PARAMETERS | dict(pair=halves(4)),
    # up, right, down, left: the mirror at the diagonal exchanges up with left and right with down.
    "lookhere": PARAMETERS | dict(head=[3, 2, 1, 0, 4, 5]),
    "lookhere(view=180)": PARAMETERS | dict(head=[3, 2, 1, 0, 4, 5]),
    # up-right, down-right, down-left, up-left: up-right becomes down-left.
    "lookhere(view=45)": PARAMETERS | dict(head=[2, 1, 0, 3, 4, 5]),
}
NO_MIRROR = {"rope_golden": "directions go on by a golden step; the mirror image of that fan goes back by it"}


@torch.no_grad()
def transposed(word):
    """The Signal of a grid, and that of the transposed grid by the encoding with transposed parameters."""
    (rows, cols), dims = GRIDS[2], DIMS[2]
    mine = drawn(word, dims)
    other = build(word, Dims(dims.width, dims.heads, (cols, rows), depth=dims.depth)).eval()
    copy_transposed(mine, other)
    at = Positions.grid((rows, cols))
    return tensors(mine(at)), tensors(other(Positions(at.coords.flip(-1), (cols, rows))))


@pytest.mark.parametrize("word", MIRROR)
def test_transposing_the_image_is_exchanging_the_axes(word):
    """The stated permutation of channels, pairs, heads and parameters, and no other change."""
    here, there = transposed(word)
    move = MIRROR[word]
    for field, tensor in here.items():
        other = there[field]
        if field.startswith("bias"):
            other = other if move["head"] is None else other[:, move["head"]]
        else:
            order = move["token" if field == "token" else "pair"]
            other = other if order is None else other[..., order]
            assert order is None or not torch.equal(tensor, there[field]), "the permutation does something"
        network = word in ("logcpb", "fire", "fourier")  # whose sums may be taken in another order
        close(tensor, other, 2e-6 * float(tensor.abs().max()) if network else 0.0)


@pytest.mark.parametrize(("word", "reason"), NO_MIRROR.items())
def test_some_treat_the_axes_apart(word, reason):
    """No permutation of heads and pairs of channels turns the transposed Signal into the first."""
    here, there = (torch.complex(s["q_rotation.cos"], s["q_rotation.sin"])[0] for s in transposed(word))
    here, there = (s.transpose(1, 2).flatten(0, 1) for s in (here, there))  # (H * Dh/2, N)
    apart = (here[:, None] - there.repeat(2, 1)[None]).abs().amax(-1)
    apart = torch.minimum(apart, (here[:, None] - there.conj().repeat(2, 1)[None]).abs().amax(-1))
    assert float(apart.amin(1).max()) > 0.1, reason


# 4. every grid -----------------------------------------------------------------------------------------------------

SMALL = Dims(width=12, heads=3, grid=(3, 5))


def numbers(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def network(w, x, inner, name="mlp"):
    hidden = inner(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
    return hidden @ w[f"{name}.2.weight"].T + w.get(f"{name}.2.bias", 0.0)


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def lookhere_bias(delta):
    """Heads of lookhere for three heads in a middle block: up, down, everything (slope 1/2); delta is key - query."""
    far = np.hypot(*delta)
    turn = np.degrees(np.arctan2(delta[1], -delta[0]))  # clockwise from up
    up, down = (np.abs((turn - to + 180) % 360 - 180) <= 45 + 1e-6 for to in (0, 180))
    return np.stack([np.where(seen | (far == 0), -far, -1e9) for seen in (up, down)] + [-far / 2])


def t5_bucket(offset):
    """transformers, `_relative_position_bucket`, for one offset key - query, 32 buckets up to 128."""
    far = abs(offset)
    bucket = far if far < 8 else min(15, 8 + int(math.log(far / 8) / math.log(16) * 8))
    return bucket + (16 if offset > 0 else 0)


def cpb(w, delta):
    u = -np.stack([delta[0] / 2, delta[1] / 4], axis=-1)
    c = np.sign(u) * np.log2(1 + 8 * np.abs(u)) / 3
    return np.moveaxis(16 / (1 + np.exp(-network(w, c, relu, "cpb_mlp"))), -1, 0)


def fire(w, delta, extent):
    c, diagonal = np.exp(w["log_scale"]), math.hypot(extent[0] - 1, extent[1] - 1)
    share = np.log1p(c * np.hypot(*delta)) / max(np.log1p(c * diagonal), 1e-6)
    return np.moveaxis(network(w, share[..., None], relu), -1, 0)


def golden(p):
    """Three heads of two pairs each."""
    pairs = np.arange(6)
    turn = pairs * math.pi / ((1 + 5**0.5) / 2)
    speed = 100.0 ** (pairs % 2) * 2 / (15**0.5 - 1)
    angle = p[0, :, None] * np.sin(turn) * speed + p[1, :, None] * np.cos(turn) * speed
    return angle.reshape(-1, 3, 2).swapaxes(0, 1)


def sines(p):  # K = 3 frequencies an axis
    waves = [p[axis, :, None] * 10_000.0 ** (-np.arange(3) / 3) for axis in (1, 0)]
    return np.concatenate([wave(angle) for angle in waves for wave in (np.sin, np.cos)], axis=-1)


def features(w, p):
    angle = p.T @ w["freqs"]
    return network(w, np.concatenate([np.cos(angle), np.sin(angle)], -1) / (2 * angle.shape[-1]) ** 0.5, gelu)


# What each formula gives at places p (2, K), key - query delta (2, K, K), in numpy, with none of our code.
FORMULAS = {
    "sincos": lambda w, p, delta, extent: sines(p),
    "fourier": lambda w, p, delta, extent: features(w, p),
    "rope": lambda w, p, delta, extent: p.T[None],  # one pair an axis, one radian a patch
    "rope_mixed": lambda w, p, delta, extent: np.einsum("an,ahi->hni", p, w["freqs"]),
    "rope_golden": lambda w, p, delta, extent: golden(p),
    "rope_dinov3": lambda w, p, delta, extent: 2 * np.pi * (2 * (p.T + 0.5) / np.array(extent) - 1)[None],
    "alibi": lambda w, p, delta, extent: -np.array([2**-4.0, 2**-8.0, 2**-2.0])[:, None, None] * np.hypot(*delta),
    "lookhere": lambda w, p, delta, extent: lookhere_bias(delta),
    "t5": lambda w, p, delta, extent: sum(
        table.T[:, np.vectorize(t5_bucket, otypes=[int])(offset)]
        for table, offset in zip(w["relative_attention_bias"], delta, strict=True)
    ),
    "logcpb": lambda w, p, delta, extent: cpb(w, delta),
    "fire": lambda w, p, delta, extent: fire(w, delta, extent),
}


def some_places(extent, generator):
    """Two corners and three other places, as indices."""
    n = math.prod(extent)
    return torch.cat([torch.tensor([0, n - 1]), torch.randint(n, (3,), generator=generator)])


def all_grids():
    return [(h, w) for h in range(1, 21) for w in range(1, 21)]


@pytest.mark.parametrize("word", [*ENCODINGS, "learned(resize=dino)", "relative(resize=geometric)"])
@torch.no_grad()
def test_on_every_grid_some_places_get_what_they_get_alone(word):
    """On 400 grids the Signal at a few places is that of those places by themselves, and that of a formula in numpy."""
    encoding = drawn("logcpb(hidden=8)" if word == "logcpb" else word, SMALL)
    w, formula, generator = numbers(encoding), FORMULAS.get(word), torch.Generator().manual_seed(0)
    for extent in all_grids():
        index, at = some_places(extent, generator), Positions.grid(extent)
        part = at.take(index)
        whole, signal = encoding(part, at) if encoding.gives == {"bias"} else encoding(at), encoding(part)
        whole, signal = probed(whole), probed(signal)
        p = np.stack(np.divmod(index.numpy(), extent[1])).astype(float)  # (2, K): row-major, rows first
        expected = None if formula is None else formula(w, p, p[:, None, :] - p[:, :, None], extent)
        if signal.token is not None:
            close(whole.token[:, index], signal.token, 2e-6)
            found = signal.token[0]
        elif signal.q_rotation is not None:
            close(torch.stack(whole.q_rotation)[..., index, :], torch.stack(signal.q_rotation), 2e-6)
            found = torch.stack(signal.q_rotation)[:, 0]
            expected = None if expected is None else np.stack([np.cos(expected), np.sin(expected)])
        elif signal.bias:
            found = signal.bias[0].dense()[0]
            close(whole.bias[0].dense()[0][..., index], found, 1e-5)
        if expected is not None:
            assert found.shape == expected.shape
            np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=2e-5, err_msg=f"{word} on {extent}")


def rises(values):
    """Rising, but for the overshoot of a cubic at the edges."""
    return len(values) == 1 or bool((values.diff() > -0.02).all() and values[-1] > values[0])


def ramp(old, size, trained, offset=0.0, **how):
    """0, 1, ..., old - 1 resized, along one axis and in float64.

    Along the last one: with antialias and a last axis of 1, torch 2.15 gives its first value at every place.
    """
    values = torch.arange(old, dtype=torch.float64).view(1, 1, 1, old)
    if trained or (old == size and not offset):
        return values.flatten()
    if offset:  # DINO's factor, also of an axis that keeps its size while the other changes
        return F.interpolate(values, scale_factor=(1.0, (size + offset) / old), mode="bicubic").flatten()
    return F.interpolate(values, (1, size), align_corners=False, **how).flatten()


CUBIC = dict(mode="bicubic", antialias=True)
TABLES = {
    "learned": CUBIC,
    "learned(resize=plain)": dict(mode="bicubic"),
    "learned(resize=dino)": dict(offset=0.1),
    "windowed": CUBIC,
    "factorized": dict(mode="bilinear"),
}


@pytest.mark.parametrize(("word", "how"), TABLES.items(), ids=TABLES)
@torch.no_grad()
def test_on_every_grid_rows_of_a_table_are_rows_and_columns_columns(word, how):
    """A table that holds its row in channel 0 and its column in channel 1, resized: each moves along its axis alone."""
    encoding = build(word, SMALL).eval()
    for parameter in encoding.parameters():
        parameter.zero_()
    rows, cols = (axis.float() for axis in torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij"))
    if word == "factorized":
        encoding.tables[0][:, 0], encoding.tables[1][:, 1] = rows[:, 0], cols[0]
    else:
        encoding.pos_embed[0, ..., 0], encoding.pos_embed[0, ..., 1] = rows, cols
    if word == "windowed":
        encoding.pos_embed_window[0, ..., 2] = torch.arange(4.0)[:, None]
        encoding.pos_embed_window[0, ..., 3] = torch.arange(4.0)
    for h, w in all_grids():
        at = Positions.grid((h, w))
        token = encoding(at).token[0].view(h, w, 12)
        down, right = (ramp(old, size, (h, w) == (3, 5), **how) for old, size in ((3, h), (5, w)))
        assert rises(down)
        assert rises(right)
        close(token[..., 0].double(), down[:, None].expand(h, w), 1e-5)
        close(token[..., 1].double(), right.expand(h, w), 1e-5)
        if word == "windowed":
            close(token[..., 2], (torch.arange(h) % 4.0)[:, None].expand(h, w), 0.0)
            close(token[..., 3], (torch.arange(w) % 4.0).expand(h, w), 0.0)


@pytest.mark.parametrize("word", ["relative", "relative(resize=geometric)"])
@torch.no_grad()
def test_on_every_grid_row_offsets_of_a_table_are_row_offsets(word):
    """A table that holds its row offset in head 0 and its column offset in head 1: each head moves along its axis."""
    encoding = build(word, SMALL).eval()
    table = encoding.relative_position_bias_table
    table[0], table[1], table[2] = torch.arange(-2.0, 3)[:, None], torch.arange(-4.0, 5), 7.0
    for h, w in all_grids():
        at = Positions.grid((h, w)).take(torch.tensor([0, h * w - 1]))  # both ends of every axis
        bias = encoding(Positions.grid((h, w)), at).bias[0].dense()[0].view(3, h, w, 2)
        close(bias[0], bias[0, :, :1].expand(h, w, 2), 1e-5)
        close(bias[1], bias[1, :1].expand(h, w, 2), 1e-5)
        close(bias[2], torch.full((h, w, 2), 7.0), 2e-5)
        down, right = bias[0, :, 0], bias[1, 0]
        for along in (*down.unbind(1), *right.unbind(1)):
            assert rises(along), (h, w)
        close(down[0, 0], torch.tensor(0.0), 1e-5)
        close(down.flip(0, 1), -down, 1e-5)  # offsets of the last place are minus those of the first
        if word == "relative":
            ends = ramp(5, 2 * h - 1, False, mode="bicubic") - 2
            close(down[:, 0].double(), ends[h - 1 :], 1e-5)


# 5, 6. the text formulas -------------------------------------------------------------------------------------------


@few(max_examples=20)
@given(places=st.lists(st.integers(0, 5000), min_size=1, max_size=5))
def test_on_a_line_they_are_the_formulas_of_text(places):
    """Vaswani's sin and cos of p / 10000^(2i/D) at channels 2i and 2i+1; RoPE's p 10000^(-2i/d); ALiBi's -m |i - j|."""
    dims, at = Dims(width=32, heads=4, grid=(64,)), line(places)
    token = build("sincos", dims)(at).token[0]
    turn = build("rope", dims)(at).q_rotation
    bias = build("alibi", dims)(at).bias[0].dense()[0]
    for n, p in enumerate(places):
        for c in range(32):
            angle = p / 10_000 ** (2 * (c // 2) / 32)
            assert float(token[n, c]) == pytest.approx(math.cos(angle) if c % 2 else math.sin(angle), abs=1e-7)
        for i in range(4):
            angle = p * 10_000 ** (-2 * i / 8)
            found = float(turn.cos[0, 0, n, i]), float(turn.sin[0, 0, n, i])
            assert found == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-7)
        for m, other in enumerate(places):
            for head, slope in enumerate((2**-2, 2**-4, 2**-6, 2**-8)):
                assert float(bias[head, n, m]) == -slope * abs(p - other)


def sine_channels(layout, width, axes):
    """For each (axis, frequency), the channels of its sine and its cosine, as the table of the module states them."""
    count = width // (2 * axes)
    order = list(range(axes)) if layout in ("timm", "tatp22") else list(reversed(range(axes)))
    for slot, axis in enumerate(order):
        for k in range(count):
            if layout == "timm":
                yield axis, k, slot * count + k, (axes + slot) * count + k
            elif layout in ("mae", "big_vision"):
                yield axis, k, 2 * slot * count + k, (2 * slot + 1) * count + k
            else:
                yield axis, k, 2 * (slot * count + k), 2 * (slot * count + k) + 1


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@few(max_examples=5)
@given(step=st.tuples(*[st.floats(-50, 50, width=32)] * 3))
def test_sines_further_on_are_a_linear_map_of_sines_here(layout, axes, step):
    """token(p + k) = M(k) token(p): a rotation by k ω in the plane of each sine and cosine, whatever p is."""
    encoding = build(f"sincos(layout={layout})", Dims(24, 2, (4,) * axes)).double()
    step, count = torch.tensor(step[:axes], dtype=torch.float64), 24 // (2 * axes)
    moved = torch.zeros(24, 24, dtype=torch.float64)
    for axis, k, sine, cosine in sine_channels(layout, 24, axes):
        turn = float(step[axis]) * 10_000.0 ** (-k / (count - 1 if layout == "big_vision" else count))
        moved[sine, sine] = moved[cosine, cosine] = math.cos(turn)
        moved[sine, cosine], moved[cosine, sine] = math.sin(turn), -math.sin(turn)
    close(moved @ moved.T, torch.eye(24, dtype=torch.float64), 1e-12)
    here = Positions(10 * torch.randn(1, 6, axes, dtype=torch.float64), (4,) * axes)
    there = Positions(here.coords + step, here.extent)
    close(encoding(there).token, encoding(here).token @ moved.T, 1e-10)


# 7. order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODINGS)
@torch.no_grad()
def test_only_without_positions_is_a_vit_blind_to_the_order_of_patches(name):
    """Patches permuted: without positions the outputs are permuted and the logits equal; with any encoding neither."""
    torch.manual_seed(0)
    model = ViT(
        name, img_size=(8, 12), patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=8, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    randomise(model).eval()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    x = torch.randn(2, 3, 2, 4, 3, 4)  # (B, C, rows, 4, columns, 4)
    patches = x.permute(0, 1, 3, 5, 2, 4).flatten(4)
    y = patches[..., order].unflatten(4, (2, 3)).permute(0, 1, 4, 2, 5, 3)
    x, y = x.reshape(2, 3, 8, 12), y.reshape(2, 3, 8, 12)
    features = float((model.forward_features(x)[:, order] - model.forward_features(y)).abs().max())
    logits = float((model(x) - model(y)).abs().max())
    if model.position.gives or any(block.attn.position is not None for block in model.blocks):
        assert features > 1e-2
        assert logits > 1e-3
    else:
        assert features < 1e-4
        assert logits < 1e-4


# 8. far places -----------------------------------------------------------------------------------------------------

FAR = [256, 257, 258, 65_534, 65_535, 65_536]
WIDE = 65_537
SAME_FAR = {
    "none": "it gives nothing",
    "alibi(distance=squared)": "on such a line squares of places reach 1e9, whose unit in float32 is 64",
    "shaw": "its last vector takes all offsets beyond the clip",
    "irpe": "its last bucket takes all offsets from 4 on",
    "t5": "its last bucket takes all offsets beyond max_distance",
    "logcpb": "its network sees the logarithm of the offset, and the sigmoid at its end saturates in float32",
}


def cast(module, how):
    return {"half": module.half, "bfloat16": module.bfloat16, "float": module.float, "autocast": module.float}[how]()


@pytest.mark.parametrize("how", ["half", "bfloat16", "float", "autocast"])
@pytest.mark.parametrize("word", [name for name in ENCODINGS if name not in SAME_FAR])
@torch.no_grad()
def test_places_that_half_precision_cannot_tell_apart_stay_apart(word, how):
    """256, 257 and 65,535, 65,536 differ from their neighbours in every dtype, tables of that length included."""
    encoding = cast(drawn(word, Dims(8, 2, (WIDE,))), how)
    at = line(FAR, WIDE)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = tensors(encoding(line([300], WIDE), at)) if encoding.gives == {"bias"} else tensors(encoding(at))
    for field, tensor in found.items():
        assert tensor.dtype == torch.float32
        if field.endswith("sin"):
            continue  # with its cosine
        if field.endswith("cos"):
            tensor = torch.cat([tensor, found[field.replace("cos", "sin")]], dim=-1)
        rows = tensor.transpose(-1, -2) if field.startswith("bias") else tensor
        rows = rows.movedim(-2, 0).flatten(1)  # (places, ...)
        for n in range(len(FAR) - 1):
            assert not torch.equal(rows[n], rows[n + 1]), (field, FAR[n])


@torch.no_grad()
def test_t5s_last_bucket_takes_all_beyond():
    """Why t5 is not among them: 128 and more are one bucket; nearer offsets are not."""
    bias = drawn("t5", Dims(8, 2, (WIDE,)))(line([0], WIDE), line([4, 5, 127, 128, 257, 65_536], WIDE)).bias[0].dense()
    assert torch.equal(bias[..., 3:], bias[..., 3:4].expand(-1, -1, -1, 3))
    assert not torch.equal(bias[..., 0], bias[..., 1])


# 9. chance ---------------------------------------------------------------------------------------------------------

RANDOM = {
    "rope_dinov3": lambda: build("rope_dinov3(rescale=2, jitter=1.5, shift=0.3)", DIMS[2]),
    "jittered rope": lambda: Jitter(build("rope", DIMS[2])),
    "jittered sincos": lambda: Jitter(build("sincos", DIMS[2]), 0.25),
    "jittered alibi": lambda: Jitter(build("alibi", DIMS[2])),
    "jittered sum": lambda: Jitter(build("sincos+alibi", DIMS[2])),
}


def same(a, b):
    a, b = tensors(a), tensors(b)
    assert a
    assert a.keys() == b.keys()
    return all(torch.equal(a[field], b[field]) for field in a)


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_chance_is_for_training_and_follows_the_seed(make):
    """In evaluation two calls are equal; in training they differ, and are equal again for the same seed."""
    encoding, at = make(), Positions.grid(GRIDS[2])
    encoding.eval()
    state = torch.get_rng_state()
    assert same(encoding(at), encoding(at))
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"
    encoding.train()
    assert not same(encoding(at), encoding(at))
    torch.manual_seed(3)
    first = encoding(at)
    torch.manual_seed(3)
    assert same(first, encoding(at))


@pytest.mark.parametrize("name", ["rope_dinov3", "jittered rope"])
def test_a_forward_draws_once(name):
    """Queries and keys are moved together: the same places, handed in once or twice, get the same rotation."""
    encoding = RANDOM[name]().train()
    once = encoding(Positions.grid(GRIDS[2]))
    assert torch.equal(once.q_rotation.sin, once.k_rotation.sin)
    twice = encoding(Positions.grid(GRIDS[2]), Positions.grid(GRIDS[2]))
    assert torch.equal(twice.q_rotation.sin, twice.k_rotation.sin)


def test_jitter_moves_by_its_amount_and_no_further():
    """Slopes of ALiBi read off how far two tokens were moved: at most 2 · amount apart along each axis."""
    far = Jitter(build("alibi", Dims(8, 1, (7,))), 0.5).train()
    plain = -build("alibi", Dims(8, 1, (7,)))(line([0, 50])).bias[0].dense()[0, 0, 0, 1] * 256
    moved = torch.stack([-far(line([0, 50])).bias[0].dense()[0, 0, 0, 1] * 256 for _ in range(300)]) - plain
    assert 0.8 < float(moved.abs().max()) <= 1.0
    assert float(moved.min()) < -0.5 < 0.5 < float(moved.max())


@few(max_examples=60)
@given(seed=st.integers(0, 2**31), rescale=st.floats(1, 2), jitter=st.floats(1, 1.5), shift=st.floats(0, 0.3))
def test_dinov3_moves_places_by_an_affine_map_within_its_bounds(seed, rescale, jitter, shift):
    """Read from the angles of the slowest pairs: c' = f (c + s) on each axis, f and s within what the options allow."""
    encoding = build(f"rope_dinov3(rescale={rescale}, jitter={jitter}, shift={shift})", Dims(16, 2, (3, 5))).double()
    at = Positions.grid((3, 5))
    torch.manual_seed(seed)
    turn = encoding.train()(at).q_rotation
    angle = torch.atan2(turn.sin, turn.cos)[0, 0]  # (N, 4): two pairs an axis, periods 1 and 10
    common = []
    for axis, pair in ((0, 1), (1, 3)):
        moved = angle[:, pair] * 10 / (2 * math.pi)
        c = 2 * (at.coords[0, :, axis].double() + 0.5) / at.extent[axis] - 1
        slope, offset = np.polyfit(c.numpy(), moved.numpy(), 1)
        close(moved, slope * c + offset, 1e-6)
        assert 1 / (rescale * jitter) - 1e-6 <= slope <= rescale * jitter + 1e-6
        assert abs(offset / slope) <= shift + 1e-6
        common.append(slope)
    assert jitter**-2 - 1e-6 <= common[0] / common[1] <= jitter**2 + 1e-6, "rescale is one factor for all axes"


def test_dinov3s_bounds_are_reached_in_both_directions():
    """Over many draws factors come close to 1/2 and 2, and shifts close to ±0.3, axes on their own."""
    encoding, at = build("rope_dinov3(rescale=2, shift=0.3)", DIMS[2]), Positions.grid(GRIDS[2])
    torch.manual_seed(0)
    ends = []
    for _ in range(300):
        c = 2 * (encoding.perturb(at)(at).coords[0].double() + 0.5) / torch.tensor(at.extent) - 1
        factor = (c[-1] - c[0]) / (2 * (1 - 1 / torch.tensor(at.extent)))
        ends.append(torch.cat([factor, (c[-1] + c[0]) / 2 / factor]))
    ends = torch.stack(ends)  # (draws, [two factors, two shifts])
    close(ends[:, 0], ends[:, 1], 1e-5)
    assert float(ends[:, 0].min()) == pytest.approx(0.5, abs=0.02)
    assert float(ends[:, 0].max()) == pytest.approx(2, abs=0.04)
    for shift in ends[:, 2:].unbind(1):
        assert float(shift.min()) == pytest.approx(-0.3, abs=0.02)
        assert float(shift.max()) == pytest.approx(0.3, abs=0.02)
    assert abs(float(torch.corrcoef(ends[:, 2:].T)[0, 1])) < 0.2


@torch.no_grad()
def test_jitter_hands_on_a_bias_term_that_is_not_dense():
    """A wrapped encoding's own term (LookHere's, squared ALiBi's) arrives, moved places and prefix included."""
    for word in ("lookhere", "alibi(distance=squared)"):
        inner = build(word, DIMS[2])
        at = Positions.grid(GRIDS[2]).with_prefix(1)
        assert same(Jitter(inner).eval()(at), inner.eval()(at))
        bias = Jitter(inner).train()(at).bias[0].dense()
        assert not bias[:, :, 0].any()
        assert not torch.equal(bias, inner(at).bias[0].dense())
