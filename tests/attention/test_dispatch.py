"""`explain` tells the path that is taken: the same decisions, and the kernels behind them are counted."""

from __future__ import annotations

import pytest
import torch

from vit2dpe import Attention, ConfigError, Dims, Positions, ViT, build, explain
from vit2dpe.attention import functional as attention
from vit2dpe.attention.kernels import rotary, table
from vit2dpe.models import MAE, Swin
from vit2dpe.models.text.heads import TextEncoder
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.signal import Table

SIZES = dict(img_size=(32, 48), patch_size=8, embed_dim=16, num_heads=2, depth=2, num_classes=2)
TEXT = dict(context=9, embed_dim=16, depth=3, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2)
AVERAGE = dict(class_token=False, global_pool="avg")


def vit(word, **kwargs):
    torch.manual_seed(0)
    return ViT(word, **SIZES | kwargs)


@pytest.fixture
def taken(monkeypatch):
    """What really runs, in order."""
    calls = []

    def count(owner, name, label):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(label) or original(*args, **kwargs))

    count(table, "_view", "view")
    count(table, "_chunked", "chunked")
    count(table._Learned, "apply", "learned")
    count(rotary, "_forward", "in place")
    count(attention, "rotate", "functional")
    count(attention, "_append_channels", "channels")
    count(attention, "merge_bias", "merged")
    return calls


# word, arguments, training, budget in bytes; then rotation, bias, why
CASES = [
    ("none", {}, False, None, "none", "none", "no bias"),
    ("rope", {}, False, None, "in place", "none", "eager mode"),
    ("rope", {}, True, None, "in place", "none", "eager mode"),
    ("rope", dict(qk_norm=True), True, None, "functional", "none", "a norm"),
    ("relative", {}, False, None, "none", "matrix", "not above"),
    ("relative", {}, True, None, "none", "learned", "whole grid"),
    ("relative", AVERAGE, False, 100, "none", "view", "the grid is whole"),
    ("relative", {}, False, 100, "none", "chunked", "prefix tokens"),
    ("relative(prefix=true)", {}, True, None, "none", "matrix", "prefix tokens have biases too"),
    ("relative", dict(attn_drop_rate=0.1), True, None, "none", "matrix", "dropout"),
    ("relative+relative", {}, True, None, "none", "matrix", "several terms"),
    ("alibi", {}, False, None, "none", "matrix", "a Dense term"),
    ("alibi(distance=squared)", {}, False, None, "none", "channels", "a product"),
    ("rope+relative", {}, True, None, "in place", "learned", "whole grid"),
    ("relative(shared=true)", {}, False, None, "none", "matrix", "not above 32 MiB; looked up once for all"),
    ("relative(shared=true,prefix=true)", {}, True, None, "none", "matrix", "prefix tokens have biases too; looked up"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("word", ["t5", "relative(shared=true,prefix=true)", "logcpb(shared=true,form=cr)"])
def test_a_bias_that_blocks_share_is_looked_up_once_and_gives_the_same(monkeypatch, word, checkpointing):
    """The kernel of learned tables is kept out: it would take a table on a whole grid for itself."""
    monkeypatch.setattr(table, "_whole_grid", lambda term: False)
    model, images, looked = vit(word, depth=3), torch.randn(2, 3, 32, 48), []
    model.set_grad_checkpointing(checkpointing)
    dense = Table.dense
    monkeypatch.setattr(Table, "dense", lambda term: looked.append(term) or dense(term))

    def run():
        looked.clear()
        model.zero_grad()
        model(images).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            return len(looked), [model.eval()(images), *gradients]

    once, ours = run()
    with monkeypatch.context() as patch:
        patch.setattr("vit2dpe.models.layers.materialize_shared_bias", lambda signal, x: signal)
        often, reference = run()
    assert (once, often) == (1, 6 if checkpointing else 3)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "lookups"),
    [
        (lambda: MAE(vit("none", num_classes=0), decoder_position="t5", **DECODER), 1),
        (lambda: TextEncoder("t5", vocab_size=7, pool="", **TEXT), 1),
        (lambda: Seq2Seq("t5", cross_position="t5", source_vocab=7, target_vocab=7, **TEXT), 3),
    ],
)
def test_every_model_looks_a_shared_bias_up_once(monkeypatch, make, lookups):
    looked, dense = [], Table.dense
    monkeypatch.setattr(Table, "dense", lambda term: looked.append(term) or dense(term))
    model, tokens = make().eval(), torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 3, 0]])
    valid = tokens > 0
    with torch.no_grad():
        if isinstance(model, MAE):
            model(torch.randn(2, 3, 32, 48))
        elif isinstance(model, Seq2Seq):
            model(tokens, tokens, valid, valid)
        else:
            model(tokens, valid)
    assert len(looked) == lookups


