"""Texts in a row, and nested tensors: what each text is alone, and no matrix of the row."""

from __future__ import annotations

import pytest
import torch

import vit2dpe
from tests.attention.test_segments import Peak
from tests.helpers import MICRO
from tests.models.text.test_text import SIZES, drawn, ids
from vit2dpe import MAE, Attention, ConfigError, Swin, ViT, stock, use_policy
from vit2dpe.encodings import ENCODINGS
from vit2dpe.models.text.heads import TextDecoder, TextEncoder
from vit2dpe.segments import Segments

TEXTS = [ids(n, seed=n) for n in (3, 7, 5, 3, 1, 5)]


def trained(model, total):
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.need("E8")
@pytest.mark.parametrize("word", [*ENCODINGS, "rope/none", "sincos+relative"])
@pytest.mark.parametrize(("kind", "window"), [(TextDecoder, None), (TextEncoder, 2), (TextDecoder, 2)])
def test_a_text_in_a_row_is_what_it_is_alone(word, kind, window):
    model = drawn(kind, word, window=window).double()
    tokens, segments = vit2dpe.pack(TEXTS)
    out, total = model.forward_features(tokens, segments=segments)[0], 0.0
    weights = torch.randn_like(out)
    for i, text in enumerate(TEXTS):
        here = segments.numbers[0] == i
        alone = model.forward_features(text[None])[0]
        torch.testing.assert_close(out[here], alone, rtol=0, atol=1e-10)
        total = total + (alone * weights[here]).sum()
    for ours, theirs in zip(trained(model, (out * weights).sum()), trained(model, total), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(post_norm=True)])
def test_stochastic_depth_drops_branches_of_each_text(options):
    """Equal texts in a row: of the two branches of the last block each has its own, and no other outcome is there."""
    model, text = drawn(TextEncoder, "rope", drop_path_rate=0.5, **options).train(), ids(4, seed=1)
    tokens, segments = vit2dpe.pack([text] * 60)
    out = model.forward_features(tokens, segments=segments)[0].unflatten(0, (60, 4))
    assert len(((out[:, None] - out).abs().amax((-1, -2)) < 1e-4).unique(dim=0)) == 4


def test_several_rows_padding_checkpoints_and_policies():
    """Rows of different texts with padding behind them; blocks that are computed again; one line for all."""
    model = drawn(TextDecoder, "rope+alibi+learned", context=6).train()
    segments = Segments.of([[3, 7], [2, 2, 4]], total=11)
    tokens, line = ids(2, 11), 16
    with use_policy(model, "interpolate+resize", temperature="log"):
        found = model.forward_features(tokens, segments=segments, length=line)
        model.set_grad_checkpointing()
        again = model.forward_features(tokens, segments=segments, length=line)
        for row, number in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
            here = segments.numbers[row] == number
            alone = model.forward_features(tokens[row][here][None], length=line)[0]
            torch.testing.assert_close(found[row][here], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, again)
    assert found.isfinite().all()
    for one, other in zip(trained(model, found.sum()), trained(model, again.sum()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("word", ["rope", "alibi", "t5", "fire(reach=query)", "shaw"])
def test_a_row_takes_the_memory_of_its_texts(word, training):
    model = drawn(TextDecoder, word, context=64).train(training)
    texts = [ids(n) for n in (60, 48, 60, 52, 64, 48, 56)]

    def peak(tokens, **more):
        with torch.set_grad_enabled(training), Peak() as counted:
            out = model.forward_features(tokens, **more)
            if training:
                out.sum().backward()
        model.zero_grad()
        return counted

    tokens, segments = vit2dpe.pack(texts)
    found = peak(tokens, segments=segments)
    weights = sum(p.nbytes for p in model.parameters()) * training  # whose gradients are there once
    assert found.most - weights <= 1.1 * sum(peak(text[None]).most - weights for text in texts)
    if "fire" not in word:  # whose network has 32 numbers for each pair of a text
        assert found.largest < tokens.numel() ** 2  # a boolean matrix of the row
    if word == "alibi":
        assert peak(tokens, segments=segments.numbers).largest >= tokens.numel() ** 2  # the counter sees it


def test_a_compiled_model_has_one_graph_for_all_rows():
    model = drawn(TextDecoder, "alibi", depth=1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ([3, 4, 5], [6, 2]):
        tokens, segments = vit2dpe.pack([ids(n) for n in lengths])
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(tokens, segments=segments), model(tokens, segments=segments), rtol=1e-5, atol=1e-5
            )
    assert len(graphs) == 1


def test_what_cannot_be_packed_is_refused():
    for texts in ([], [ids(1, 3)], torch.zeros(2, 2, 3)):
        with pytest.raises(ConfigError, match="list of at least one sequence"):
            vit2dpe.pack(texts)
    with pytest.raises(ConfigError, match="this at least one token"):
        vit2dpe.pack([ids(3), ids(0)])
    with pytest.raises(ConfigError, match="13 tokens, the line 12: name"):
        drawn(TextDecoder, "rope")(*vit2dpe.pack([ids(13)])[:1], segments=vit2dpe.pack([ids(13)])[1])


LAYOUTS = [
    torch.jagged,
    pytest.param(torch.strided, marks=pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")),
]
refused = pytest.raises(ConfigError, match="nested tensor")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_texts_are_packed_or_refused_by_name(layout):
    nested = torch.nested.nested_tensor([ids(3), ids(5)], layout=layout)
    tokens, segments = vit2dpe.pack(nested)
    assert (tokens.shape, segments.groups) == ((1, 8), ((1, 3), (1, 5)))
    with refused:
        TextEncoder("rope", **SIZES)(nested)
    x = torch.nested.nested_tensor([torch.zeros(3, 24), torch.zeros(5, 24)], layout=layout)
    with refused:
        Attention(24, 2)(x)
    stack = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(24, 2, batch_first=True), 1)
    with stock.attach(stack, "alibi", grid=8), refused:
        stack(x)
    with refused:
        stock.RotaryEncoderLayer(24, 2, position="rope", grid=8, batch_first=True)(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_images_are_refused_by_name(layout):
    nested = torch.nested.nested_tensor([torch.zeros(3, 32, 32), torch.zeros(3, 32, 24)], layout=layout)
    vit = ViT("rope", img_size=32, patch_size=8, **(MICRO | dict(num_classes=0)))
    swin = Swin(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(1, 2))
    for model in (vit, swin, MAE(vit)):
        with refused:
            model(nested)
