"""Decoders without a matrix: the kernel's own causal order gives what the matrix gives, bit for bit on the CPU."""

from contextlib import contextmanager

import pytest
import torch

from benchmarks import devtrace
from tests.helpers import redrawn, within
from vit2dpe import ENCODINGS, Positions, Signal, attend, attention_maps, build, explain, use_policy
from vit2dpe.attention import masks
from vit2dpe.attention.cache import KVCache
from vit2dpe.attention.functional import Causal, FullMask
from vit2dpe.encodings import Dims
from vit2dpe.models.text import model as text_model
from vit2dpe.models.text.heads import TextDecoder, TextEncoder
from vit2dpe.models.text.seq2seq import Seq2Seq

WORDS = [*ENCODINGS, "t5(bidirectional=false)", "alibi(distance=squared)", "rope+alibi", "sincos+rope+relative"]
SIZES = dict(context=12, embed_dim=24, depth=2, num_heads=2, hidden=32)


def decoder(word, kind=TextDecoder, **more):
    torch.manual_seed(0)
    model = kind(word, vocab_size=13, **(SIZES | more))
    return redrawn(model, 0.4, lambda name: "norm" in name and name.endswith("weight"))


def ids(*shape):
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def by_matrix():
    """Within this context decoders pass the matrix of places and pay for empty rows, as they did."""

    def plain(self, at, keys, present, segments):
        return masks.both(
            masks.causal(at, keys) if self.causal else None,
            None if self.window is None else masks.window(at, keys, self.window),
            None if present is None else masks.present(present),
            None if segments is None else masks.same(segments, segments),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_model.TextModel, "_mask", plain)
        yield


def passed(model, tokens, **more):
    """Logits and the gradients of all parameters."""
    model.zero_grad()
    logits = model(tokens, **more)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("n", [9, 17], ids=["within the context", "beyond it"])
def test_the_order_is_the_matrix(word, n):
    model, tokens = decoder(word), ids(2, n)
    found = passed(model, tokens)
    with by_matrix():
        expected = passed(model, tokens)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


CASES = {
    "window": dict(window=3),
    "padding": dict(valid=torch.tensor([[False] * 4 + [True] * 5, [True] * 9])),
    "packed": dict(segments=torch.tensor([[0] * 4 + [1] * 5, [0] * 9])),
    "window and packed": dict(window=2, segments=torch.tensor([[0] * 4 + [1] * 5])),
}


@pytest.mark.parametrize("word", ["rope", "t5", "alibi(distance=squared)", "learned"])
@pytest.mark.parametrize("case", CASES)
def test_other_masks_are_as_they_were(word, case):
    """Rows are not checked for being empty where a token attends to itself; under padding they are, and give 0."""
    more = dict(CASES[case])
    model = decoder(word, window=more.pop("window", None))
    found = passed(model, ids(2, 9), **more)
    with by_matrix():
        expected = passed(model, ids(2, 9), **more)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("word", ["rope", "rope_mixed", "t5", "alibi", "learned", "fire", "none"])
@pytest.mark.parametrize("valid", [None, torch.tensor([[False] * 3 + [True] * 2, [True] * 5])], ids=["whole", "padded"])
def test_decoding_is_as_it_was(word, valid):
    """One token at a time needs no order, several together do; padding is never seen."""
    model, tokens = decoder(word).eval(), ids(2, 11)

    def decoded():
        cache, out = KVCache(11), []
        for part in tokens.split((5, 1, 1, 3, 1), dim=1):
            out.append(model(part, None if valid is None or out else valid, cache=cache))
        return torch.cat(out, dim=1)

    with torch.no_grad():
        found = decoded()
        with by_matrix():
            expected = decoded()
    within(2e-6, relative=True)(found, expected)  # without a mask torch takes another kernel, and other sums


@pytest.mark.parametrize("word", ["rope", "alibi", "sincos"])
def test_a_decoder_that_reads_is_as_it_was(word):
    sizes = dict(source_vocab=13, target_vocab=13, **SIZES)
    torch.manual_seed(0)
    model = redrawn(Seq2Seq(word, cross_position="rope", **sizes), 0.4, lambda name: False)
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = model(ids(2, 6), ids(2, 9), valid)
    with by_matrix():
        assert torch.equal(found, model(ids(2, 6), ids(2, 9), valid))


