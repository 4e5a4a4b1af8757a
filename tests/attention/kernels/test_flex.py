"""Biases that are computed beside the logits equal the matrix: outputs, every gradient, all kinds, all places."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from tests.attention.kernels.flexed import compiled, flex_on_cpu
from vit2dpe import ConfigError, Dims, Positions, Signal, ViT, attend, build, explain, frozen, use_policy
from vit2dpe.attention import mask_mod, masks, score_mod
from vit2dpe.attention.functional import Causal, materialize_shared_bias, rotate_qk
from vit2dpe.attention.kernels import flex
from vit2dpe.signal import Dense, Distance, LowRank, Table
from vit2dpe.testing import randomise

B, H, DIM, GRID = 3, 3, 8, (3, 5)
WORDS = [
    "relative",
    "relative(prefix=true)",
    "t5",
    "logcpb",
    "fire",
    "alibi",
    "alibi(distance=squared)",
    "lookhere",
    "lookhere(view=45)",
    "relative+alibi(distance=squared)+lookhere+rope_mixed",
]
TEXT = ["alibi", "t5", "fire(reach=query)", "lookhere", "alibi(distance=squared)"]
SOME = torch.tensor([[0, 4, 7, 11], [1, 2, 13, 5], [14, 3, 9, 8]])
SHAPES = ["whole", "prefix", "subset", "a subset of each sample", "cross", "cross of each sample"]
slow = partial(pytest.param, marks=pytest.mark.slow)


def places(shape):
    """Queries and keys; None where they are the same."""
    grid = Positions.grid(GRID)
    return {
        "whole": (grid, None),
        "prefix": (grid.with_prefix(2), None),
        "subset": (grid.take(SOME[0]).with_prefix(1), None),
        "a subset of each sample": (grid.take(SOME).with_prefix(1), None),
        "cross": (grid.take(SOME[1]), grid.with_prefix(1)),
        "cross of each sample": (grid.take(SOME).with_prefix(1), grid),
        "between places": (Positions(grid.coords * 0.7 + 0.2, GRID).with_prefix(1), None),
    }[shape]


def case(word, at, keys=None, temperature=None):
    """Random parameters of an encoding, q, k, v, and its Signal."""
    torch.manual_seed(0)
    encoding = randomise(build(word, Dims(H * DIM, H, at.extent)))
    queries, others = (p.prefix + p.coords.shape[1] for p in (at, at if keys is None else keys))
    q, k, v = torch.randn(B, H, queries, DIM), torch.randn(B, H, others, DIM), torch.randn(B, H, others, DIM)

    def signal():
        found = encoding(at, keys)
        return Signal(found.token, found.q_rotation, found.k_rotation, found.bias, temperature)

    return list(encoding.parameters()), [x.requires_grad_() for x in (q, k, v)], signal


def from_formula(q, k, v, signal, mask=None, scale=None):
    """softmax of what `score_mod` makes of the scores."""
    q, k, signal = rotate_qk(q, k, signal)
    modified = score_mod(signal)
    if mask is not None:
        modified = flex._where(modified, mask_mod(mask))
    return flex.plainly(q, k, v, modified, scale)


def same(found, expected, inputs):
    """Outputs to 5e-6, gradients to 2e-5 of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    weights = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(x, inputs, weights, allow_unused=True) for x in (found, expected)), strict=True)
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("word", WORDS)
def test_a_score_mod_is_the_bias(word, shape):
    at, keys = places(shape)
    parameters, (q, k, v), signal = case(word, at, keys, temperature=1.5)
    expected = attend(q, k, v, signal(), scale=0.3)
    same(from_formula(q, k, v, signal(), scale=0.3), expected, [q, k, v, *parameters])


@pytest.mark.parametrize(
    "word",
    [
        "alibi",
        *(f"alibi(distance={kind})" for kind in ("squared", "manhattan", "chebyshev")),
        *(f"alibi(slopes=axes, distance={kind})" for kind in ("euclidean", "manhattan", "chebyshev")),
        "alibi(slopes=learned)",
        *(f"kerple({options})" for options in ("form=log", "form=power", "distance=squared")),
        "lookhere",
    ],
)
def test_between_whole_places(word):
    parameters, (q, k, v), signal = case(word, *places("between places"))
    assert type(signal().bias[0]) is (LowRank if word == "alibi(distance=squared)" else Distance)
    same(from_formula(q, k, v, signal()), attend(q, k, v, signal()), [q, k, v, *parameters])


