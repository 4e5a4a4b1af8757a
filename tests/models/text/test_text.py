"""Text models: what holds for every encoding, and what the models promise beyond that."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import randn, redrawn, within
from vit2dpe import ConfigError, Positions, use_policy
from vit2dpe.attention import masks
from vit2dpe.attention.cache import KVCache
from vit2dpe.attention.contract import contract
from vit2dpe.attention.functional import attend
from vit2dpe.attention.modules import Attention
from vit2dpe.encodings import ENCODINGS, Dims, build, encodings_of
from vit2dpe.models.text.generate import beam_search, generate, pick
from vit2dpe.models.text.heads import TextDecoder, TextEncoder
from vit2dpe.models.text.model import Encoded, pack, pad
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.signal import Dense
from vit2dpe.testing import randomise

WORDS = [*ENCODINGS, "t5(bidirectional=false)", "learned+alibi", "sincos+rope+relative"]
SIZES = dict(vocab_size=13, context=12, embed_dim=24, depth=2, num_heads=2, hidden=32)
each_encoding = pytest.mark.parametrize("word", WORDS)


def drawn(kind, word, **more):
    """A model in evaluation mode, its parameters far from what they were initialised to."""
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if kind is Seq2Seq:
        sizes["source_vocab"] = sizes["target_vocab"] = sizes.pop("vocab_size")
    model = kind(word, **(sizes | more))
    return redrawn(model, 0.4, lambda name: "norm" in name and name.endswith("weight"))


def ids(*shape, seed=1):
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(seed))


close = within(2e-5, relative=True)


# --- for every encoding


@each_encoding
def test_the_encoding_is_at_work(word):
    """Without it these tests would prove nothing: an encoder tells the order of its tokens, but for `none`."""
    model, tokens = drawn(TextEncoder, word), torch.arange(7)[None]
    assert torch.allclose(model(tokens), model(tokens.roll(2)), atol=1e-4) == (word == "none")


@each_encoding
@pytest.mark.parametrize("n", [9, 17], ids=["within the context", "beyond it"])
def test_cached_decoding_is_the_full_pass(word, n):
    model, tokens, cache = drawn(TextDecoder, word), ids(2, n), KVCache(n)
    full = model(tokens)
    parts = [model(part, cache=cache) for part in tokens.split((4, 1, 1, n - 6), dim=1)]
    close(torch.cat(parts, dim=1), full)


@each_encoding
def test_the_future_is_not_seen(word):
    model, tokens = drawn(TextDecoder, word), ids(1, 10)
    before = model(tokens)
    for t in range(9):
        other = tokens.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 13
        after = model(other)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.allclose(after[:, t + 1], before[:, t + 1])


@each_encoding
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", [TextDecoder, TextEncoder])
def test_a_padded_batch_is_the_unpadded_one(word, kind, left):
    model = drawn(kind, word)
    texts = [ids(n, seed=n) for n in (3, 8, 5)]
    tokens, valid = pad(texts, left=left)
    out, other = model.forward_features(tokens, valid), model.forward_features((tokens + 5 * ~valid) % 13, valid)
    for text, row, keep, row2 in zip(texts, out, valid, other, strict=True):
        close(row[keep], model.forward_features(text[None])[0])
        assert torch.equal(row2[keep], row[keep])  # whatever the padding is


@each_encoding
def test_decoding_goes_on_from_a_left_padded_batch(word):
    model, new = drawn(TextDecoder, word), 4
    texts = [ids(n, seed=n) for n in (3, 7, 5)]
    tokens, valid = pad(texts, left=True)
    together = generate(model, tokens, new, valid=valid, temperature=0)
    for text, row in zip(texts, together, strict=True):
        alone = generate(model, text[None], new, temperature=0)[0]
        assert torch.equal(row[-len(alone) :], alone)


@each_encoding
@pytest.mark.parametrize("kind", [TextDecoder, TextEncoder])
def test_a_packed_batch_is_the_padded_one(word, kind):
    model = drawn(kind, word)
    texts = [ids(n, seed=n) for n in (3, 12, 5, 1)]
    tokens, segments = pack(texts)
    packed = model.forward_features(tokens, segments=segments)[0]
    padded, valid = pad(texts)
    close(packed, model.forward_features(padded, valid)[valid])
    close(packed, model.forward_features(tokens, segments=segments.numbers)[0])  # by a mask of all pairs


@each_encoding
@pytest.mark.parametrize("extent", [(12,), (4, 6)], ids=["line", "grid"])
def test_a_window_from_positions_is_the_dense_one(word, extent):
    """Logits outside the window at minus infinity, the window counted out by hand."""
    dims, at = Dims(24, 2, extent), Positions.grid(extent).with_prefix(1)
    encoding = randomise(build(word, dims)).eval()
    signal, reach = encoding(at), (2,) if len(extent) == 1 else (1, 2)
    q, k, v = randn(3, 1, 2, 1 + at.coords.shape[1], 12)
    got = attend(q, k, v, signal, masks.window(at, at, reach))
    places = [None, *[tuple(int(c) for c in p) for p in at.coords[0]]]
    for i, here in enumerate(places):
        seen = [
            j
            for j, there in enumerate(places)
            if here is None or there is None
            or all(abs(a - b) <= r for a, b, r in zip(here, there, reach, strict=True))
        ]  # fmt: skip
        part = signal._replace(
            q_rotation=signal.q_rotation and type(signal.q_rotation)(*(t[..., [i], :] for t in signal.q_rotation)),
            k_rotation=signal.k_rotation and type(signal.k_rotation)(*(t[..., seen, :] for t in signal.k_rotation)),
            bias=tuple(Dense(t.dense()[..., [i], :][..., seen]) for t in contract(signal, q, k).bias),
        )
        close(got[..., [i], :], attend(q[..., [i], :], k[..., seen, :], v[..., seen, :], part))


class Count(TorchDispatchMode):
    """Numbers that operators wrote, and the size of the largest tensor among them; views write nothing."""

    def __init__(self):
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.total, self.largest = self.total + sum(sizes), max([self.largest, *sizes])
        return out


@each_encoding
def test_a_decode_step_costs_as_much_as_there_are_tokens(word):
    """Numbers written by a step after n tokens: twice the tokens, at most twice the numbers."""
    model, cost, largest = drawn(TextDecoder, word, context=16, depth=1), {}, {}
    for n in (64, 128, 256):
        cache = KVCache(2 * 256)
        with torch.inference_mode():
            model(ids(1, n), cache=cache)
            with Count() as count:
                model(ids(1, 1), cache=cache)
        cost[n], largest[n] = count.total, count.largest
    assert cost[256] - cost[128] <= 2.05 * (cost[128] - cost[64])
    assert largest[256] <= 4 * largest[64]


def test_a_full_pass_does_cost_the_square():
    """The counter of the test above sees it."""
    model, cost = drawn(TextDecoder, "alibi"), {}
    for n in (64, 128, 256):
        with torch.inference_mode(), Count() as count:
            model(ids(1, n))
        cost[n] = count.total
    assert cost[256] - cost[128] > 3 * (cost[128] - cost[64])


@pytest.mark.parametrize("word", ["rope", "rope_mixed", "t5", "alibi", "learned", "fire", "none"])
@pytest.mark.parametrize("window", [0, 3])
def test_a_sliding_window_decodes_as_it_reads(word, window):
    model, tokens, cache = drawn(TextDecoder, word, window=window), ids(2, 10), KVCache(10)
    full = model(tokens)
    close(torch.cat([model(part, cache=cache) for part in tokens.split(3, dim=1)], dim=1), full)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 13
    changed = (model(other) - full).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [i <= 2 * window for i in range(10)]  # two blocks


# --- encoder and decoder together


@pytest.mark.parametrize("cross", [None, "rope", "t5", "alibi", "fire(shared=true)", "rope+alibi"])
def test_a_decoder_that_reads_is_the_same_with_a_cache(cross):
    model, source, target = drawn(Seq2Seq, "sincos", cross_position=cross), ids(2, 15), ids(2, 7, seed=2)
    memory, cache, full = model.encode(source), KVCache(7), model(source, target)
    parts = [model.decoder(part, memory=memory, cache=cache) for part in target.split((3, 1, 3), dim=1)]
    close(torch.cat(parts, dim=1), full)
    if cross is not None:  # it is at work: the memory's order is seen even where the encoder has none
        blind = drawn(Seq2Seq, "none", cross_position=cross)
        assert not torch.allclose(blind(source, target), blind(source.roll(2, 1), target), atol=1e-3)
    blind = drawn(Seq2Seq, "none")
    close(blind(source, target), blind(source.roll(2, 1), target))


@pytest.mark.parametrize("cross", [None, "rope", "t5"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_of_both_sides_changes_nothing(cross, left):
    model = drawn(Seq2Seq, "learned", cross_position=cross)
    sources, targets = [ids(n, seed=n) for n in (3, 9)], [ids(n, seed=n) for n in (6, 2)]
    (source, sv), (target, tv) = pad(sources, left=left), pad(targets, left=left)
    out = model(source, target, sv, tv)
    for s, t, row, keep in zip(sources, targets, out, tv, strict=True):
        close(row[keep], model(s[None], t[None])[0])


def test_the_decoder_reads_the_source():
    model, target = drawn(Seq2Seq, "sincos"), ids(2, 5)
    assert not torch.allclose(model(ids(2, 6), target), model(ids(2, 6, seed=3), target), atol=1e-3)


# --- policies


@pytest.mark.parametrize("policy", ["extrapolate", "interpolate", "ntk", "yarn"])
@pytest.mark.parametrize("temperature", [None, "log", "yarn"])
def test_a_policy_holds_from_the_first_token_of_a_cache(policy, temperature):
    """The scale is that of the cache's length, whatever has been seen of it."""
    model, tokens, cache = drawn(TextDecoder, "rope"), ids(2, 30), KVCache(30)
    plain = model(tokens)
    with use_policy(model, policy, temperature=temperature):
        full = model(tokens)
        close(torch.cat([model(part, cache=cache) for part in tokens.split(7, dim=1)], dim=1), full)
        close(model(tokens[:, :12]), plain[:, :12])  # within the context nothing changes
    assert torch.allclose(full, plain, atol=1e-3) == (policy == "extrapolate" and temperature is None)


