"""Contextual biases against their originals, with random weights and on grids that are not square."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.mvitv2 import cal_rel_pos_type
from timm.models.vision_transformer_sam import Attention as TimmSam
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deberta_v2.configuration_deberta_v2 import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from tests.helpers import MICRO, randn, within
from vit2dpe import ConfigError, Dims, Positions, Signal, ViT, attend, build
from vit2dpe.attention import Attention
from vit2dpe.attention.contract import contract
from vit2dpe.contextual import Contextual
from vit2dpe.encodings import IRPE, Decomposed, Shaw
from vit2dpe.encodings.makers import makers
from vit2dpe.testing import check_encoding, randomise

HEADS, WIDTH = 3, 8
close = within(1e-5, of_the_largest=True)


def ours_of(theirs, grid):
    """Our attention and encoding with the weights of a SAM's attention."""
    layer, encoding = Attention(HEADS * WIDTH, HEADS), Decomposed(WIDTH, HEADS, grid)
    state = dict(theirs.state_dict())
    encoding.load_state_dict({name: state.pop(name) for name in ("rel_pos_h", "rel_pos_w")})
    layer.load_state_dict(state)
    return layer, encoding


def sam(kind, grid):
    torch.manual_seed(0)
    if kind == "timm":
        return randomise(TimmSam(HEADS * WIDTH, HEADS, use_rel_pos=True, input_size=grid))
    config = SamVisionConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, image_size=64, patch_size=16)
    config._attn_implementation = "eager"
    theirs = SamVisionAttention(config, window_size=0)
    for name, size in zip(("rel_pos_h", "rel_pos_w"), grid, strict=True):
        setattr(theirs, name, torch.nn.Parameter(torch.zeros(2 * size - 1, WIDTH)))
    return randomise(theirs)


@pytest.mark.parametrize("at", [(3, 5), (6, 4)], ids=["trained size", "another"])
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_sams_attention(kind, at):
    """Outputs and gradients; at another size tables are resized as SAM does."""
    theirs = sam(kind, (3, 5))
    layer, encoding = ours_of(theirs, (3, 5))
    x = randn(2, *at, HEADS * WIDTH)
    out = theirs(x) if kind == "timm" else theirs(x)[0]
    mine = layer(x.flatten(1, 2), encoding(Positions.grid(at))).view(2, *at, -1)
    close(mine, out)
    plain = layer(x.flatten(1, 2)).view(2, *at, -1)
    assert float((plain - out).detach().abs().max()) > 0.1, "the bias is seen"
    for one in (mine, out):
        one.sin().sum().backward()
    for name in ("rel_pos_h", "rel_pos_w"):
        close(getattr(encoding, name).grad, getattr(theirs, name).grad)
    close(layer.qkv.weight.grad, theirs.qkv.weight.grad)


@pytest.mark.parametrize(("pooled", "cls"), [(1, True), (2, False), (2, True)])
def test_mvitv2s_products(pooled, cls):
    """Keys that stand for 2 x 2 tokens are as far from queries as the original has it: at the second of each two."""
    grid, encoding = (4, 6), randomise(Decomposed(WIDTH, HEADS, (4, 6)))
    keys = tuple(size // pooled for size in grid)
    here = Positions.grid(grid).with_prefix(int(cls))
    there = here
    if pooled > 1:
        places = Positions.grid(keys).coords * pooled + pooled - 1
        there = Positions(places, grid, int(cls))
    q, k = (randn(2, HEADS, at.coords.shape[1] + at.prefix, WIDTH, seed=i) for i, at in enumerate((here, there)))
    theirs = cal_rel_pos_type(torch.zeros(2, HEADS, q.shape[2], k.shape[2]), q, cls, list(grid), list(keys),
                              encoding.rel_pos_h, encoding.rel_pos_w)  # fmt: skip
    signal = encoding(here, there)
    close(contract(signal, q, k).bias[0].dense(), theirs)
    weights = (q @ k.mT * WIDTH**-0.5 + theirs).softmax(-1)
    v = randn(2, HEADS, k.shape[2], WIDTH, seed=7)
    close(attend(q, k, v, signal), weights @ v)


@pytest.mark.parametrize("reach", [2, 8])
def test_shaws_equation(reach):
    """e_ij = q_i (k_j + a_ij) / sqrt(Dh), a_ij = w[clip(j - i)], on a line, pair by pair."""
    n, encoding = 7, randomise(Shaw(WIDTH, HEADS, axes=1, clip=reach))
    assert encoding.relative_key.shape == (2 * reach + 1, WIDTH)
    q, k, v = (randn(2, HEADS, n, WIDTH, seed=i) for i in range(3))
    rows = [[encoding.relative_key[max(-reach, min(reach, j - i)) + reach] for j in range(n)] for i in range(n)]
    a = torch.stack([torch.stack(row) for row in rows])  # (N, N, Dh)
    weights = (torch.einsum("bhid,bhijd->bhij", q, k[:, :, None] + a) / math.sqrt(WIDTH)).softmax(-1)
    close(attend(q, k, v, encoding(Positions.sequence(n))), weights @ v)


def piecewise(x, alpha, beta, gamma):
    """iRPE's equation 18, for one offset."""
    if abs(x) <= alpha:
        return x
    far = round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(1, x)) * min(far, int(beta))