@pytest.mark.parametrize("word", TEXT)
def test_on_a_line_under_a_causal_mask_with_padding_on_the_left(word):
    at = Positions.sequence(7, start=torch.tensor([0, -2, -3]), length=12)
    parameters, (q, k, v), signal = case(word, at)
    mask = masks.causal(at, at) & masks.present(torch.arange(7) >= torch.tensor([[0], [2], [3]]))
    expected = attend(q, k, v, signal(), mask)
    alive = mask.any(-1, keepdim=True)
    found = from_formula(q, k, v, signal(), mask | ~alive).masked_fill(~alive, 0.0)
    same(found, expected, [q, k, v, *parameters])
    assert bool((expected[1, :, :2] == 0).all())  # padding sees nothing
    with flex_on_cpu() as programs, torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, signal(), mask), expected, rtol=0, atol=5e-6)
        in_order = attend(q, k, v, signal(), Causal(at))
    torch.testing.assert_close(in_order, attend(q, k, v, signal(), Causal(at)), rtol=0, atol=5e-6)
    assert len(programs) == 2 * (word in ("alibi", "t5", "lookhere"))  # others are a matrix, or channels


def test_a_window_needs_nothing_of_its_own():
    """Swin's: places of a small grid, whatever the number of windows in the batch."""
    _, (q, k, v), signal = case("relative", Positions.grid((2, 3)))
    mask = torch.rand(B, 1, 6, 6) < 0.7
    mask[..., 0] = True
    same(from_formula(q, k, v, signal(), mask), attend(q, k, v, signal(), mask), [q, k, v])


def test_nothing_of_n_squared_is_in_a_formula():
    at = Positions.grid((64, 64)).with_prefix(1)
    for word in ("relative", "alibi", "alibi(distance=squared)", "lookhere", "t5", "fire"):
        (term,) = build(word, Dims(H * DIM, H, at.extent))(at).bias
        held = [cell.cell_contents for cell in flex._pair(term).__closure__]
        most = max(x.numel() for x in held if isinstance(x, torch.Tensor))
        assert most <= 12 * 65 * 65, word  # at most twelve numbers of a place or an offset


def test_a_block_mask_is_made_of_a_mask():
    mask = torch.rand(B, 1, 128, 256) < 0.5
    made = create_block_mask(mask_mod(mask), B, None, 128, 256, device="cpu")
    assert made.shape == (B, 1, 128, 256)
    b, i, j = torch.arange(B).view(-1, 1, 1), torch.arange(128).view(-1, 1), torch.arange(256)
    assert torch.equal(made.mask_mod(b, b, i, j), mask[:, 0])
    assert torch.equal(mask_mod(mask[0, 0])(b, b, i, j), mask[0, 0])


def vit(word, **kwargs):
    torch.manual_seed(0)
    sizes = dict(img_size=(32, 48), patch_size=8, embed_dim=48, num_heads=3, depth=3, num_classes=2)
    return randomise(ViT(word, **sizes | kwargs))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("word", "policy"),
    [
        ("lookhere+rope", "interpolate"),
        ("relative(shared=true)", "resize"),
        ("alibi(distance=squared)+t5", "extrapolate"),
        ("relative+t5+sincos", None),
    ],
)
def test_attend_takes_it_by_itself(word, policy, warm):
    model, images = vit(word).eval(), torch.randn(2, 3, 64, 24)
    with torch.no_grad(), use_policy(model, policy, temperature=True) if warm and policy else nullcontext():
        expected = model(images)
        with flex_on_cpu() as programs:
            torch.testing.assert_close(model(images), expected, rtol=0, atol=5e-6)
        assert len(programs) == 3
        assert len(set(programs)) == 1  # the same for all blocks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_of_a_constant_bias(checkpointing):
    model, images, gradients = vit("lookhere"), torch.randn(2, 3, 32, 48), []
    model.set_grad_checkpointing(checkpointing)
    for on in (False, True):
        model.zero_grad()
        with flex_on_cpu() if on else nullcontext() as programs:
            model(images).square().sum().backward()
        assert not on or len(programs) == (9 if checkpointing else 3)  # the block again, and the attention
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # looked at while tracing
@pytest.mark.parametrize(
    ("word", "shape"),
    [
        ("relative(prefix=true)", "prefix"),
        *(slow("relative+lookhere+alibi(distance=squared)+rope_mixed", shape) for shape in SHAPES),
    ],
)
def test_torchs_flex_attention_gives_what_attend_gives(word, shape):
    """Traced, by the reference that torch has for the CPU, with the gradients that it refuses there."""
    at, keys = places(shape)
    parameters, (q, k, v), signal = case(word, at, keys, temperature=0.8)
    expected = attend(q, k, v, signal())
    with compiled() as programs:
        found = flex.run("all", *rotate_qk(q, k, signal())[:2], v, score_mod(signal()), None)
        same(found, expected, [q, k, v, *parameters])
    assert programs.frame_count == 1


