"""Words beside sines: a model learns with them, and a checkpoint stays the function that was trained."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch.testing import assert_close

from vit2dpe import ENCODINGS, Dims, Positions, Seq2Seq, TextDecoder, TextEncoder, build, load_run
from vit2dpe.training import save_model
from vit2dpe.training.initial_weights import load_weights

SIZES = dict(vocab_size=12, context=7, embed_dim=48, depth=1, num_heads=3)
PAIR = dict(source_vocab=12, target_vocab=12, context=7, embed_dim=48, depth=1, num_heads=3)
KEY = "word_scale._extra_state"


def ids(*shape, seed=1):
    return torch.randint(1, 12, shape, generator=torch.Generator().manual_seed(seed))


def drawn(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.need("E4")
def test_an_encoder_decoder_learns_to_reverse_with_its_default():
    """Of the numbers 9 in 100 are right by chance, and were: beside the sines the words were not seen."""
    torch.manual_seed(1)
    model = Seq2Seq(**PAIR, shared=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        x = torch.randint(1, 12, (32, 6))
        y = x.flip(1)
        loss = F.cross_entropy(model(x, F.pad(y[:, :-1], (1, 0))).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = ids(100, 6)
    with torch.no_grad():
        written = model.eval()(x, F.pad(x.flip(1)[:, :-1], (1, 0))).argmax(-1)
    assert float((written == x.flip(1)).float().mean()) > 0.9


@pytest.mark.need("E4")
@pytest.mark.parametrize("word", ["sincos", "sincos+alibi", "rope+sincos(base=100)"])
@pytest.mark.parametrize("kind", [TextEncoder, TextDecoder])
def test_words_beside_sines_are_those_of_the_paper(kind, word):
    """Times √D, at the start as large as the sines within a factor of ten; the first loss is near that of chance."""
    model, plain = drawn(lambda: kind(word, **SIZES)), drawn(lambda: kind(word, **SIZES, embed_scale=48**0.5))
    assert_close(model(ids(2, 6)), plain(ids(2, 6)), rtol=0, atol=0)
    assert (KEY in model.state_dict(), KEY in plain.state_dict()) == (True, False)
    token = build(word, Dims(48, 3, (7,)))(Positions.sequence(7)).token
    assert 0.1 < float((model.embed.weight.detach().std() * 48**0.5) / token.std()) < 10
    if kind is TextDecoder:
        loss = F.cross_entropy(model(ids(80, 7)).flatten(0, 1), ids(560, seed=2)).detach()
        assert float(loss) == pytest.approx(math.log(12), abs=0.1)


@pytest.mark.need("E4")
@pytest.mark.parametrize("word", [word for word in ENCODINGS if word != "sincos"])
def test_words_beside_anything_else_are_what_they_were(word):
    """No other encoding adds to tokens what is much larger than a word, from place to place."""
    model = drawn(lambda: TextEncoder(word, **SIZES))
    plain = drawn(lambda: TextEncoder(word, **SIZES, embed_scale=1.0))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_close(model(ids(2, 6)), plain(ids(2, 6)), rtol=0, atol=0)
    token = model.position(Positions.sequence(7)).token
    if token is not None:
        assert float((token - token.mean(1, keepdim=True)).detach().std()) < 3 * 0.02


@pytest.mark.need("E4")
def test_weights_that_were_trained_without_a_scale_stay_their_function(tmp_path):
    """A bare state_dict, a safetensors file, a run with its spec, of an encoder, a decoder and both."""
    old = drawn(lambda: Seq2Seq("sincos", **PAIR, shared=True, embed_scale=1.0))
    wanted = old(ids(2, 5), ids(2, 4))
    assert not any("_extra_state" in name for name in old.state_dict())
    model = Seq2Seq("sincos", **PAIR, shared=True).eval()
    model.load_state_dict(load(save({n: v.clone() for n, v in old.state_dict().items()})))
    assert_close(model(ids(2, 5), ids(2, 4)), wanted, rtol=0, atol=0)
    again = Seq2Seq("sincos", **PAIR, shared=True).eval()
    again.load_state_dict(model.state_dict())  # and saved once more
    assert_close(again(ids(2, 5), ids(2, 4)), wanted, rtol=0, atol=0)
    before = dict(position="sincos", shared=True) | PAIR  # the arguments in a run from before
    save_model(tmp_path / "last", old, before)
    assert_close(load_run(tmp_path)(ids(2, 5), ids(2, 4)), wanted, rtol=0, atol=0)
    started = Seq2Seq("sincos", **PAIR, shared=True).eval()
    load_weights(started, tmp_path)
    assert_close(started(ids(2, 5), ids(2, 4)), wanted, rtol=0, atol=0)


@pytest.mark.need("E4")
def test_a_scale_goes_with_its_weights(tmp_path):
    trained = drawn(lambda: TextDecoder("sincos", **SIZES))
    wanted = trained(ids(2, 5))
    save_model(tmp_path / "last", trained, dict(position="sincos") | SIZES)
    assert_close(load_run(tmp_path)(ids(2, 5)), wanted, rtol=0, atol=0)
    named = TextDecoder("sincos", **SIZES, embed_scale=48**0.5).eval()
    named.load_state_dict(trained.state_dict())
    assert_close(named(ids(2, 5)), wanted, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"word_scale"):
        TextDecoder("sincos", **SIZES, embed_scale=1.0).load_state_dict(trained.state_dict())
    half = drawn(lambda: TextDecoder("sincos", **SIZES))
    half.load_state_dict({"norm.weight": half.norm.weight.detach()}, strict=False)  # a part that is not words
    assert_close(half(ids(2, 5)), wanted, rtol=0, atol=0)
    assert half.to(torch.bfloat16).word_scale.scale == 48**0.5