def test_a_policy_reaches_both_halves_of_a_seq2seq():
    model, source, target = drawn(Seq2Seq, "rope"), ids(1, 20), ids(1, 20, seed=2)
    memory = model.encode(source)
    with use_policy(model, "ntk", temperature="log"):
        both = model(source, target)
        changed = model.encode(source)
        decoder = model.decoder(target, memory=memory)
    assert not torch.allclose(changed.tokens, memory.tokens, atol=1e-3)
    assert not torch.allclose(decoder, model.decoder(target, memory=memory), atol=1e-3)
    close(both, both)
    close(model.encode(source).tokens, memory.tokens)


def test_a_short_text_uses_the_first_rows_of_a_table():
    model, tokens = drawn(TextEncoder, "learned", pool=""), ids(1, 5)
    rows = model.position.pos_embed[0, :5]
    assert torch.equal(model.position(model.positions(tokens)).token[0], rows)


# --- the cache


def test_a_cache_can_be_reordered_and_reset():
    model = drawn(TextDecoder, "rope+t5")
    tokens, valid = pad([ids(n, seed=n) for n in (3, 6, 5)], left=True)
    cache, index, more = KVCache(8), torch.tensor([2, 0, 0, 1]), ids(4, 1)
    model(tokens, valid, cache=cache)
    cache.reorder(index)
    all_tokens = torch.cat([tokens[index], more], dim=1)
    all_valid = torch.cat([valid[index], torch.ones(4, 1, dtype=torch.bool)], dim=1)
    close(model(more, cache=cache)[:, -1], model(all_tokens, all_valid)[:, -1])
    cache.reset()
    assert cache.size == 0
    close(model(tokens[:, -3:], cache=cache), model(tokens[:, -3:]))