@pytest.mark.parametrize("word", ["rope", "t5", "alibi(distance=squared)"])
def test_the_kernel_is_given_what_it_takes(word, monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append((kwargs["is_causal"], kwargs["attn_mask"] is None))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    model, cache = decoder(word).eval(), KVCache(9)
    model(ids(2, 7))
    # A bias that is a product becomes channels, and leaves the order to the kernel; another one needs the matrix.
    assert set(calls) == {(False, False) if word == "t5" else (True, True)}
    model(ids(2, 7), cache=cache)
    calls.clear()
    model(ids(2, 1), cache=cache)
    assert set(calls) == {(False, word != "t5")}


def test_a_temperature_and_a_policy_go_with_it():
    model, tokens = decoder("rope+alibi"), ids(2, 17)
    with use_policy(model, "interpolate", temperature=True):
        found = model(tokens)
        with by_matrix():
            assert torch.equal(found, model(tokens))


@pytest.mark.parametrize("word", ["rope", "t5"])
def test_checkpointed_blocks_and_maps_are_the_same(word):
    model, tokens = decoder(word), ids(2, 9)
    expected = passed(model, tokens)
    model.set_grad_checkpointing()
    for one, other in zip(passed(model, tokens), expected, strict=True):
        assert torch.equal(one, other)
    with attention_maps(model) as maps:
        model(tokens)
    for one in maps.values():
        assert (one.triu(1) == 0).all()
        assert (one.tril() > 0).any(dim=-1).all()
        within(1e-6)(one.sum(-1), torch.ones(2, 2, 9))


def test_explain_names_it():
    first = explain(decoder("rope"), ids(2, 9))[0]
    assert (first.mask.path, first.kernel.path) == ("causal", "flash_attention")
    assert f"mask causal ({first.mask.why}); kernel flash_attention" in str(first)
    assert explain(decoder("t5"), ids(2, 9))[0].mask.path == "matrix"
    assert explain(decoder("rope", window=3), ids(2, 9))[0].mask.path == "matrix"
    free = explain(decoder("rope", TextEncoder), ids(2, 9))[0]
    assert free.mask.path == "none"
    assert "mask" not in str(free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("word", [None, "relative"])
def test_leading_tokens_come_first_in_the_order(word, dtype):
    at = Positions.grid((2, 3)).with_prefix(2)
    signal = Signal() if word is None else build(word, Dims(16, 2, (2, 3)))(at)
    q, k, v = (torch.randn(3, 2, 8, 8, dtype=dtype) for _ in range(3))
    wanted = attend(q, k, v, signal, torch.ones(8, 8, dtype=torch.bool).tril())
    assert torch.equal(attend(q, k, v, signal, Causal(at)), wanted)
    with pytest.raises(ValueError, match="Causal is for 8 tokens, queries and keys alike, got 7 queries and 8 keys"):
        attend(q[:, :, 1:], k, v, Signal(), Causal(at))


def test_a_full_mask_is_not_checked():
    q = torch.randn(1, 1, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(attend(q, q, q, mask=FullMask(mask)), attend(q, q, q, mask=mask))


@pytest.mark.parametrize("word", ["rope", "learned", "t5", "alibi"])
def test_it_launches_what_an_encoder_launches(word):
    """Six blocks on fake CUDA in bfloat16. A bias is merged with the matrix in each block, and no row is checked."""
    found = []
    for kind in (TextDecoder, TextEncoder):
        model = kind(word, vocab_size=50, context=64, embed_dim=48, depth=6, num_heads=3)
        with devtrace.fake_cuda() as recorder:
            devtrace.on_fake_cuda(model).eval()
            tokens = torch.zeros(2, 64, dtype=torch.long, device="cuda")
            with recorder() as recorded, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                model.forward_features(tokens)
        assert recorded.traffic.stalls == 0
        found.append(recorded.traffic.kernels.total())
    causal, free = found
    assert causal == free + {"t5": 2 + 6 * 4, "alibi": 2 + 6 * 4}.get(word, 0)


def captured(graphs):
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return backend


def test_it_compiles_whole_without_a_matrix():
    model, tokens, graphs = decoder("rope").eval(), ids(2, 9), []
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=captured(graphs))(tokens)
        within(2e-5, relative=True)(found, model(tokens))
    (graph,) = graphs
    kernels = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert [(node.kwargs["is_causal"], node.kwargs["attn_mask"]) for node in kernels] == [(True, None)] * 2


def test_blocks_that_are_compiled_are_one_graph():
    """With biases too: whether another block has made the matrix before is no part of a graph."""
    model, tokens, graphs = decoder("alibi", depth=3).eval(), ids(2, 9), []
    torch._dynamo.reset()
    expected, backend = model(tokens), captured(graphs)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        within(2e-5, relative=True)(model(tokens), expected)
    assert len(graphs) == 1