@pytest.mark.slow
def test_one_program_serves_all_blocks_sizes_and_temperatures():
    model = vit("lookhere").eval()
    with torch.no_grad(), compiled() as programs:
        counts = []
        for size in ((32, 48), (40, 64), (64, 24), (24, 72)):
            model(torch.randn(2, 3, *size))
            counts.append(programs.frame_count)
        assert counts[1:] == [2, 2, 2]  # of one size, then of all
        with use_policy(model, "interpolate", temperature=True):
            for size in ((40, 64), (64, 24), (24, 72)):
                model(torch.randn(2, 3, *size))
        assert programs.frame_count == 3


@pytest.mark.parametrize("how", [flex_on_cpu, slow(compiled)])
def test_backward_twice_and_gradients_of_gradients(how):
    """By a compiled program torch gives neither."""
    _, (q, k, v), signal = case("lookhere", Positions.grid(GRID))

    def found():
        loss = attend(q, k, v, signal()).square().sum()
        first = torch.autograd.grad(loss, [q, k, v], retain_graph=True)
        again = torch.autograd.grad(loss, [q, k], create_graph=True)
        second = torch.autograd.grad(again[0].square().sum() + again[1].square().sum(), [q, k, v])
        return [x.detach() for x in (*first, *again, *second)]

    with sdpa_kernel(SDPBackend.MATH):  # what torch can differentiate twice, and `attend` obeys
        expected = found()
    with how():
        for ours, theirs in zip(found(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.slow
def test_a_compiled_model_holds_it():
    model, images = vit("alibi", depth=2), torch.randn(2, 3, 32, 48)
    expected = model(images)
    with compiled():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
        assert not flex._compiled.cache_info().currsize
        same(found, expected, list(model.parameters()))


@pytest.mark.parametrize(
    ("word", "arguments", "training", "why"),
    [
        ("relative", {}, True, "atomic"),
        ("alibi", dict(attn_drop_rate=0.1), True, "dropout"),
        ("lookhere", {}, False, "float64"),
        ("alibi", dict(num_heads=6), False, "8 and 8 channels"),
        ("alibi", {}, False, "sdpa_kernel"),
        ("alibi", {}, False, "Triton"),
    ],
)
def test_explain_gives_the_reason_where_it_does_not_serve(word, arguments, training, why, monkeypatch):
    model = vit(word, **arguments).to(torch.float64 if why == "float64" else torch.float32)
    with flex_on_cpu() as programs:
        monkeypatch.setattr(flex, "TRITON", why != "Triton")
        monkeypatch.setattr(flex, "WIDTHS", range(16, 257))
        with sdpa_kernel(SDPBackend.MATH) if why == "sdpa_kernel" else nullcontext():
            line = explain(model, (32, 48), training=training)[0]
            model.train(training)(torch.zeros(1, 3, 32, 48, dtype=model.patch_embed.proj.weight.dtype))
    assert not programs
    assert line.bias.path != "flex"
    assert "no FlexAttention: " in line.bias.why
    assert why in line.bias.why


def test_explain_names_it_and_runs_no_compiled_program():
    model = vit("alibi").eval()
    assert "FlexAttention" not in str(explain(model, (32, 48))[0])  # few tokens, and no CUDA
    with flex_on_cpu() as programs:
        line = explain(model, (32, 48))[0]
    assert (line.bias.path, line.kernel) == ("flex", None)
    assert not programs


def test_terms_stay_formulas_where_it_serves():
    at, x = Positions.grid(GRID), torch.randn(B, 15, 24)
    signal = build("alibi", Dims(24, H, GRID))(at)
    assert type(signal.bias[0]) is Distance
    assert type(materialize_shared_bias(signal, x).bias[0]) is Dense
    with flex_on_cpu():
        assert materialize_shared_bias(signal, x) is signal
    model = vit("alibi").eval()
    with torch.no_grad(), frozen(model):
        assert type(model.position(at).bias[0]) is Dense  # once for all calls, on the CPU


def test_what_it_does_not_take():
    class Own(tuple):
        def dense(self):
            return torch.zeros(1, 1, 2, 2)

    with pytest.raises(ConfigError, match=r"Own: give Dense\(term.dense\(\)\)"):
        score_mod(Signal(bias=(Own(),)))
    with pytest.raises(ValueError, match="a mask is boolean"):
        mask_mod(torch.zeros(2, 2))
    at = Positions.grid(GRID)
    with pytest.raises(ValueError, match="leave the table"):
        score_mod(Signal(bias=(Table(torch.zeros(1, 3, 3), at, at),)))
