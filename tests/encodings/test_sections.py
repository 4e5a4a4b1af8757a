"""Sections of `rope`, `rope_mixed` and `rope_dinov3`: which pairs turn with which axis, how fast, which stand still.

Originals: transformers' Qwen2-VL and Qwen3-VL, timm's RotaryEmbeddingMRope, `proportional` and partial rotary factors
of transformers; by formula Flux, Hunyuan, Wan and MHRoPE. Frequencies of theirs are float32.
"""

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingMRope
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from vit2dpe import MAE, ConfigError, Dims, Positions, Swin, TextDecoder, ViT, build
from vit2dpe.encodings import AxialRoPE, CentredRoPE, MixedRoPE
from vit2dpe.resolution.policies import NTK, Llama3, LongRoPE, YaRN
from vit2dpe.testing import check_encoding

CPU = torch.device("cpu")
WORDS = ["rope", "rope_mixed", "rope_dinov3"]
VIDEO = (3, 4, 5)  # frames, rows, columns


def bank(count, base, of=None):
    return base ** (-torch.arange(count, dtype=torch.float64) / (of or count))


def w_of(encoding):
    """(d, 1|H, Dh/2)"""
    return encoding.frequencies(CPU).detach()


def axes_of(w):
    """(1|H, Dh/2) the axis that a pair turns with, -1 of one that stands still."""
    assert ((w != 0).sum(0) <= 1).all()
    return torch.where((w != 0).any(0), (w != 0).int().argmax(0), -1)


def angles(encoding, at):
    return encoding.angle(at).dense()


# the contract -------------------------------------------------------------------------------------------------------

UNEQUAL = {1: (5,), 2: (2, 3), 3: (1, 3, 1)}  # of 6 pairs
MROPE = {1: (5,), 2: (4, 2), 3: (3, 2, 1)}
HEADS = {1: (2,), 2: (1, 1), 3: (1, 1, 1)}  # of 3 heads
CONTRACT = {
    "sections": lambda d: AxialRoPE(
        12, axes=d.axes, sections=UNEQUAL[d.axes], base=(50.0, 9.0, 20.0)[: d.axes], step=(1.0, 0.5, 2.0)[: d.axes],
        start=(0.0, 1.0, 0.5)[: d.axes],
    ),
    "interleaved": lambda d: AxialRoPE(12, axes=d.axes, sections=MROPE[d.axes], order="interleaved"),
    "head": lambda d: AxialRoPE(12, axes=d.axes, heads=3, sections=HEADS[d.axes], order="head", zeros=2),
    "mixed": lambda d: MixedRoPE(12, 3, axes=d.axes, sections=UNEQUAL[d.axes], start=1.0),
    "mixed by head": lambda d: MixedRoPE(12, 3, axes=d.axes, sections=HEADS[d.axes], order="head", partial=0.5),
    "dinov3": lambda d: CentredRoPE(12, axes=d.axes, order="interleaved", bank="whole", partial=0.75),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTRACT)
def test_options_keep_the_contract(kind):
    check_encoding(CONTRACT[kind], axes=(1, 2, 3) if kind == "sections" else (3,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CONTRACT if kind != "sections"])
def test_options_keep_the_contract_on_fewer_axes(kind):
    check_encoding(CONTRACT[kind], axes=(1, 2))