@pytest.mark.parametrize("ratio", [1.9, 0.5, 3.2])
def test_irpes_buckets_and_product(ratio):
    """Rows and columns have their own buckets, of query minus key; far beyond the end too."""
    grid, encoding = (3, 40), randomise(IRPE(WIDTH, HEADS, ratio=ratio))
    at, last = Positions.grid(grid), int(2 * ratio)
    assert encoding.lookup_table_weight.shape == (1, WIDTH, (2 * last + 1) ** 2)
    q = randn(1, HEADS, 120, WIDTH)
    found = contract(encoding(at), q, None).bias[0].dense()
    step = {x: piecewise(x, ratio, 2 * ratio, 8 * ratio) + last for x in range(-39, 40)}
    for i, j in ((0, 119), (119, 0), (3, 4), (45, 3), (80, 12), (17, 17)):
        (y, x), (v, u) = divmod(i, 40), divmod(j, 40)
        vector = encoding.lookup_table_weight[0, :, step[y - v] * (2 * last + 1) + step[x - u]]
        close(found[0, :, i, j], q[0, :, i] @ vector / math.sqrt(WIDTH))
    if ratio == 1.9:  # by hand: 1.9 + 1.9 ln(x / 1.9) / ln 8 is 1.95, 2.32, 2.58 at 2, 3, 4
        assert encoding.bucket(torch.tensor([-40, -4, -3, -2, -1, 0, 1, 2, 3, 4, 40])).tolist() == [
            0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 6]  # fmt: skip


@pytest.mark.parametrize("buckets", [-1, 8])
def test_debertas_two_products(buckets):
    """Content to position is a term of queries, position to content one of keys, with one entry for each pair."""
    torch.manual_seed(0)
    relative = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16)
    config = DebertaV2Config(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, position_buckets=buckets, **relative)
    theirs, n = randomise(DisentangledSelfAttention(config)).eval(), 30
    span = theirs.pos_ebd_size
    embeddings = randn(2 * span, HEADS * WIDTH, seed=3)
    q, k = (randn(1, HEADS, n, WIDTH, seed=i) for i in range(2))
    given = build_relative_position(q, k, bucket_size=buckets, max_position=16)
    expected = theirs.disentangled_attention_bias(q[0], k[0], given, embeddings, scale_factor=3)
    vectors = [projection(embeddings).unflatten(-1, (HEADS, WIDTH)).transpose(0, 1)
               for projection in (theirs.pos_key_proj, theirs.pos_query_proj)]  # fmt: skip
    offsets = torch.cat([given[0, 0, 1:].flip(0), given[0, :, 0]])  # those of 1 - n to n - 1
    entries, at = (offsets + span).clamp(0, 2 * span - 1), Positions.sequence(n)
    terms = [Contextual((a,), (entries,), at, at, HEADS, 1 / math.sqrt(3 * WIDTH), of_keys=bool(i))
             for i, a in enumerate(vectors)]  # fmt: skip
    one, two = (term.dense() for term in contract(Signal(bias=tuple(terms)), q, k).bias)
    close((one + two)[0], expected)


