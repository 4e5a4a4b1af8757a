"""Ours are transformers' DINOv3, Swin V2, T5, BLOOM, Llama and ViT-MAE, and the policies its RoPE scaling.

Tolerances: rotated queries of about 1 to 5e-6 and scaled angles likewise (float32 angles there); buckets to the bit.
"""

import math

import pytest
import torch
from transformers import DINOv3ViTConfig, LlamaConfig, Swinv2Config, ViTMAEConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.llama import modeling_llama as llama
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from tests.encodings.originals import exchanged, halves, same, turned
from tests.helpers import randn
from vit2dpe import Positions
from vit2dpe.encodings import Alibi, AxialRoPE, CentredRoPE, LearnedTable, LogCPB, T5Bias
from vit2dpe.resolution.policies import NTK, Interpolate, Llama3, LogTemperature, LongRoPE, YaRN, YaRNTemperature

HEADS, WIDTH, ATOL = 2, 16, 5e-6


# --- images


@pytest.mark.parametrize("extent", [(3, 7), (8, 5)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_centred_in_evaluation_is_dinov3(extent, prefix):
    """Different on purpose: half-split pairs there, (2i, 2i+1) here, so channels are permuted."""
    config = DINOv3ViTConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, patch_size=4)
    rope, ours = dinov3.DINOv3ViTRopePositionEmbedding(config).eval(), CentredRoPE(WIDTH).eval()
    cos, sin = rope(torch.zeros(1, 3, *(4 * size for size in extent)))
    x, at = randn(1, HEADS, prefix + math.prod(extent), WIDTH), Positions.grid(extent).with_prefix(prefix)
    theirs, _ = dinov3.apply_rotary_pos_emb(halves(x), halves(x), cos, sin)
    same(turned(x, ours(at).q_rotation), theirs, turned(x, ours(exchanged(at)).q_rotation), ATOL)


@pytest.mark.parametrize(("window", "trained"), [((3, 5), (0, 0)), ((6, 4), (3, 8)), ((4, 7), (4, 7))])
def test_logcpb_is_swin_v2s(window, trained):
    """With queries of 0 the weights are the softmax of the bias. (0, 0) there is "the window itself"."""
    config = Swinv2Config(attention_probs_dropout_prob=0.0)
    theirs = Swinv2SelfAttention(config, HEADS * WIDTH, HEADS, window, trained).eval()
    here = trained if any(trained) else window
    ours, wrong, at = LogCPB(HEADS, here), LogCPB(HEADS, here[::-1]), Positions.grid(window)
    for encoding in (ours, wrong):
        encoding.cpb_mlp.load_state_dict(theirs.continuous_position_bias_mlp.state_dict())
    with torch.no_grad():
        theirs.query.weight.zero_()
        theirs.query.bias.zero_()
        theirs.continuous_position_bias_mlp[2].weight.mul_(3)  # a bias that is far from flat
        for encoding in (ours, wrong):
            encoding.cpb_mlp[2].weight.mul_(3)
        weights = theirs(torch.zeros(1, math.prod(window), HEADS * WIDTH), output_attentions=True)[1]
        mine, other = (e(p).bias[0].dense().softmax(-1) for e, p in ((ours, at), (wrong, exchanged(at))))
    same(mine, weights, other, 1e-6)


@pytest.mark.parametrize("new", [(9, 11), (3, 4), (5, 8)])
def test_plain_resize_of_a_learned_table_is_vit_maes(new):
    """Square source, which the original guesses from a square root. 2e-5: float32, axis by axis here."""
    table = ViTMAEEmbeddings(ViTMAEConfig(hidden_size=WIDTH, image_size=10, patch_size=2))
    table.position_embeddings.data.copy_(randn(1, 26, WIDTH))
    theirs = table.interpolate_pos_encoding(torch.zeros(1, 1 + math.prod(new), WIDTH), 2 * new[0], 2 * new[1])
    at, ours = Positions.grid(new), LearnedTable(WIDTH, (5, 5), resize="plain")
    ours.pos_embed.data.copy_(table.position_embeddings[:, 1:].unflatten(1, (5, 5)))
    with torch.no_grad():
        same(ours(at).token, theirs[:, 1:], ours(exchanged(at)).token, 2e-5)


# --- text: one axis, so what could be exchanged is the direction


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (32, 64), (8, 20), (64, 256), (6, 128), (16, 17)])
def test_t5_buckets(bidirectional, buckets, reach):
    offset = torch.arange(-300, 301)
    ours = T5Bias(1, axes=1, buckets=buckets, max_distance=reach, bidirectional=bidirectional)
    theirs = T5Attention._relative_position_bucket(offset, bidirectional, buckets, reach)
    assert torch.equal(ours.bucket(offset), theirs)
    assert not torch.equal(ours.bucket(-offset), theirs)