def test_stages_of_a_swin_share_the_places_of_equal_windows(monkeypatch):
    made = []
    index = Table._index
    monkeypatch.setattr(Table, "_index", lambda term: made.append(term.q.extent) or index(term))
    sizes = dict(img_size=(48, 80), patch_size=2, window_size=(3, 5))
    model = Swin(**sizes, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 2))
    model.eval()(torch.randn(1, 3, 48, 80))
    assert made == [(3, 5)]
    made.clear()
    model.forward_intermediates(torch.randn(1, 3, 20, 24))
    assert made == [(3, 5)]


@pytest.mark.parametrize(("word", "arguments", "training", "budget", "rotation", "bias", "why"), CASES)
def test_what_is_told_is_what_is_done(word, arguments, training, budget, rotation, bias, why, taken, monkeypatch):
    model = vit(word, **arguments).train(not training)
    if budget is not None:
        monkeypatch.setattr(table, "BUDGET", budget)
    state = torch.get_rng_state()
    first, second = explain(model, (32, 48), training=training)
    assert (first.name, second.name) == ("blocks.0.attn", "blocks.1.attn")
    assert (first.rotation.path, first.bias.path) == (rotation, bias)
    assert why in first.rotation.why + first.bias.why
    turned = {"none": [], "in place": ["in place"], "functional": ["functional"] * 2}[rotation]
    biased = {"channels": ["channels", "merged"], "none": ["merged"], "matrix": ["merged"]}.get(bias, [bias])
    assert taken == (turned + biased) * 2
    assert (first.kernel is None) == (bias in table.PATHS)
    assert model.training is not training
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name in str(first)
    assert first.bias.why in str(first)


def test_the_kernel_is_torchs_choice():
    """On the CPU a bias that asks for gradients loses the fused kernel, a constant one does not."""
    rope, constant = (explain(vit(word), 32)[0].kernel for word in ("rope", "alibi"))
    assert rope.path == constant.path == "flash_attention"
    (line, _) = explain(vit("relative(prefix=true)"), (32, 48), training=True)
    assert line.kernel.path == "math"


def test_swin_and_a_module_alone():
    sizes = dict(img_size=(16, 24), patch_size=2, window_size=(4, 6), embed_dim=8, num_classes=3)
    lines = explain(Swin("relative", depths=(2,), num_heads=(2,), **sizes), (16, 24))
    assert [line.name for line in lines] == ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn"]
    at = Positions.grid((2, 3))
    signal = build("rope", Dims(16, 2, (2, 3)))(at)
    (line,) = explain(Attention(16, 2), torch.randn(1, 6, 16), signal, torch.ones(6, 6, dtype=torch.bool))
    assert (line.name, line.rotation.path, line.bias.path) == ("Attention", "in place", "none")


def test_what_cannot_be_explained():
    with pytest.raises(ConfigError, match="no Attention of ours"):
        explain(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    model = vit("rope")
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: explain(model, 32))
    with pytest.raises(ConfigError, match="do not nest"):
        explain(model, 32)
    assert attention.OBSERVER.get() is None