def test_a_full_cache_refuses_more():
    model, cache = drawn(TextDecoder, "rope"), KVCache(5)
    model(ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="holds 5 tokens and was given 6"):
        model(ids(1, 2), cache=cache)
    model(ids(1, 1), cache=cache)  # nothing was taken in


@pytest.mark.parametrize("word", ["alibi", "rope", "t5+sincos"])
def test_fewer_heads_of_keys_are_those_heads_repeated(word):
    few = drawn(TextDecoder, word, num_heads=4, kv_heads=2)
    many = drawn(TextDecoder, word, num_heads=4)
    state = few.state_dict()
    for name in [name for name in state if "qkv" in name]:
        q, k, v = state[name].unflatten(0, (-1, 6)).split((4, 2, 2))
        state[name] = torch.cat([q, *(t.repeat_interleave(2, 0) for t in (k, v))]).flatten(0, 1)
    many.load_state_dict(state)
    tokens, cache = ids(2, 9), KVCache(9)
    close(few(tokens), many(tokens))
    close(torch.cat([few(part, cache=cache) for part in tokens.split(2, 1)], 1), many(tokens))
    assert cache.layer(0).keys.shape == (2, 2, 9, 6)


# --- writing


def probable(model, prompt, tokens, stop=-1):
    """log p(tokens | prompt), up to the first stop."""
    both = torch.cat([prompt, tokens], dim=1)
    steps = model(both)[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    ended = (tokens == stop).cumsum(1) - (tokens == stop).int() > 0
    return steps.gather(-1, tokens[..., None])[..., 0].masked_fill(ended, 0).sum(1)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("word", ["learned", "rope", "fire"])
def test_greedy_is_the_likeliest_token_each_time(word, cached):
    model, tokens = drawn(TextDecoder, word), ids(2, 3)
    out = generate(model, tokens, 8, temperature=0, cached=cached)
    for n in range(3, 11):
        assert torch.equal(out[:, n], model(out[:, :n])[:, -1].argmax(-1))


@pytest.mark.parametrize("word", ["none", "learned", "t5", "rope", "fire"])
def test_beyond_the_context_the_newer_half_is_read_again(word):
    """Context 12: after 12 tokens the last 6 are a line of their own, and the next token is the seventh of it."""
    model, tokens = drawn(TextDecoder, word), ids(1, 10)
    out = generate(model, tokens, 10, temperature=0)
    assert torch.equal(out, generate(model, tokens, 10, temperature=0, cached=False))
    line = list(range(10))
    for n in range(10, 20):
        assert int(out[0, n]) == int(model(out[:, line])[0, -1].argmax())
        line = [*(line[-6:] if len(line) == 12 else line), n]
    long = generate(model, torch.cat([ids(1, 30, seed=5), tokens], 1), 2, temperature=0)  # only its end is read
    assert int(long[0, 40]) == int(model(long[:, 28:40])[0, -1].argmax())


@pytest.mark.need("E2")
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("left", [True, False])
@each_encoding
def test_each_text_of_a_padded_batch_slides_by_its_own_length(word, left, cached):
    model, new = drawn(TextDecoder, word), 16
    texts = [ids(n, seed=n) for n in (1, 15, 7, 12)]
    tokens, valid = pad(texts, left=left)
    together = generate(model, tokens, new, valid=valid, temperature=0, cached=cached)
    for text, row in zip(texts, together, strict=True):
        assert torch.equal(row[-new:], generate(model, text[None], new, temperature=0, cached=cached)[0, -new:])


SCALES = [("default", None), ("interpolate", None), ("ntk", None), ("yarn", "yarn"), ("extrapolate", "log")]


@pytest.mark.need("E1")
@pytest.mark.parametrize(("policy", "temperature"), SCALES)
@each_encoding
def test_beyond_the_context_a_text_is_what_it_is_alone_or_refused(word, policy, temperature):
    model = drawn(TextDecoder, word)
    if any(policy not in ("default", *e.policies) for e in encodings_of(model)):
        return
    measured = temperature or any("resize" in e.policies for e in encodings_of(model)) or "dinov3" in word
    measured = measured or (encodings_of(model) and policy not in ("default", "extrapolate"))
    with torch.no_grad(), use_policy(model, policy, temperature=temperature):
        for lengths in ((17, 17, 17), (5,), (5, 17, 14), (5, 3, 12)):
            texts = [ids(n, seed=n) for n in lengths]
            for left in (True, False):
                tokens, valid = (t[:-1] for t in pad([*texts, ids(19)], left=left))  # with columns of padding alone
                if lengths == (5, 17, 14) and measured:
                    with pytest.raises(ConfigError, match=r"of 12 .* and 17 tokens .* neighbours"):
                        model(tokens, valid)
                    with pytest.raises(ConfigError, match="neighbours"):
                        generate(model, tokens, 2, valid=valid, overflow="extend")
                    continue
                for text, row, keep in zip(texts, model(tokens, valid), valid, strict=True):
                    close(row[keep], model(text[None])[0], tolerance=1e-4)


def test_beyond_the_context_the_line_may_grow():
    model, tokens = drawn(TextDecoder, "rope"), ids(1, 10)
    with use_policy(model, "ntk"):
        out = generate(model, tokens, 8, temperature=0, overflow="extend")
        last = model(out[:, :-1], cache=KVCache(18))[:, -1]
    assert int(out[0, -1]) == int(last.argmax())
    with pytest.raises(ConfigError, match="unknown overflow 'grow'"):
        generate(model, tokens, 8, overflow="grow")


def test_a_seed_gives_the_same_text():
    model, tokens = drawn(TextDecoder, "rope"), ids(1, 3).expand(4, -1)
    one, two = (generate(model, tokens, 9, temperature=2.0, seed=s) for s in (1, 2))
    assert torch.equal(one, generate(model, tokens, 9, temperature=2.0, seed=1))
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, tokens, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    many, generator = logits.expand(20_000, -1), torch.Generator().manual_seed(0)

    def shares(**settings):
        return pick(many, generator=generator, **settings).bincount(minlength=5) / 20_000

    p = logits.softmax(-1)[0]
    assert (shares() - p).abs().max() < 0.01
    assert (shares(temperature=0.5) - (2 * logits).softmax(-1)[0]).abs().max() < 0.01
    assert (shares(top_k=2) - F_pad(p[:2] / p[:2].sum())).abs().max() < 0.01
    assert shares(temperature=0)[0] == 1
    # The least number of tokens that reach the share: the first alone has 0.636, the first two 0.870.
    assert shares(top_p=0.63)[0] == 1
    assert (shares(top_p=0.64) - F_pad(p[:2] / p[:2].sum())).abs().max() < 0.01
    assert shares(top_p=0.86)[2] == 0
    assert shares(top_p=0.88)[2] > 0
    assert shares(top_p=1e-9)[0] == 1


def F_pad(p):
    return torch.nn.functional.pad(p, (0, 5 - len(p)))


def test_a_stopped_text_stays_stopped():
    model, tokens = drawn(TextDecoder, "rope"), ids(6, 3)
    out = generate(model, tokens, 15, temperature=3.0, stop=4, seed=0)
    for row in out[:, 3:].tolist():
        assert 4 not in row or set(row[row.index(4) :]) == {4}
    assert (out[:, -1] == 4).any()
    free = generate(model, tokens, 15, temperature=3.0, seed=0)
    first = (out[:, 3:] == 4).int().argmax(1)[0]
    assert torch.equal(out[0, : 4 + first], free[0, : 4 + first])


@pytest.mark.parametrize("word", ["rope", "learned", "t5"])
def test_a_wide_beam_finds_the_likeliest_text(word):
    """169 beams of 13² texts of two tokens are all of them; 12 (13 with the stopped one) are enough for the first."""
    model, prompt = drawn(TextDecoder, word), ids(2, 4)
    out = beam_search(model, prompt, 2, stop=0, beams=169, length_penalty=0.0)
    every = torch.cartesian_prod(torch.arange(13), torch.arange(13))
    every = every[(every[:, 0] != 0) | (every[:, 1] == 0)]
    for b in range(2):
        score = probable(model, prompt[[b]].expand(len(every), -1), every, stop=0)
        assert out[b, 4:].tolist() == every[score.argmax()].tolist()[: out.shape[1] - 4]


def test_one_beam_is_greedy_and_more_are_no_worse():
    model, prompt = drawn(TextDecoder, "rope"), ids(3, 4)
    greedy = generate(model, prompt, 6, temperature=0, stop=0)
    one = beam_search(model, prompt, 6, stop=0, beams=1)
    assert torch.equal(one, greedy)
    four = beam_search(model, prompt, 6, stop=12, beams=4, length_penalty=0.0)
    greedy = generate(model, prompt, 6, temperature=0, stop=12)
    assert (probable(model, prompt, four[:, 4:], 12) >= probable(model, prompt, greedy[:, 4:], 12) - 1e-4).all()


def test_a_length_penalty_prefers_longer_texts():
    model, prompt = drawn(TextDecoder, "rope"), ids(8, 4)
    short, long = (beam_search(model, prompt, 10, stop=0, beams=6, length_penalty=p) for p in (0.0, 3.0))
    assert (long[:, 4:] != 0).sum() > (short[:, 4:] != 0).sum()


def test_beams_of_a_seq2seq_with_padding_are_those_of_each_sample():
    model = drawn(Seq2Seq, "sincos", cross_position="rope")
    sources = [ids(n, seed=n) for n in (3, 8)]
    source, valid = pad(sources)
    start = torch.zeros(2, 1, dtype=torch.long)
    settings = dict(stop=1, beams=3)
    together = beam_search(model.decoder, start, 5, memory=model.encode(source, valid), **settings)
    sampled = generate(model.decoder, start, 5, memory=model.encode(source, valid), temperature=0)
    for s, row, greedy in zip(sources, together, sampled, strict=True):
        alone = beam_search(model.decoder, start[:1], 5, memory=model.encode(s[None]), **settings)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert torch.equal(
            greedy, generate(model.decoder, start[:1], 5, memory=model.encode(s[None]), temperature=0)[0]
        )


# --- heads, parts, training


def test_pooling_is_over_tokens_that_are_there():
    texts = [ids(n, seed=n) for n in (3, 6)]
    for left in (False, True):
        tokens, valid = pad(texts, left=left)
        for pool in ("cls", "mean", "max"):
            model = drawn(TextEncoder, "sincos", pool=pool, num_classes=4)
            out = model(tokens, valid)
            assert out.shape == (2, 4)
            for text, row in zip(texts, out, strict=True):
                x = model.forward_features(text[None])
                pooled = {"cls": x[:, 0], "mean": x.mean(1), "max": x.amax(1)}[pool]
                close(row[None], model.head(pooled))


def test_heads_on_every_token():
    tokens = ids(2, 5)
    assert drawn(TextEncoder, "rope", pool="", num_classes=3)(tokens).shape == (2, 5, 3)
    masked = drawn(TextEncoder, "rope", pool="", masked_lm=True)
    assert masked(tokens).shape == (2, 5, 13)
    assert drawn(TextEncoder, "rope", pool="")(tokens).shape == (2, 5, 24)
    assert drawn(TextDecoder, "rope", tied=False)(tokens).shape == (2, 5, 13)


PARTS = [
    dict(norm="rms", mlp="swiglu", bias=False, qk_norm=True),
    dict(post_norm=True, mlp="geglu", embed_norm=True, token_types=2),
    dict(mlp="relu", drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1, embed_scale=5.0),
    dict(mlp="geglu_tanh", norm="rms", scale=1.0, kv_heads=1),
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "-".join(p))
@pytest.mark.parametrize("kind", [TextEncoder, TextDecoder, Seq2Seq])
def test_every_parameter_learns(kind, parts):
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if kind is Seq2Seq:
        sizes["source_vocab"] = sizes["target_vocab"] = sizes.pop("vocab_size")
    model = kind("rope+t5+learned", **sizes, **parts).train()
    out = model(ids(2, 6), ids(2, 7)) if kind is Seq2Seq else model(ids(2, 6))
    (out.float() ** 3).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_checkpointing_gives_the_same_gradients():
    model, tokens = drawn(TextDecoder, "rope+t5"), ids(2, 6)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(tokens).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_initial_logits_are_near_uniform():
    torch.manual_seed(0)
    model = TextDecoder("rope", vocab_size=65, context=16, embed_dim=64)
    with torch.no_grad():
        logits = model(torch.randint(65, (8, 16))).flatten(0, 1)
    assert abs(float(torch.nn.functional.cross_entropy(logits, torch.randint(65, (128,)))) - 4.174) < 0.1


@pytest.mark.parametrize("word", ["rope+t5+learned", "rope_mixed+fire"])
def test_it_compiles_whole(word):
    model, tokens = drawn(TextDecoder, word), ids(2, 9)
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), model(tokens))