def test_t5_bias_has_the_key_before_the_query():
    """bucket(key - query), looked up in T5's table: (buckets, heads) there, a leading 1 for the axis here."""
    ours, n = T5Bias(HEADS, axes=1), 150
    place = torch.arange(n)
    buckets = T5Attention._relative_position_bucket(place[None, :] - place[:, None])
    theirs = ours.relative_attention_bias[0][buckets].permute(2, 0, 1)[None]
    bias = ours(Positions.sequence(n)).bias[0].dense()
    assert torch.equal(bias, theirs)
    assert not torch.equal(bias.transpose(-1, -2), theirs)


@pytest.mark.parametrize("heads", range(1, 21))
def test_alibi_is_blooms_in_causal_attention(heads):
    """BLOOM's bias is m k for a key at k, ours m (k - q) before q: a row differs by a number, a softmax does not."""
    n = 12
    theirs = build_alibi_tensor(torch.ones(1, n), heads, torch.float32).view(1, heads, 1, n).expand(-1, -1, n, -1)
    ours = Alibi(heads)(Positions.sequence(n)).bias[0].dense()
    shift = theirs.diagonal(dim1=-2, dim2=-1)[..., None]  # at the key that is the query
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    torch.testing.assert_close(ours[..., causal], (theirs - shift)[..., causal], rtol=1e-6, atol=0)
    assert not torch.allclose(ours[..., ~causal], (theirs - shift)[..., ~causal])


def rope(kind="default", base=10_000.0, width=WIDTH, length=64, **parameters):
    return LlamaConfig(
        hidden_size=HEADS * width,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
    )


@pytest.mark.parametrize("base", [100.0, 10_000.0, 500_000.0])
def test_axial_on_a_line_is_llamas(base):
    """Different on purpose: half-split pairs there, (2i, 2i+1) here, so channels are permuted."""
    n, start = 40, 7
    x, at, ours = randn(1, HEADS, n, WIDTH), Positions.sequence(n, start), AxialRoPE(WIDTH, axes=1, base=base)
    cos, sin = llama.LlamaRotaryEmbedding(rope(base=base))(x, torch.arange(start, start + n)[None])
    theirs, _ = llama.apply_rotary_pos_emb(halves(x), halves(x), cos, sin)
    back = Positions(-at.coords, at.extent)
    same(turned(x, ours(at).q_rotation), theirs, turned(x, ours(back).q_rotation), 1e-5)


def test_the_default_base_on_a_line_is_llamas():
    assert AxialRoPE(WIDTH, axes=1).base == LlamaConfig().rope_parameters["rope_theta"]


def scaled(config, seq_len=None):
    """Their frequencies, (Dh/2,), and factor on queries and keys."""
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu", seq_len=seq_len)


def ours_under(policy, length, width=WIDTH, base=10_000.0):
    """(N, Dh/2) angles of all places of a line."""
    encoding = AxialRoPE(width, axes=1, base=base)
    at = Positions.sequence(length)
    return encoding.angle(at if policy is None else policy.place(at)).resolve(policy, at.extent, 0)[0, 0]


def check(ours, frequencies, plain):
    theirs = torch.arange(len(ours), dtype=torch.float64)[:, None] * frequencies.double()
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=0)
    assert (plain - theirs).abs().max() > 0.1


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.5])
def test_linear_scaling_is_interpolation_by_the_corner(factor):
    length = 24
    longer = round(factor * length)
    frequencies, heat = scaled(rope("linear", length=length, factor=factor))
    assert heat == 1.0
    policy = Interpolate((length,), align="corner")
    check(ours_under(policy, longer), frequencies, ours_under(None, longer))
    by_the_edges = ours_under(Interpolate((length,)), longer)  # the default
    assert (by_the_edges - ours_under(policy, longer)).abs().max() > 0.1


