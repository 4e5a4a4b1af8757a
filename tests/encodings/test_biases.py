"""Penalties by distance and symmetric tables: each number against a formula for one pair, and against the originals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from timm.models import levit, tiny_vit

from tests.helpers import within
from vit2dpe import ConfigError, Dims, Positions, Swin, ViT, build, to_timm, use_policy
from vit2dpe.attention.kernels import flex
from vit2dpe.encodings.makers import makers
from vit2dpe.positions import DISTANCES
from vit2dpe.signal import Distance, Table
from vit2dpe.testing import PROMISES, compiles_whole, randomise

HEADS = 3
GRIDS = {1: (7,), 2: (3, 5), 3: (2, 3, 4)}
WORDS = ["kerple", *(f"kerple({o})" for o in ("form=power", "form=power, distance=manhattan", "distance=squared"))]
WORDS += [f"alibi(slopes={s}, distance={d})" for s in ("learned", "axes") for d in DISTANCES]
close = within(2e-6, any_dtype=True)


def made(word, grid, seed=0):
    torch.manual_seed(seed)
    return randomise(build(word, Dims(8 * HEADS, HEADS, grid))).eval()


def between(at, scale=0.7):
    """Places that are no whole numbers."""
    return Positions(at.coords * scale + 0.2, at.extent, at.prefix)


def length(apart, kind):
    sizes = [abs(x) for x in apart]
    square = sum(x * x for x in sizes)
    return {"euclidean": square**0.5, "squared": square, "manhattan": sum(sizes), "chebyshev": max(sizes)}[kind]


def formula(encoding, head, apart):
    """The bias of one pair, by Python's floats."""
    if hasattr(encoding, "log_r1"):
        r1, raw, far = math.exp(encoding.log_r1[head]), float(encoding.raw_r2[head]), length(apart, encoding.distance)
        return (
            -r1 * math.log(1 + math.exp(raw) * far)
            if encoding.form == "log"
            else -r1 * far ** (2 / (1 + math.exp(-raw)))
        )
    if encoding.log_slopes is None:
        return -encoding.slopes[head] * length(apart, encoding.distance)
    slopes = encoding.log_slopes[head].double().exp().tolist()
    if not isinstance(slopes, list):
        return -slopes * length(apart, encoding.distance)
    if encoding.distance == "squared":
        return -sum(m * x * x for m, x in zip(slopes, apart, strict=True))
    return -length([m * x for m, x in zip(slopes, apart, strict=True)], encoding.distance)


@pytest.mark.parametrize("axes", GRIDS)
@pytest.mark.parametrize("word", [*WORDS, *(f"alibi(distance={kind})" for kind in DISTANCES)])
@torch.no_grad()
def test_each_pair_gets_its_formula(word, axes):
    """Whole places and others, behind a prefix, on grids that are not square; queries need not be the keys."""
    encoding, at = made(word, GRIDS[axes]), Positions.grid(GRIDS[axes]).with_prefix(2)
    for q, k in ((at, at), (between(at), between(at)), (at.take(torch.tensor([4, 1])).with_prefix(0), at)):
        places = [one.coords[0].double().tolist() for one in (q, k)]
        expected = torch.zeros(1, HEADS, q.prefix + len(places[0]), k.prefix + len(places[1]), dtype=torch.float64)
        for head, (i, p), (j, o) in itertools.product(range(HEADS), enumerate(places[0]), enumerate(places[1])):
            apart = [x - y for x, y in zip(p, o, strict=True)]
            expected[0, head, q.prefix + i, k.prefix + j] = formula(encoding, head, apart)
        (term,) = encoding(q, k).bias
        close(term.dense(), expected, 2e-6 * float(expected.abs().max().clamp(min=1)))


@pytest.mark.parametrize("word", WORDS)
def test_every_option_keeps_the_contract(word):
    """But for the compiler, which `kerple` and `alibi` are given as they are."""
    for make, dims in makers(word, {2: GRIDS[2]}):
        for promise in PROMISES:
            if promise is not compiles_whole:
                torch.manual_seed(0)
                promise(make, dims)


@pytest.mark.parametrize("word", ["kerple", "kerple(form=power)", "alibi(slopes=axes, distance=chebyshev)"])
def test_a_learned_penalty_is_a_table_on_a_grid_and_a_formula_elsewhere(word):
    """The same numbers and gradients both ways: by offset, and by pair."""
    encoding, at = made(word, (4, 6)).double(), Positions.grid((4, 6)).with_prefix(1)
    unknown = Positions(at.coords, at.extent, at.prefix)  # the same places, not known to be whole
    (table,), (pairs,) = encoding(at).bias, encoding(unknown).bias
    assert (type(table), type(pairs)) == (Table, Distance)
    weights, parameters = torch.randn(1, HEADS, 25, 25, dtype=torch.float64), list(encoding.parameters())
    close(table.dense(), pairs.dense(), 1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad((t.dense() * weights).sum(), parameters) for t in (table, pairs)), strict=True
    ):
        close(ours, theirs, 1e-10)
    assert len(flex.tensors([pairs])) >= 1  # which FlexAttention does not train
    assert type(encoding(at, Positions.grid((4, 7))).bias[0]) is Distance  # of another extent


