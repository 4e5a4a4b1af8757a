"""Masks of samples and of heads, and an attention by itself: in every mode what a loop over samples and heads gives."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vit2dpe import Dims, Positions, build, stock
from vit2dpe.errors import ConfigError
from vit2dpe.testing import randomise

N, H, L, S, E = 3, 4, 7, 5, 16
WORDS = ("alibi", "sincos", "relative")


def tokens(*shape, seed=1):
    return torch.randn(*shape, E, generator=torch.Generator().manual_seed(seed))


def mask_of(kind, dtype, keys=L, seed=3):
    """A stock mask, and the same as (N, H, L, S) floats."""
    shape = {"all": (L, keys), "sample": (N, L, keys), "head": (N * H, L, keys)}[kind]
    draws = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        mask = torch.rand(shape, generator=draws) < 0.4
        mask[..., 2, :] |= kind == "sample"  # a query that may look at nothing
        added = torch.zeros(shape).masked_fill(mask, -torch.inf)
    else:
        mask = added = torch.randn(shape, generator=draws)
    by_head = dict(all=(1, 1, L, keys), sample=(N, 1, L, keys), head=(N, H, L, keys))[kind]
    return mask, added.view(by_head).expand(N, H, L, keys)


def loop(attention, query, key, value, added):
    """nn.MultiheadAttention by its formula, a sample and a head at a time, in float64; a row without keys is 0."""
    width = E // H
    q_w, k_w, v_w = attention.in_proj_weight.double().chunk(3)
    q_b, k_b, v_b = attention.in_proj_bias.double().chunk(3)
    out, weights = [], []
    for n in range(len(query)):
        q, k, v = query[n].double() @ q_w.T + q_b, key[n].double() @ k_w.T + k_b, value[n].double() @ v_w.T + v_b
        heads = []
        for h in range(H):
            part = slice(h * width, (h + 1) * width)
            logits = q[:, part] @ k[:, part].T / width**0.5 + added[n, h].double()
            weight = logits.softmax(-1).nan_to_num(0.0)
            weights.append(weight)
            heads.append(weight @ v[:, part])
        out.append(torch.cat(heads, -1) @ attention.out_proj.weight.double().T + attention.out_proj.bias.double())
    return torch.stack(out).float(), torch.stack(weights).view(len(query), H, query.shape[1], -1).float()


def layers(word, batch_first=True):
    """A stack with an encoding attached."""
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=batch_first)
    stack = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    stock.attach(stack, word, grid=L)
    return stack


@pytest.mark.need("E7")
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("kind", ["all", "sample", "head"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_for_all_for_each_sample_or_for_each_head(word, kind, dtype):
    """With padding of either type beside it, on a stack and on one layer, batch first or not."""
    torch.manual_seed(0)
    stack, x = layers(word).eval(), tokens(N, L)
    mask, added = mask_of(kind, dtype)
    padding = torch.arange(L) >= torch.tensor([L, 5, 0])[:, None]  # the last sample is nothing but padding
    given = padding if dtype == torch.bool else torch.zeros(N, L).masked_fill(padding, -torch.inf)
    with torch.no_grad():
        wanted = stack(
            x, mask=added.flatten(0, 1), src_key_padding_mask=torch.zeros(N, L).masked_fill(padding, -torch.inf)
        )
        assert wanted.isfinite().all()
        for keys in (dict(mask=mask), dict(mask=mask, is_causal=True)):  # a hint that is wrong
            assert_close(stack(x, **keys, src_key_padding_mask=given), wanted)
        other = layers(word, batch_first=False).eval()
        other.load_state_dict(stack.state_dict())
        assert_close(other(x.transpose(0, 1), mask=mask, src_key_padding_mask=given).transpose(0, 1), wanted)
    assert_close(stack.train()(x, mask=mask, src_key_padding_mask=given), wanted)
    rotary = stock.RotaryEncoderLayer(E, H, 24, dropout=0.0, batch_first=True, position="alibi", grid=L)
    plain = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    plain.load_state_dict(rotary.state_dict())
    stock.attach(plain, "alibi", grid=L)
    assert_close(rotary(x, mask, given), plain(x, src_mask=mask, src_key_padding_mask=given))


@pytest.mark.need("E7")
def test_samples_of_a_batch_are_what_they_are_alone():
    stack, x = layers("relative").eval(), tokens(N, L)
    mask, _ = mask_of("sample", torch.bool)
    with torch.no_grad():
        for n in range(N):
            assert_close(stack(x, mask=mask)[n], stack(x[n : n + 1], mask=mask[n])[0])
            assert_close(stack(x, mask=mask)[n], stack(x[n], mask=mask[n]))


@pytest.mark.need("E7")
def test_a_decoder_takes_masks_of_samples_for_itself_and_for_its_memory():
    layer = nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    decoder = randomise(nn.TransformerDecoder(layer, 2)).eval()
    stock.attach(decoder, "alibi", grid=L)
    x, memory = tokens(N, L), tokens(N, S, seed=2)
    (mine, mine_full), (seen, seen_full) = mask_of("sample", torch.bool), mask_of("sample", torch.bool, keys=S)
    wanted = decoder(x, memory, mine_full.flatten(0, 1), seen_full.flatten(0, 1))
    assert_close(decoder(x, memory, mine, seen), wanted)
    assert_close(decoder(x, memory, tgt_mask=mine, memory_mask=seen), wanted)


@pytest.mark.need("E7")
@pytest.mark.parametrize("rotary", [False, True])
def test_masks_of_other_shapes_are_refused_with_those_that_are_taken(rotary):
    module = stock.RotaryEncoderLayer(E, H, 24, batch_first=True, grid=L) if rotary else layers("sincos")
    name = "src_mask" if rotary else "mask"
    taken = r"for 3 samples, 4 heads, 7 queries and 7 keys it is \(7, 7\) for all, \(3, 7, 7\) .* or \(12, 7, 7\)"
    for shape in ((L, S), (4, L, L), (1, L, L), (N, H, L, L), (L,)):
        with pytest.raises(ConfigError, match=rf"{name} has the shape .*{taken}"):
            module(tokens(N, L), torch.zeros(shape))
    with pytest.raises(ConfigError, match=r"padding_mask has the shape \(3, 5\); .* it is \(3, 7\)"):
        module(tokens(N, L), src_key_padding_mask=torch.zeros(N, S, dtype=torch.bool))
    for mask in (
        dict(src_key_padding_mask=torch.ones(N, L, dtype=torch.long)),
        {name: torch.ones(L, L, dtype=torch.uint8)},
    ):
        with pytest.raises(ConfigError, match=r"must be boolean.* got torch.*give mask == 0"):
            module(tokens(N, L), **mask)


@pytest.mark.need("E7")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "all", "sample", "head"])
@pytest.mark.parametrize("cross", [False, True])
def test_an_attention_by_itself_is_the_loop(kind, cross, batch_first):
    """Self- and cross-attention, with its weights, in every mode; detached it is what it was."""
    torch.manual_seed(0)
    attention = randomise(nn.MultiheadAttention(E, H, batch_first=batch_first))
    query, keys = tokens(N, L), S if cross else L
    key = tokens(N, S, seed=2) if cross else query
    mask, added = (None, torch.zeros(N, H, L, keys)) if kind == "none" else mask_of(kind, torch.float32, keys)
    x, y = (query, key) if batch_first else (query.transpose(0, 1), key.transpose(0, 1))
    y = y if cross else x
    names, plain = list(attention.state_dict()), attention(x, y, y)[0]
    with stock.attach(attention, "alibi", grid=L):
        bias = build("alibi", Dims(E, H, (L,)))(Positions.sequence(L), Positions.sequence(keys, length=L)).bias
        wanted, weights = loop(attention, query, key, key, added + sum(term.dense() for term in bias))
        for training in (True, False):
            attention.train(training)
            for gradients in (True, False):
                with torch.set_grad_enabled(gradients):
                    out, seen = attention(x, y, y, attn_mask=mask, average_attn_weights=False)
                    assert_close(out if batch_first else out.transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)
                    assert_close(seen, weights, rtol=1e-4, atol=1e-5)
                    out, seen = attention(x, key=y, value=y, need_weights=False, attn_mask=mask)
                    assert_close(out if batch_first else out.transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)
        alone = attention(query[0], key[0], key[0])[0] if cross else attention(q := query[0], q, q)[0]  # no batch
        if kind == "none":
            assert_close(alone, wanted[0], rtol=1e-4, atol=1e-5)
    assert list(attention.state_dict()) == names
    assert_close(attention(x, y, y)[0], plain)


@pytest.mark.need("E7")
def test_an_attention_by_itself_adds_token_terms_to_one_sequence_alone():
    attention = randomise(nn.MultiheadAttention(E, H, batch_first=True))
    x, zero = tokens(N, L), torch.zeros(N, H, L, L)
    with stock.attach(attention, "sincos", grid=L):
        moved = x + build("sincos", Dims(E, H, (L,)))(Positions.sequence(L)).token
        assert_close(attention(x, x, x)[0], loop(attention, moved, moved, moved, zero)[0], rtol=1e-4, atol=1e-5)
        with pytest.raises(ConfigError, match="query, key and value are not one tensor"):
            attention(x, tokens(N, S), tokens(N, S))
    with stock.attach(attention, "relative", grid=(2, 3), prefix=1):
        attention(x, x, x)[0].sum().backward()
        assert attention.position.relative_position_bias_table.grad.any()
    with pytest.raises(ConfigError, match="turns queries and keys"):
        stock.attach(attention, "rope", grid=L)
