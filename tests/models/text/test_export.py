"""Exported text models: one program for every length, within the context and beyond."""

import pytest
import torch
from torch.export import Dim, export
from torch.testing import assert_close

from vit2dpe import ENCODINGS, Seq2Seq, TextDecoder, TextEncoder, use_policy

SIZES = dict(context=8, embed_dim=24, depth=1, num_heads=2)
BATCH, LENGTH = Dim("batch", min=1, max=8), Dim("length", min=2, max=32)
FREE = {0: BATCH, 1: LENGTH}
LENGTHS = (3, 8, 9, 32)


def ids(*shape):
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(1))


def drawn(kind, word, **more):
    torch.manual_seed(0)
    vocabulary = dict(source_vocab=20, target_vocab=20) if kind is Seq2Seq else dict(vocab_size=20)
    model = kind(word, **vocabulary, **SIZES, **more).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # tables that start at zero are seen
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def check(model, inputs):
    """`inputs(batch, length)`: exported at a length within the context, right at all of them."""
    example = inputs(2, 6)
    program = export(model, example, dynamic_shapes=tuple(FREE for _ in example)).module()
    with torch.no_grad():
        for batch, length in zip((1, 3, 2, 2), LENGTHS, strict=True):
            given = inputs(batch, length)
            assert_close(program(*given), model(*given), rtol=1e-5, atol=1e-5)


def padded(batch, length):
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, length - 1 :] = False
    return ids(batch, length), valid


@pytest.mark.need("E6")
@pytest.mark.slow
@pytest.mark.parametrize("word", ENCODINGS)
@pytest.mark.parametrize("kind", [TextDecoder, TextEncoder])
def test_one_program_serves_every_length(kind, word):
    check(drawn(kind, word), lambda *shape: (ids(*shape),))


@pytest.mark.need("E6")
@pytest.mark.parametrize("pool", ["cls", *(pytest.param(p, marks=pytest.mark.slow) for p in ("mean", "max", ""))])
def test_one_program_serves_every_padded_batch(pool):
    check(drawn(TextEncoder, "rope", pool=pool), padded)


@pytest.mark.need("E6")
@pytest.mark.slow
@pytest.mark.parametrize("more", [dict(window=4), dict(kv_heads=1), dict(norm="rms", mlp="swiglu")])
def test_one_program_of_every_part(more):
    check(drawn(TextDecoder, "rope+t5", **more), lambda *shape: (ids(*shape),))
    check(drawn(TextEncoder, "learned", pool="", masked_lm=True), lambda *shape: (ids(*shape),))


@pytest.mark.need("E6")
@pytest.mark.slow
@pytest.mark.parametrize(("word", "policy", "temperature"), [
    ("rope", "yarn", "yarn"), ("rope", "ntk", None), ("rope", "interpolate", "log"), ("learned", "resize", "log"),
])  # fmt: skip
def test_a_policy_acts_by_the_length_in_one_program(word, policy, temperature):
    model = drawn(TextDecoder, word)
    with use_policy(model, policy, temperature=temperature):
        check(model, lambda *shape: (ids(*shape),))


@pytest.mark.need("E6")
@pytest.mark.slow
@pytest.mark.parametrize(("word", "cross"), [("learned", "rope"), ("t5", "relative"), ("sincos", None)])
def test_one_program_reads_sources_and_targets_of_every_length(word, cross):
    model = drawn(Seq2Seq, word, cross_position=cross)
    target = Dim("target", min=2, max=32)
    program = export(model, (ids(2, 6), ids(2, 5)), dynamic_shapes=(FREE, {0: BATCH, 1: target})).module()
    with torch.no_grad():
        for a, b in ((3, 4), (9, 4), (4, 9), (20, 30)):
            assert_close(program(ids(3, a), ids(3, b)), model(ids(3, a), ids(3, b)), rtol=1e-5, atol=1e-5)


def check_onnx(model, inputs, shapes, grad=True):
    """`inputs(batch, length)`: a file that is made at one shape is right at others."""
    import onnxruntime

    with torch.set_grad_enabled(grad):
        file = torch.onnx.export(model, inputs(2, 6), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(file.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    for batch, length in zip((1, 3, 2, 8), LENGTHS, strict=True):
        given = inputs(batch, length)
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        with torch.no_grad():
            assert_close(torch.tensor(found), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.need("E6", "C3")
@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no_grad"])
@pytest.mark.parametrize(("kind", "word"), [
    (TextDecoder, "rope"), (TextEncoder, "learned"), (TextDecoder, "t5"), (TextEncoder, "relative"),
    (TextDecoder, "fire"), (TextEncoder, "sincos+rope"), (TextDecoder, "alibi"),
])  # fmt: skip
def test_a_file_of_onnx_serves_every_length(kind, word, grad):
    check_onnx(drawn(kind, word), lambda *shape: (ids(*shape),), (FREE,), grad)


@pytest.mark.need("C3")
@pytest.mark.slow
def test_a_file_of_onnx_serves_padded_texts_and_pairs():
    check_onnx(drawn(TextEncoder, "relative"), padded, (FREE, FREE))
    target = {0: BATCH, 1: Dim("target", min=2, max=33)}
    pairs = lambda batch, length: (ids(batch, length), ids(batch, length + 1))  # noqa: E731
    check_onnx(drawn(Seq2Seq, "t5", cross_position="relative"), pairs, (FREE, target))