@pytest.mark.parametrize("form", ["log", "power"])
def test_kerple_starts_where_the_original_does(form):
    torch.manual_seed(0)
    r1, r2 = (x.detach() for x in build(f"kerple(form={form})", Dims(4096, 1024, (3, 5))).numbers())
    for r, most in ((r1, 2 if form == "log" else 1), (r2, 1 if form == "log" else 2)):
        assert float(r.min()) >= 0.0099
        assert float(r.max()) <= most
        assert abs(float(r.mean()) - most / 2) < 0.05
    with torch.no_grad():
        encoding = randomise(build(f"kerple(form={form})", Dims(24, 3, (3, 5))))
        encoding.raw_r2.fill_(50.0)
        assert form == "log" or float(encoding.numbers()[1].max()) <= 2  # no gradient step leaves the bound


def test_learned_slopes_start_as_the_fixed_ones():
    at = Positions.grid((3, 5))
    for kind in DISTANCES:
        fixed = build(f"alibi(distance={kind})", Dims(24, 6, (3, 5)))(at).bias[0].dense()
        learned = build(f"alibi(slopes=learned, distance={kind})", Dims(24, 6, (3, 5)))(at).bias[0].dense()
        close(learned, fixed, 1e-6)
    axes = build("alibi(slopes=axes)", Dims(24, 6, (3, 5)))
    assert axes.log_slopes.shape == (6, 2)
    close(axes(at).bias[0].dense(), build("alibi", Dims(24, 6, (3, 5)))(at).bias[0].dense(), 1e-6)


@pytest.mark.parametrize("word", ["kerple", "alibi(slopes=axes)"])
@torch.no_grad()
def test_interpolation_scales_the_places(word):
    model = ViT(word, img_size=(24, 40), patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=2)
    encoding = model.position if word.startswith("alibi") else model.blocks[0].attn.position
    at = Positions.grid((6, 10))
    with use_policy(model, "interpolate"):
        found = encoding(at).bias[0].dense()
    close(found, encoding(Positions((at.coords + 0.5) / 2 - 0.5, (3, 5))).bias[0].dense(), 1e-6)


@pytest.mark.parametrize(
    ("word", "message"), [("alibi(slopes=axes)", "2 axes.*3"), ("alibi(slopes=axes, distance=squared)", "2 axes.*3")]
)
def test_slopes_of_each_axis_are_for_so_many(word, message):
    with pytest.raises(ValueError, match=message):
        build(word, Dims(24, 3, (3, 5)))(Positions.grid((2, 3, 4)))


# symmetric tables --------------------------------------------------------------------------------------------------


def originals(grid):
    """Attentions of timm with a table of their own: of LeViT, its shrinking one, and of TinyViT."""
    stride = Positions.grid(grid).take(
        torch.tensor([r * grid[1] + c for r in range(0, grid[0], 2) for c in range(0, grid[1], 2)])
    )
    yield levit.Attention(24, 8, num_heads=HEADS, resolution=grid), Positions.grid(grid)
    yield levit.AttentionDownsample(24, 24, 8, num_heads=HEADS, stride=2, resolution=grid), stride
    yield tiny_vit.Attention(24, 8, num_heads=HEADS, resolution=grid), Positions.grid(grid)


@pytest.mark.parametrize("grid", [(3, 5), (6, 4)])
def test_a_symmetric_table_is_that_of_levit_and_tinyvit(grid):
    """Their weights go in as they are and come out as they were; biases and gradients are equal."""
    for theirs, queries in originals(grid):
        torch.nn.init.normal_(theirs.attention_biases)
        ours = build("relative(symmetric=true)", Dims(24, HEADS, grid))
        ours.load_state_dict({"attention_biases": theirs.attention_biases.detach()})
        assert torch.equal(ours.state_dict()["attention_biases"].flatten(1), theirs.attention_biases)
        found, expected = (
            ours(queries, Positions.grid(grid)).bias[0].dense()[0],
            theirs.get_attention_biases("cpu"),
        )
        assert torch.equal(found, expected)
        weights = torch.randn_like(expected)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        close(ours.attention_biases.grad.flatten(1), theirs.attention_biases.grad, 1e-5)


@torch.no_grad()
def test_a_symmetric_table_at_another_size():
    """It stays symmetric, the entry of offset 0 stays; a model that is given another grid computes the same."""
    ours, at = made("relative(symmetric=true)", (3, 5)), Positions.grid((6, 7))
    before = ours(at).bias[0].dense()
    assert torch.equal(before.diagonal(dim1=-2, dim2=-1), ours.attention_biases[None, :, 0, 0, None].expand(1, -1, 42))
    close(before, before.mT, 1e-6)
    ours.set_grid((6, 7))
    assert ours.attention_biases.shape == (HEADS, 6, 7)
    close(ours(at).bias[0].dense(), before, 1e-6)


def test_other_models_have_no_symmetric_tables():
    """timm's models of relative tables tell offsets apart by their sign."""
    size = dict(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(1,), num_heads=(3,), num_classes=2)
    for model in (
        Swin("relative(symmetric=true)", **size),
        ViT("relative(symmetric=true)", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3),
    ):
        with pytest.raises(ConfigError, match="sign"):
            to_timm(model)