@pytest.mark.parametrize("share", [False, True])
def test_debertas_attention_is_shaw_of_both_sides(share):
    """Outputs and gradients of the whole attention with its weights, far beyond the clip."""
    torch.manual_seed(0)
    relative = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=4, share_att_key=share)
    config = DebertaV2Config(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, position_buckets=-1, **relative)
    theirs, n = randomise(DisentangledSelfAttention(config)).eval(), 11
    span, x = theirs.pos_ebd_size, randn(2, n, HEADS * WIDTH)
    embeddings = randn(2 * span, HEADS * WIDTH, seed=3)
    mask = torch.ones(2, 1, n, n)
    expected, _ = theirs(x, mask, rel_embeddings=embeddings)

    layer = Attention(HEADS * WIDTH, HEADS, scale=(3 * WIDTH) ** -0.5)
    encoding = build(f"shaw(sides=qk, clip={span})", Dims(HEADS * WIDTH, HEADS, (n,)))
    assert isinstance(encoding, Shaw)
    keys, queries = (theirs.key_proj, theirs.query_proj) if share else (theirs.pos_key_proj, theirs.pos_query_proj)
    row = (torch.arange(span, -span - 1, -1) + span).clamp(max=2 * span - 1)  # of i - j, where ours has j - i
    with torch.no_grad():
        for name, part in dict(relative_key=keys, relative_query=queries).items():
            getattr(encoding, name).copy_(part(embeddings)[row].unflatten(-1, (HEADS, WIDTH)).transpose(0, 1))
        parts = (theirs.query_proj, theirs.key_proj, theirs.value_proj)
        layer.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        layer.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        layer.proj.weight.copy_(torch.eye(HEADS * WIDTH))
        layer.proj.bias.zero_()
    close(layer(x, encoding(Positions.sequence(n))), expected)
    assert (layer(x, Shaw(WIDTH, HEADS, axes=1)(Positions.sequence(n))) - expected).abs().max() > 0.1
    if not share:
        for out in (expected, layer(x, encoding(Positions.sequence(n)))):
            out.sin().sum().backward()
        close(layer.qkv.weight.grad, torch.cat([part.weight.grad for part in parts]))
        near = encoding.relative_query.grad.transpose(0, 1).flatten(1)  # (2 K + 1, H Dh)
        per_row = torch.zeros(2 * span, HEADS * WIDTH).index_add(0, row, near)
        close(theirs.pos_query_proj.weight.grad, per_row.mT @ embeddings)


@pytest.mark.parametrize("sides", ["q", "qk"])
def test_sides_keep_the_contract(sides):
    check_encoding(lambda d: Shaw(d.head_dim, d.heads, axes=d.axes, clip=2, sides=sides), axes=(2,))


@pytest.mark.parametrize("word", ["shaw", "irpe", "decomposed"])
def test_what_has_no_gradient_claims_none(word):
    """torch's FlopCounterMode, which follows modules, counts a forward without gradients."""
    model = ViT(word, img_size=(16, 24), patch_size=8, **MICRO)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 24))
    assert counter.get_total_flops() > 0


def test_values_that_cannot_be_are_refused():
    dims = Dims(24, 3, (3, 5))
    with pytest.raises(ConfigError, match=r"unknown sides of shaw .kq.*qk"):
        build("shaw(sides=kq)", dims)
    for word, came in (("shaw(clip=0)", "clip of at least 1.*clip=0"), ("irpe(ratio=0.4)", "0.5 <= ratio.*0.4")):
        with pytest.raises(ConfigError, match=came):
            build(word, dims)
    with pytest.raises(ConfigError, match=r"one to three axes.*\(2, 2, 2, 2\)"):
        build("decomposed", Dims(24, 3, (2, 2, 2, 2)))


def test_one_that_is_built_is_checked_at_its_sizes():
    """Heads and their width are read from what it gives."""
    built = Shaw(6, 2)
    (_, dims), *more = makers(built, {1: (7,), 2: (3, 5)}, skip=True)
    assert (dims.heads, dims.head_dim, dims.grid, more) == (2, 6, (3, 5), [])