@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("longer", [24, 30, 96])
def test_dynamic_ntk_is_ntk(width, longer):
    """With factor 1, which makes the scale longer / length; for other factors f it is f longer / length - (f - 1)."""
    length = 24
    frequencies, heat = scaled(rope("dynamic", width=width, length=length, factor=1.0), longer)
    assert heat == 1.0
    ours, plain = ours_under(NTK((length,)), longer, width), ours_under(None, longer, width)
    if longer == length:
        assert torch.equal(ours, plain)
        torch.testing.assert_close(ours[1], frequencies.double(), rtol=3e-6, atol=0)
    else:
        check(ours, frequencies, plain)
    frequencies, _ = scaled(rope("dynamic", width=width, length=length, factor=3.0), 40)
    check(ours_under(NTK((length,)), 3 * 40 - 2 * length, width), frequencies, ours_under(None, 72, width))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_an_image_is_scaled_by_axis(kind):
    """Beyond the original, which has one axis: rows and columns are each scaled as a line of their own length."""
    train, extent, named = (24, 10), (48, 30), dict(beta_fast=1.5, beta_slow=0.2)
    factors = [long / length for long, length in zip(extent, train, strict=True)]
    angles, at = [], Positions.grid(extent)
    for axis, (length, factor) in enumerate(zip(train, factors, strict=True)):
        more = dict(original_max_position_embeddings=length, truncate=False, **named) if kind == "yarn" else {}
        config = rope(kind, base=100.0, length=length, factor=1.0 if kind == "dynamic" else factor, **more)
        angles.append(at.coords[0, :, axis, None] * scaled(config, extent[axis])[0])
    theirs, got = torch.cat(angles, -1), []
    for place, size in ((at, train), (exchanged(at), train[::-1])):
        ours = AxialRoPE(2 * WIDTH, axes=2)
        policies = {"linear": Interpolate(size, align="corner"), "dynamic": NTK(size), "yarn": YaRN(size, **named)}
        policy = policies[kind]
        got.append(ours.angle(policy.place(place)).resolve(policy, place.extent, 0)[0, 0])
    same(got[0], theirs, got[1], 2e-5)  # angles up to 47


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize(("length", "low", "high"), [(8192, 1.0, 4.0), (48, 0.5, 3.0)])
def test_llama3_is_llama3(factor, length, low, high):
    """As a policy beyond a length, and as an option of `rope` at every length."""
    named = dict(low_freq_factor=low, high_freq_factor=high)
    numbers = dict(factor=factor, **named, original_max_position_embeddings=length)
    frequencies, heat = scaled(rope("llama3", width=64, base=500_000.0, **numbers))
    assert heat == 1.0
    encoding = AxialRoPE(64, axes=1, base=500_000.0)
    w, device = encoding.frequencies(torch.device("cpu")), torch.device("cpu")
    for policy in [Llama3((length,), **named)] + [Llama3((length,))] * ((low, high) == (1.0, 4.0)):
        found = policy.rescale(w, (round(factor * length),))
        torch.testing.assert_close(found[0, 0], frequencies.double(), rtol=3e-6, atol=0)
    assert (w / found).max() > factor - 1e-9
    option = AxialRoPE(64, axes=1, base=500_000.0, llama3=(factor, low, high, length))
    torch.testing.assert_close(option.frequencies(device)[0, 0], frequencies.double(), rtol=3e-6, atol=0)


def test_longrope_is_longrope():
    """Their factor on queries and keys, squared, is the temperature "log" at the length of the factors."""
    length, longer, width = 24, 96, 16
    long, short = tuple(1 + 0.5 * i for i in range(8)), tuple(1 + 0.1 * i for i in range(8))
    config = rope(
        "longrope", width=width, length=longer, long_factor=list(long), short_factor=list(short),
        original_max_position_embeddings=length,
    )  # fmt: skip
    policy = LongRoPE((length,), long_factor=long, short_factor=short)
    for extent in (longer, length):
        frequencies, heat = scaled(config, extent)
        check(ours_under(policy, extent, width), frequencies, ours_under(None, extent, width))
    assert heat**2 == pytest.approx(LogTemperature((length,))((longer,)))


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize(("length", "width", "betas"), [(2048, 64, ()), (256, 32, ()), (48, 64, (4.0, 0.5))])
def test_yarn_is_yarn(factor, length, width, betas):
    """With truncate=False: the edges of the ramp are not rounded to whole channels."""
    named = dict(zip(("beta_fast", "beta_slow"), betas, strict=False))
    config = rope(
        "yarn",
        width=width,
        length=round(factor * length),
        factor=factor,
        original_max_position_embeddings=length,
        truncate=False,
        **named,
    )
    frequencies, heat = scaled(config)
    longer = round(factor * length)
    check(ours_under(YaRN((length,), **named), longer, width), frequencies, ours_under(None, longer, width))
    # Their factor is on queries and on keys, ours on the logits.
    assert YaRNTemperature((length,))((longer,)) == pytest.approx(heat**2, rel=1e-12)
    assert heat**2 > 1.1


def test_yarn_ends_its_ramp_where_the_betas_say():
    """Different on purpose: where no frequency turns beta_fast times, theirs starts the ramp at the fastest channel."""
    length, factor = 64, 4.0  # the fastest turns 10 times
    config = rope("yarn", length=256, factor=factor, original_max_position_embeddings=length, truncate=False)
    theirs, _ = scaled(config)
    ours, plain = ours_under(YaRN((length,)), 256)[1], ours_under(None, 256)[1]
    assert theirs[0] == plain[0] == 1
    keep = math.log(length / (2 * math.pi)) / math.log(32)
    assert float(ours[0]) == pytest.approx(1 / factor + (1 - 1 / factor) * keep, rel=1e-12)
    assert (ours <= theirs.double() * (1 + 1e-6)).all()