@pytest.mark.parametrize("word", ["rope", "learned+alibi", "t5"])
def test_bfloat16_is_near(word):
    model, tokens = drawn(TextDecoder, word, embed_norm=True), ids(2, 9)
    full = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens).float()
    assert (half - full).abs().mean() < 0.05 * full.abs().mean()


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_heads=5), "embed_dim must be a multiple of num_heads"),
        (dict(num_heads=4, kv_heads=3), "and this of kv_heads"),
        (dict(norm="batch"), "unknown norm_layer 'batch'"),
        (dict(mlp="swigl"), "did you mean 'swiglu'"),
        (dict(pool="meen"), "did you mean 'mean'"),
        (dict(context=0), "context must be at least 1, got 0"),
        (dict(cross_position="rope"), "for models with cross-attention"),
        (dict(cross=True, cross_position="sincos"), "adds to tokens"),
        (dict(masked_lm=True), "pool=''"),
        (dict(position="ropes"), "did you mean 'rope'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        TextEncoder(**(SIZES | settings))


def test_ragged_batches_of_another_kind_are_refused_by_name():
    model = drawn(TextDecoder, "rope")
    nested = torch.nested.nested_tensor([ids(3), ids(5)], layout=torch.jagged)
    with pytest.raises(ConfigError, match="nested tensors are not taken: pad"):
        model(nested)
    tokens, segments = pack([ids(3), ids(5)])
    with pytest.raises(ConfigError, match="neither padding nor a cache"):
        model(tokens, segments=segments, cache=KVCache(9))
    with pytest.raises(ConfigError, match="13 tokens, the line 12: name"):
        model(*pack([ids(13)])[:1], segments=pack([ids(13)])[1])
    close(model(ids(1, 13), segments=torch.zeros(1, 13), length=13), model(ids(1, 13)))
    with pytest.raises(ConfigError, match="many documents in a row"):
        drawn(TextEncoder, "rope")(tokens, segments=segments)
    with pytest.raises(ValueError, match="boolean"):
        model(ids(2, 3), torch.ones(2, 3))
    with pytest.raises(ConfigError, match="list of at least one sequence"):
        pack([])


@each_encoding
@pytest.mark.parametrize("kind", [TextDecoder, TextEncoder, Seq2Seq])
def test_nested_tensors_are_refused_whatever_the_encoding(word, kind):
    nested = torch.nested.nested_tensor([ids(3), ids(5)], layout=torch.jagged)
    with pytest.raises(ConfigError, match="nested tensors are not taken: pad"):
        drawn(kind, word)(nested, *([ids(2, 3)] if kind is Seq2Seq else []))


def test_causality_needs_a_line():
    at = Positions.grid((2, 3))
    with pytest.raises(ConfigError, match="2 and 2 axes"):
        masks.causal(at, at)
    with pytest.raises(ConfigError, match="for each of 2 axes"):
        masks.window(at, at, (1, 2, 3))


def test_heads_that_turn_differently_need_keys_of_their_own():
    layer = Attention(24, 4, kv_heads=2)
    at = Positions.sequence(5)
    signal = build("rope_mixed", Dims(24, 4, (5,))).eval()(at)
    layer(torch.zeros(1, 5, 24), signal)
    with pytest.raises(ValueError, match="kv_heads"):
        layer(torch.zeros(1, 5, 24), signal, cache=KVCache(5).layer(0))


@pytest.mark.need("B14")
@pytest.mark.parametrize("word", ["rope_mixed", "rope_golden", "alibi+rope_mixed"])
def test_a_decoder_whose_heads_turn_differently_has_keys_for_each(word):
    """Refused when it is built, not when it first writes; an encoder keeps no keys."""
    for kv_heads in (1, 2):
        with pytest.raises(ConfigError, match=f"turn differently and cannot share {kv_heads} heads"):
            drawn(TextDecoder, word, num_heads=4, kv_heads=kv_heads)
    drawn(TextEncoder, word, num_heads=4, kv_heads=2)(ids(1, 5))
    generate(drawn(TextDecoder, word, num_heads=4, kv_heads=4), ids(1, 3), 2)
    generate(drawn(TextDecoder, word.replace("mixed", "dinov3").replace("golden", "dinov3"), kv_heads=1), ids(1, 3), 2)
    with torch.device("meta"):
        TextDecoder("rope", kv_heads=1, **SIZES)


def test_training_models_do_not_write():
    model = drawn(TextDecoder, "rope")
    with pytest.raises(ConfigError, match="training mode"):
        generate(model.train(), ids(1, 3), 2)
    with pytest.raises(ConfigError, match="top_p in"):
        generate(model.eval(), ids(1, 3), 2, top_p=1.5)


def test_a_memory_can_be_reordered():
    memory = Encoded(torch.randn(3, 4, 2), Positions(torch.randn(3, 4, 1), (4,)), torch.ones(3, 4, dtype=torch.bool))
    taken = memory.take(torch.tensor([2, 2]))
    assert torch.equal(taken.tokens[0], memory.tokens[2])
    assert torch.equal(taken.at.coords[1], memory.at.coords[2])