# defaults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [6, 10, 64, 66, 128])
def test_every_even_head_width_works(axes, head_dim):
    """floor(Dh / 2d) pairs an axis, those left over stand still behind them."""
    dims = Dims(2 * head_dim, 2, VIDEO[:axes])
    count = head_dim // 2 // axes
    for word, unit in (("rope(base=50)", 1.0), ("rope_dinov3(base=50)", 2 * math.pi)):
        expected = torch.zeros(axes, 1, head_dim // 2, dtype=torch.float64)
        for axis in range(axes):
            expected[axis, 0, axis * count : (axis + 1) * count] = unit * bank(count, 50.0)
        torch.testing.assert_close(w_of(build(word, dims)), expected, rtol=1e-15, atol=0)
    mixed = build("rope_mixed", dims)
    assert {name: value.shape for name, value in mixed.state_dict().items()} == {"freqs": (axes, 2, axes * count)}
    assert not w_of(mixed)[..., axes * count :].any()


MODELS = {
    "ViT": lambda word: ViT(word, img_size=16, patch_size=4, embed_dim=30, depth=1, num_heads=3, num_classes=2),
    "Swin": lambda word: Swin(
        word, img_size=16, patch_size=2, window_size=2, embed_dim=20, depths=(1, 1), num_heads=(2, 4), num_classes=2
    ),
    "TextDecoder": lambda word: TextDecoder(word, vocab_size=5, context=8, embed_dim=30, depth=1, num_heads=3),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("word", WORDS)
def test_models_take_head_widths_that_do_not_divide(model, word):
    """Five pairs a head on two axes, where one is left; on a line none is."""
    made = MODELS[model](word)
    out = made(torch.randint(5, (2, 6)) if model == "TextDecoder" else torch.randn(2, 3, 16, 24))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


def test_a_masked_autoencoder_too():
    encoder = ViT("rope", img_size=(16, 24), patch_size=4, embed_dim=30, depth=1, num_heads=3, num_classes=0)
    model = MAE(encoder, decoder_embed_dim=28, decoder_depth=1, decoder_num_heads=2)
    assert model(torch.randn(2, 3, 16, 24))[0].isfinite()


# the originals ------------------------------------------------------------------------------------------------------


def places_of(n):
    """Three rows of places, (3, 1, N), and ours."""
    torch.manual_seed(0)
    coords = torch.randint(40, (1, n, 3)).float()
    return coords.permute(2, 0, 1), Positions(coords, (40, 40, 40))


@pytest.mark.parametrize("section", [(16, 24, 24), (8, 12, 12), (2, 3, 3)])
def test_qwen2_vl(section):
    """One bank over the head, of which each axis takes its section."""
    width, (theirs_at, at) = 2 * sum(section), places_of(9)
    config = Qwen2VLTextConfig(
        hidden_size=2 * width, num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)},
    )  # fmt: skip
    cos, sin = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), theirs_at)
    ours = build(f"rope(sections={section}, bank=whole, base=1000000)", Dims(2 * width, 2, at.extent))
    turn = ours(at).q_rotation
    torch.testing.assert_close(turn.cos[:, 0], cos[..., : width // 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(turn.sin[:, 0], sin[..., : width // 2], rtol=0, atol=1e-5)
    own = build(f"rope(sections={section}, base=1000000)", Dims(2 * width, 2, at.extent))(at).q_rotation
    assert (own.cos[:, 0] - cos[..., : width // 2]).abs().max() > 0.5


@pytest.mark.parametrize("section", [(24, 20, 20), (11, 11, 10), (4, 4, 4), (6, 5, 3)])
def test_qwen3_vl(section):
    width, (theirs_at, at) = 2 * sum(section), places_of(9)
    config = Qwen3VLTextConfig(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section)},
    )  # fmt: skip
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), theirs_at)
    word = f"rope(sections={section}, bank=whole, order=interleaved, base=5000000)"
    turn = build(word, Dims(2 * width, 2, at.extent))(at).q_rotation
    torch.testing.assert_close(turn.cos[:, 0], cos[..., : width // 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(turn.sin[:, 0], sin[..., : width // 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("theirs", "width", "ours"), [
    ((12, 12, 12), 72, (12, 12, 12)), ((8, 12, 12), 72, (12, 12, 12)), ((8, 12, 12), 64, (11, 11, 10)),
])  # fmt: skip
def test_timms_mrope(theirs, width, ours):
    """Its sections are nominal: time has what rows and columns leave. Ours are what an axis has."""
    original, extent = RotaryEmbeddingMRope(width, theirs, temperature=10_000.0), (4, 7)
    sin, cos = original.get_embed(extent).chunk(2, -1)
    rows = Positions.grid(extent).coords
    at = Positions(torch.cat([torch.zeros_like(rows[..., :1]), rows], -1), (1, *extent))
    word = f"rope(sections={ours}, bank=whole, order=interleaved, base=10000)"
    turn = build(word, Dims(width, 1, at.extent))(at).q_rotation
    torch.testing.assert_close(turn.cos[0, 0], cos[:, : width // 2], rtol=0, atol=2e-6)
    torch.testing.assert_close(turn.sin[0, 0], sin[:, : width // 2], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sections", "base"), [((8, 28, 28), 256.0), ((22, 21, 21), 1e4), ((16, 24, 24), 1e4)])
def test_flux_hunyuan_wan(sections, base):
    """theta^(-2k / channels of the axis), axis behind axis: diffusers' `get_1d_rotary_pos_embed` of each."""
    w = w_of(build(f"rope(sections={sections}, base={base})", Dims(256, 2, VIDEO)))
    expected = torch.cat([bank(count, base) for count in sections])
    torch.testing.assert_close(w.sum(0)[0], expected, rtol=1e-15, atol=0)
    assert axes_of(w)[0].tolist() == [axis for axis, count in enumerate(sections) for _ in range(count)]


def test_mhrope():
    """Heads of each axis over the whole band, those left over standing still."""
    w = w_of(build("rope(order=head, sections=(2, 3, 1), base=10000)", Dims(8 * 16, 8, VIDEO)))
    assert axes_of(w)[:, 0].tolist() == [0, 0, 1, 1, 1, 2, -1, -1]
    torch.testing.assert_close(w.sum(0)[:6], bank(8, 1e4).expand(6, -1), rtol=1e-15, atol=0)
    at = Positions.grid(VIDEO)
    moved = Positions(at.coords + torch.tensor([0.0, 1.5, 0.0]), at.extent)
    encoding = build("rope(order=head, sections=(2, 3, 1))", Dims(8 * 16, 8, VIDEO))
    change = (angles(encoding, moved) - angles(encoding, at)).abs().amax((0, 2, 3))
    assert (change > 0).tolist() == [False, False, True, True, True, False, False, False]


def init(kind, width, **parameters):
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 1.0, **parameters},
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].double()


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
def test_partial_is_the_partial_rotary_factor(factor):
    theirs = init("linear", 32, partial_rotary_factor=factor)
    w = w_of(build(f"rope(partial={factor})", Dims(64, 2, (7,))))[0, 0]
    torch.testing.assert_close(w, torch.nn.functional.pad(theirs, (0, 16 - len(theirs))), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["own", "whole", "head"])
def test_factors_divide_the_pairs_of_a_bank(kind):
    """As transformers has it of a line; of several axes those of each bank, and of each head."""
    theirs = init("longrope", 32, short_factor=[1.0 + i for i in range(16)], long_factor=[1.0] * 16, factor=2.0,
                  original_max_position_embeddings=64)  # fmt: skip
    word = f"rope(factors={tuple(1.0 + i for i in range(16))})"
    torch.testing.assert_close(w_of(build(word, Dims(64, 2, (7,))))[0, 0], theirs, rtol=1e-6, atol=0)
    pairs, more = {"own": (4, ""), "whole": (8, ", bank=whole"), "head": (8, ", order=head")}[kind]
    factors = torch.arange(1.0, pairs + 1, dtype=torch.float64)
    plain, slow = (
        build(f"rope(base=50{each}{more})", Dims(32, 2, (3, 5))).frequencies(torch.device("cpu"))
        for each in ("", f", factors={tuple(factors.tolist())}")
    )
    torch.testing.assert_close(slow * factors.repeat(8 // pairs), plain, rtol=1e-14, atol=0)


@pytest.mark.parametrize("zeros", [4, 12])
def test_zeros_are_the_proportional_kind(zeros):
    """The bank is that of the whole head, and its last frequencies are 0."""
    theirs = init("proportional", 32, partial_rotary_factor=1 - zeros / 16)
    torch.testing.assert_close(w_of(build(f"rope(zeros={zeros})", Dims(64, 2, (7,))))[0, 0], theirs, rtol=1e-6, atol=0)


# what options mean --------------------------------------------------------------------------------------------------


def test_interleaved_is_a_permutation_of_axis_after_axis():
    """Of equal sections, whatever the bank; kimi's and ltx' pairs."""
    for axes, bank_of in ((2, "own"), (3, "own")):
        dims = Dims(28, 1, VIDEO[:axes])
        plain, woven = (w_of(build(f"rope(order={order}, bank={bank_of})", dims)) for order in ("axis", "interleaved"))
        count = 14 // axes
        there = plain[..., : axes * count].unflatten(-1, (axes, count)).transpose(-1, -2).flatten(-2)
        assert torch.equal(woven[..., : axes * count], there)
        assert not woven[..., axes * count :].any()


@pytest.mark.parametrize("sections", [(4, 4), (5, 3), (3, 4)])
@pytest.mark.parametrize("order", ["axis", "interleaved"])
def test_a_whole_bank_is_one_bank_over_all_pairs(sections, order):
    """n = 8 pairs turn of 10, and pair i at base^(-i/8)."""
    if order == "interleaved" and sections == (3, 4):
        sections = (4, 3)
    w = w_of(build(f"rope(sections={sections}, bank=whole, order={order}, partial=0.8)", Dims(40, 2, (3, 5))))
    count = sum(sections)
    torch.testing.assert_close(w.sum(0)[0, :count], bank(count, 100.0, of=8), rtol=1e-15, atol=0)
    assert not w[..., count:].any()
    found = axes_of(w)[0]
    assert [int((found == axis).sum()) for axis in range(2)] == list(sections)


def test_interleaved_own_banks_of_unequal_sections():
    """Each axis' k-th pair turns at base_a^(-k/K_a), wherever it stands."""
    w = w_of(build("rope(sections=(6, 5, 3), order=interleaved, base=(50.0, 9.0, 20.0))", Dims(28, 1, VIDEO)))
    for axis, (count, base) in enumerate(zip((6, 5, 3), (50.0, 9.0, 20.0), strict=True)):
        torch.testing.assert_close(w[axis, 0][w[axis, 0] != 0], bank(count, base), rtol=1e-15, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_bases_and_steps_of_each_axis(word):
    """The magnitudes of an axis are those of a word with that base and step alone."""
    pair = "base=(50.0, 9.0), step=(1.0, 0.5)"
    torch.manual_seed(0)
    both = w_of(build(f"{word}({pair})", Dims(24, 1, (3, 5)))).norm(dim=0)
    for axis, (base, step) in enumerate(((50.0, 1.0), (9.0, 0.5))):
        one = w_of(build(f"{word}(base={base}, step={step})", Dims(24, 1, (3, 5)))).norm(dim=0)
        where = slice(axis * 6, (axis + 1) * 6)
        torch.testing.assert_close(both[:, where], one[:, where], rtol=1e-6, atol=0)


def test_a_start_of_each_axis_moves_the_prefix_alone():
    at = Positions.grid((3, 5)).with_prefix(1)
    plain, moved = (angles(build(word, Dims(24, 1, (3, 5))), at) for word in ("rope", "rope(start=(1.0, 2.5))"))
    by = w_of(build("rope", Dims(24, 1, (3, 5))))
    torch.testing.assert_close(moved - plain, (by[0] + 2.5 * by[1]).expand_as(moved), rtol=0, atol=1e-12)
    same = angles(build("rope(start=(1.0, 1.0))", Dims(24, 1, (3, 5))), at)
    assert torch.equal(same, angles(build("rope(start=1.0)", Dims(24, 1, (3, 5))), at))


def test_mixed_draws_what_it_drew():
    """Where the axes divide the pairs, the same parameters from the same seed: pair (j, k) along turned axis j."""
    torch.manual_seed(0)
    found = MixedRoPE(16, 3).freqs
    torch.manual_seed(0)
    phi = torch.stack([torch.rand((), dtype=torch.float64) * (2 * math.pi) for _ in range(3)])  # of each head
    rows = torch.stack([phi.sin(), phi.cos()])[..., None] * bank(4, 10.0)
    columns = torch.stack([phi.cos(), -phi.sin()])[..., None] * bank(4, 10.0)
    assert torch.equal(found, torch.cat([rows, columns], -1).float())


@pytest.mark.parametrize("option", ["sections=(1, 3)", "partial=0.6", "order=interleaved", "order=head"])
def test_mixed_learns_what_turns_and_nothing_else(option):
    """A turned copy of what `rope` has there; pairs that stand still have no parameter, and stand still for good."""
    mixed, rope = (build(f"{word}({option}, base=30)", Dims(30, 3, (3, 5))) for word in ("rope_mixed", "rope"))
    there = w_of(rope).norm(dim=0).expand(3, -1)
    torch.testing.assert_close(w_of(mixed).double().norm(dim=0), there, rtol=1e-6, atol=0)
    assert mixed.freqs.numel() == 2 * int((there > 0).sum())
    torch.nn.init.ones_(mixed.freqs)
    assert torch.equal(w_of(mixed)[0] != 0, there > 0)


@pytest.mark.parametrize("word", ["rope(sections=(2, 3))", "rope(order=head)", "rope", "rope(partial=0.7)"])
def test_one_gather_and_one_product(word):
    """What has a size of tokens x pairs is made once; of axes with as many pairs each there is no gather either."""
    made = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 15 * 2 and not function.is_view:
                made.append(function.overloadpacket.__name__)
            return out

    encoding, at = build(word, Dims(30, 3, (3, 5))), Positions.grid((3, 5))
    with Counted():
        angles(encoding, at)
    rest = word in ("rope", "rope(partial=0.7)")
    assert made == (["mul", "constant_pad_nd"] if rest else ["index_select", "mul"])


# policies -----------------------------------------------------------------------------------------------------------

UNDER = {
    "sections": dict(sections=(4, 8)),
    "head": dict(order="head", heads=3, sections=(1, 1), zeros=3),
    "interleaved": dict(sections=(7, 5), order="interleaved", bank="whole"),
    "zeros": dict(zeros=2, partial=0.7),
    "bases": dict(base=(1000.0, 20.0)),
}
TRAIN, LARGE = (4, 6), (12, 9)


def resolved(encoding, policy, extent):
    return encoding.angle(Positions.grid(extent)).resolve(policy, extent, 0)


def policies(pairs):
    return {
        "ntk": NTK(TRAIN), "yarn": YaRN(TRAIN), "llama3": Llama3(TRAIN),
        "longrope": LongRoPE(TRAIN, long_factor=tuple(1 + 0.25 * i for i in range(pairs)), power=(1.0, 0.5)),
    }  # fmt: skip


@pytest.mark.parametrize("policy", policies(12))
@pytest.mark.parametrize("kind", UNDER)
def test_an_axis_is_scaled_as_if_it_were_alone(kind, policy):
    """Its frequencies are those of a line of the same bank; what stands still does so; at scale 1 no bit changes."""
    policy, encoding = policies(12)[policy], AxialRoPE(24, **UNDER[kind])
    plain, found = resolved(encoding, None, LARGE), resolved(encoding, policy, LARGE)
    w = w_of(encoding)
    assert found.isfinite().all()
    assert torch.equal(resolved(encoding, policy, TRAIN), resolved(encoding, None, TRAIN))
    at = Positions.grid(LARGE).coords.double()
    expected = torch.zeros_like(plain)
    for axis in range(2):
        alone = type(policy)((TRAIN[axis],), **{
            "long_factor": getattr(policy, "long_factor", None), "power": (1.0, 0.5)[axis]
        } if isinstance(policy, LongRoPE) else dict(zip(
            ("beta_slow", "beta_fast"), (0.25, 1.0), strict=True)) if isinstance(policy, YaRN) else dict(
            low_freq_factor=0.25, high_freq_factor=1.0) if isinstance(policy, Llama3) else {})  # fmt: skip
        slow = alone.rescale(w[axis][None], (LARGE[axis],))[0]
        expected = expected + at[:, None, :, axis, None] * slow[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found - plain).abs().max() > 0.1
    still = (w == 0).all(0)
    assert not found.transpose(1, 2)[:, :, still].any()


@pytest.mark.parametrize(("kind", "policy"), [("sections", "ntk"), ("head", "longrope"), ("zeros", "llama3")])
def test_policies_compile(kind, policy):
    """Sizes are not known there, and a growth is a tensor."""
    encoding, at = AxialRoPE(24, **UNDER[kind]), Positions.grid(LARGE)
    encoding.own_policy = policies(12)[policy]
    torch._dynamo.reset()
    compiled = torch.compile(lambda where: encoding(where).q_rotation.sin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(at), encoding(at).q_rotation.sin, rtol=0, atol=1e-6)


def test_learned_frequencies_train_under_a_policy():
    mixed = MixedRoPE(24, 3, sections=(1, 1), order="head", zeros=2)
    for policy in policies(12).values():
        mixed.own_policy, mixed.freqs.grad = policy, None
        mixed(Positions.grid(LARGE)).q_rotation.sin.sum().backward()
        assert mixed.freqs.grad.isfinite().all()


# refused ------------------------------------------------------------------------------------------------------------

REFUSED = [
    ("sections=(8, 28)", r"3 whole numbers whose sum is at most 32; got \(8, 28\)"),
    ("sections=(8, 28, 28)", r"pairs of channels of each axis, .* at most 32; got \(8, 28, 28\)"),
    ("sections=(8, -1, 3)", r"got \(8, -1, 3\)"),
    ("sections=(8, 1.5, 3)", r"got \(8, 1.5, 3\)"),
    ("sections=(0, 0, 0)", r"got \(0, 0, 0\)"),
    ("sections=8", "must be tuple"),
    ("sections=(8, 12, 12), order=interleaved", r"would be \(11, 11, 10\).*order='axis'"),
    ("sections=(4, 4, 4), partial=0.25", r"at most 8; got \(4, 4, 4\)"),
    ("sections=(2, 1, 1), order=head", r"heads of each axis, .* at most 3; got \(2, 1, 1\)"),
    ("partial=0.0", "share of the 32 pairs .* got 0.0"),
    ("partial=1.5", "share of the 32 pairs .* got 1.5"),
    ("partial=0.05", "needs a head width of at least 6: got 64, of which partial=0.05 turns"),
    ("zeros=10", "a bank of 10, from 0 to 9; got 10"),
    ("zeros=-1", "got -1"),
    ("order=heads", "unknown order of pairs 'heads'; did you mean 'head'"),
    ("bank=all", "unknown bank of frequencies 'all'.*known: own, whole"),
    ("base=(10, 20)", r"base > 1, one number or 3, one of each axis; got \(10, 20\)"),
    ("base=(10, 20, 1)", r"base > 1, .* got \(10, 20, 1\)"),
    ("step=(1, 0, 1)", r"step > 0, .* got \(1, 0, 1\)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[options for options, _ in REFUSED])
def test_what_cannot_be_is_refused(options, message):
    for word in WORDS:
        with pytest.raises(ConfigError, match=message) as error:
            build(f"{word}({options})", Dims(192, 3, VIDEO))
        assert "\n" not in str(error.value)


ALONE = [
    (lambda: build("rope", Dims(6, 2, (3, 5))), "even head width, got 3"),
    (lambda: build("rope", Dims(8, 2, VIDEO)), "of 3 axes needs a head width of at least 6: got 4"),
    (lambda: build("rope(order=head)", Dims(24, 2, VIDEO)), "of 3 axes needs at least 3 heads: got 2"),
    (lambda: AxialRoPE(12, order="head"), "say how many there are, heads="),
    (lambda: build("rope(start=(1.0, 2.0, 3.0))", Dims(24, 2, (3, 5))), "a finite start, one number or 2"),
    (lambda: build("rope(llama3=(8, 4, 1, 8192))", Dims(24, 2, (7,))), "low factor below the high one"),
    (lambda: build("rope(llama3=(8, 1, 4))", Dims(24, 2, (7,))), r"original_max_position_embeddings.*got \(8, 1, 4\)"),
    (lambda: build("rope(factors=(1, 2))", Dims(24, 2, (7,))), "one for each pair of a bank of 6; got 2"),
    (lambda: build("rope(factors=(1, 2, 0))", Dims(12, 2, (7,))), "factors are numbers above 0"),
    (lambda: build("rope(sections=(1, 2), factors=(1,))", Dims(12, 2, (3, 5))), "of a bank of 1 and 2; got 1"),
    (lambda: LongRoPE((8,)), r"needs long_factor=\(1.0, 1.05, ...\).*rope_parameters.*got None"),
    (lambda: LongRoPE((8,), long_factor=(1.0, 0.0)), "a factor above 0"),
    (lambda: LongRoPE((8,), long_factor=(1.0, 2.0)).rescale(torch.ones(1, 1, 6), (16,)), "each of 6 pairs .* got 2"),
    (lambda: Llama3((8,), low_freq_factor=5.0), "high_freq_factor > low_freq_factor > 0, got 4.0 and 5.0"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), ALONE, ids=range(len(ALONE)))
def test_so_are_sizes_and_numbers(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
