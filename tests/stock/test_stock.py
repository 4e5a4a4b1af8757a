"""Stock torch modules with our encodings give what our own attention gives with the same weights, in every mode."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import reduce

import pytest
import timm  # noqa: F401 - before vit2dpe.models.layers, which cannot be the first to import it
import torch
from torch import nn

from tests.helpers import randn, within
from vit2dpe import Dims, PositionEncoding, Positions, Signal, build, stock, use_policy
from vit2dpe.encodings import NoPosition
from vit2dpe.errors import ConfigError
from vit2dpe.models.layers import Block, add_token
from vit2dpe.positions import distance
from vit2dpe.signal import Dense
from vit2dpe.testing import randomise

WIDTH, DEPTH, BATCH = 16, 2, 3
MODES = ("train", "eval", "no_grad", "inference")
LINE, IMAGE = dict(grid=7), dict(grid=(2, 3), prefix=1)  # seven tokens either way


def sizes(grid):
    return (grid,) if isinstance(grid, int) else grid


def places(grid, prefix=0):
    at = Positions.sequence(grid) if isinstance(grid, int) else Positions.grid(grid)
    return at.with_prefix(prefix)


@contextmanager
def mode(module, name):
    module.train(name == "train")
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(name, nullcontext)():
        yield


def layer(heads=4, norm_first=False, kind=nn.TransformerEncoderLayer, batch_first=True, **more):
    sizes = dict(dim_feedforward=24, dropout=0.0, activation="gelu")
    return kind(WIDTH, heads, **sizes, norm_first=norm_first, batch_first=batch_first, **more)


def encoder(*args, depth=DEPTH, **more):
    """Layers that differ, as nn.TransformerEncoder does not make them by itself."""
    return randomise(nn.TransformerEncoder(layer(*args, **more), depth, enable_nested_tensor=False))


def tokens(n=7, batch=BATCH, seed=1):
    return randn(batch, n, WIDTH, seed=seed)


def blocks(module):
    """Blocks of ours with the weights of a stock encoder."""
    found = []
    for theirs in module.layers:
        block = Block(WIDTH, theirs.self_attn.num_heads, mlp_ratio=1.5).to(theirs.linear1.weight.dtype)
        names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear": "mlp.fc"}
        state = {
            reduce(lambda name, old: name.replace(old, names[old]), names, name): value
            for name, value in theirs.state_dict().items()
            if not name.startswith("position.")
        }
        block.load_state_dict(state)
        block.norm1.eps = block.norm2.eps = theirs.norm1.eps
        found.append(block)
    return found


def core(module, x, signals, mask=None, token_once=True):
    """The project's own attention around the weights of a stock encoder; a Signal for each layer."""
    for i, (block, signal) in enumerate(zip(blocks(module), signals, strict=True)):
        if i == 0 or not token_once:
            x = add_token(x, signal)
        if module.layers[i].norm_first:
            x = block(x, signal, places(x.shape[1]), mask)
        else:
            x = block.norm1(x + block.attn(x, signal, mask))
            x = block.norm2(x + block.mlp(x))
    return x


def made(word, heads, norm_first, at):
    """A stock encoder with this encoding, random where it learns, and the Signals of its layers."""
    if word == "rope":
        rotary = layer(heads, norm_first, stock.RotaryEncoderLayer, position=word, **at)
        module = randomise(nn.TransformerEncoder(rotary, DEPTH, enable_nested_tensor=False))
    else:
        module = encoder(heads, norm_first)
        stock.attach(module, word, **at)
        randomise(module)
    shared = getattr(module, "position", NoPosition())
    where = places(**at)
    return module, [shared(where) + getattr(one, "position", NoPosition())(where) for one in module.layers]


close = within(1e-5, spread=0.1)


WORDS = ("none", "sincos", "learned", "relative", "relative(shared=true)", "alibi", "rope", "sincos+alibi+relative")


@pytest.mark.parametrize("at", [LINE, IMAGE], ids=["line", "image"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("word", WORDS)
def test_every_mode_equals_our_own_core(word, heads, norm_first, at):
    torch.manual_seed(0)
    module, signals = made(word, heads, norm_first, at)
    x = tokens()
    expected = core(module, x, signals)
    for name in MODES:
        with mode(module, name):
            close(module(x), expected)


COMPILED = [
    pytest.param(word, heads, pre, name, marks=() if (heads, pre, name) == (4, False, "no_grad") else pytest.mark.slow)
    for word in ("sincos", "learned", "relative", "alibi", "rope")
    for heads in (1, 4)
    for pre in (False, True)
    for name in ("train", "eval", "no_grad")
]


@pytest.mark.parametrize(("word", "heads", "norm_first", "name"), COMPILED)
def test_compiled_whole_equals_our_own_core(word, heads, norm_first, name):
    torch.manual_seed(0)
    module, signals = made(word, heads, norm_first, IMAGE)
    x = tokens()
    expected = core(module, x, signals)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with mode(module, name):
        close(compiled(x), expected)


@pytest.mark.parametrize("causal", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("zero", [False, True], ids=["drawn", "zero"])
@pytest.mark.parametrize("word", ["learned", "relative", "relative(shared=true)", "rope_mixed"])
def test_gradients_are_those_of_the_core(word, zero, causal):
    torch.manual_seed(0)
    if word == "rope_mixed":
        rotary = layer(kind=stock.RotaryEncoderLayer, position=word, **IMAGE)
        module = randomise(nn.TransformerEncoder(rotary, DEPTH, enable_nested_tensor=False))
    else:
        module = encoder()
        stock.attach(module, word, **IMAGE)
    names = [name for name, _ in module.named_parameters() if "position." in name]
    parameters = [p for name, p in module.named_parameters() if "position." in name]
    assert names
    for p in parameters:
        nn.init.zeros_(p) if zero else nn.init.normal_(p, std=0.5)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    weights = torch.randn(BATCH, 7, WIDTH)
    where = places(**IMAGE)

    (module(tokens(), mask=mask) * weights).sum().backward()
    ours = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    shared = [part for name, part in module.named_modules() if name == "position"]
    signals = [
        reduce(Signal.plus, (part(where) for part in [*shared, *([one.position] if hasattr(one, "position") else [])]))
        for one in module.layers
    ]
    allowed = None if mask is None else mask == 0
    (core(module, tokens(), signals, allowed) * weights).sum().backward()
    for grad, p in zip(ours, parameters, strict=True):
        assert bool(grad.any())
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODES)
def test_frozen_backbone_trains_its_bias_in_eval(name):
    torch.manual_seed(0)
    module = encoder().requires_grad_(False)
    stock.attach(module, "relative(shared=true)", **IMAGE)
    with mode(module, name):
        out = module(tokens())
        close(out, core(module, tokens(), [module.position(places(**IMAGE))] * DEPTH))
    if name in ("train", "eval"):
        out.square().sum().backward()
        assert bool(module.position.relative_position_bias_table.grad.any())


@pytest.mark.parametrize("word", ["alibi", "relative", "rope", "none"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("causal", [False, True], ids=["open", "causal"])
def test_padding_and_causal_masks_join_the_bias(word, dtype, causal):
    torch.manual_seed(0)
    module, signals = made(word, 4, False, LINE)
    padding = torch.arange(7) >= torch.tensor([7, 5, 3])[:, None]  # True: no token
    allowed = (~padding)[:, None, None, :].expand(-1, -1, 7, -1)
    mask = None
    if causal:
        mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
        allowed = allowed & ~mask
    given = [None if m is None else m if dtype == torch.bool else torch.zeros(m.shape).masked_fill(m, -torch.inf)
             for m in (mask, padding)]  # fmt: skip
    expected = core(module, tokens(), signals, allowed)
    for name in MODES:
        with mode(module, name):
            close(module(tokens(), mask=given[0], src_key_padding_mask=given[1]), expected)
            if name != "train":
                assert torch.equal(module(tokens(), *given), module(tokens(), given[0], given[1], False))


def test_a_user_s_own_bias_for_each_sample_and_head_is_kept():
    torch.manual_seed(0)
    own = torch.randn(BATCH * 4, 7, 7)
    for word in ("alibi", "rope"):
        module, signals = made(word, 4, False, LINE)
        mine = Signal(bias=(Dense(own.view(BATCH, 4, 7, 7)),))
        with mode(module, "no_grad"):
            close(module(tokens(), mask=own), core(module, tokens(), [signal + mine for signal in signals]))


def test_masks_put_the_heads_of_a_sample_next_to_each_other():
    bias = torch.randn(3, 4, 5, 6)  # N, H, L, S
    mask = stock.attention_mask(Signal(bias=(Dense(bias),)), batch=3)
    assert mask.shape == (12, 5, 6)
    for sample in range(3):
        for head in range(4):
            assert torch.equal(mask[sample * 4 + head], bias[sample, head])
    attention = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    q, kv = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    heavy = torch.zeros(3, 4, 5, 6)
    heavy[1, 2, :, 3] = 100.0  # sample 1, head 2: all look at key 3
    one = stock.attention_mask(Signal(bias=(Dense(heavy),)), batch=3)
    weights = attention(q, kv, kv, attn_mask=one, average_attn_weights=False)[1]
    assert weights[1, 2, :, 3].min() > 0.99
    assert weights.permute(2, 3, 0, 1)[:, 3].amax(0).gt(0.99).sum() == 1


def test_masks_are_as_small_as_they_can_be():
    shared = torch.randn(1, 1, 5, 6)
    assert stock.attention_mask(Signal(bias=(Dense(shared),)), batch=3).shape == (5, 6)
    signal = build("alibi", Dims(8, 4, (7,)))(places(7))
    mask = stock.attention_mask(signal, batch=2, dtype=torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((8, 7, 7), torch.bfloat16)
    assert torch.equal(mask[:4], mask[4:])
    with pytest.raises(ConfigError, match="for 3 samples, the batch has 2"):
        stock.attention_mask(Signal(bias=(Dense(torch.zeros(3, 4, 7, 7)),)), batch=2)
    with pytest.raises(ConfigError, match="no bias"):
        stock.attention_mask(Signal(), batch=2)
    for word in ("rope", "alibi"):
        encoding = build(word, Dims(8, 2, (7,)))
        encoding.own_temperature = (lambda extent: 1.5) if word == "alibi" else None
        with pytest.raises(ConfigError, match="RotaryEncoderLayer"):
            stock.attention_mask(encoding(places(7)), batch=2)


@pytest.mark.parametrize("word", ["sincos+relative", "rope"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_batch_first_is_read(word, norm_first):
    """With N == L both layouts would run; only one is right."""
    torch.manual_seed(0)
    module, _ = made(word, 4, norm_first, LINE)
    rotary = dict(kind=stock.RotaryEncoderLayer, position=word, **LINE) if word == "rope" else {}
    other = encoder(4, norm_first, batch_first=False, **rotary)
    if word != "rope":
        stock.attach(other, word, **LINE)
    other.load_state_dict(module.state_dict())
    x = tokens(7, batch=7)
    for name in MODES:
        with mode(module, name), mode(other, name):
            close(other(x.transpose(0, 1)).transpose(0, 1), module(x), 2e-6)
            close(module(x[0]), module(x)[0], 2e-6)  # (L, E), without a batch


def test_token_position_reads_the_layout():
    first, last = layer(batch_first=True), layer(batch_first=False)
    x = tokens(7, batch=7)
    token = build("sincos", Dims(WIDTH, 4, (7,)))(places(7)).token
    for like in (first, last, nn.Transformer(WIDTH, 4, 1, 1, 8, batch_first=True)):
        module = stock.TokenPosition("sincos", like, grid=7)
        y = x if like is not last else x.transpose(0, 1)
        z = module(y)
        assert torch.equal(z if like is not last else z.transpose(0, 1), x + token)
        assert torch.equal(stock.add_position(y, module.position, like, grid=7), z)
        assert torch.equal(module(x[0]), x[0] + token[0])
        assert not module.state_dict()
    learned = stock.TokenPosition("learned", first, **IMAGE)
    assert [name for name, _ in learned.named_parameters()] == ["position.pos_embed"]
    assert torch.equal(learned(x)[:, 0], x[:, 0])  # the class token has no place
    assert not torch.equal(learned(x)[:, 1], x[:, 1])
    with pytest.raises(ConfigError, match=r"gives \['bias', 'token'\]"):
        stock.TokenPosition("sincos+alibi", first, grid=7)
    with pytest.raises(ConfigError, match=r"no nn\.MultiheadAttention"):
        stock.TokenPosition("sincos", nn.Linear(2, 2), grid=7)


def test_before_every_layer_by_choice():
    torch.manual_seed(0)
    module = encoder(4, True)
    stock.attach(module, "learned", every_layer=True, **IMAGE)
    randomise(module)
    signals = [one.position(places(**IMAGE)) for one in module.layers]
    assert not torch.equal(signals[0].token, signals[1].token)
    with mode(module, "no_grad"):
        close(module(tokens()), core(module, tokens(), signals, token_once=False))


def test_a_layer_by_itself():
    torch.manual_seed(0)
    module = encoder(4, False, depth=1)
    expected = core(module, tokens(), [build("sincos+alibi", Dims(WIDTH, 4, (7,)))(places(7))])
    with stock.attach(module.layers[0], "sincos+alibi", **LINE), mode(module, "no_grad"):
        close(module(tokens()), expected)


def test_decoder_and_whole_transformer():
    """Against the same modules given the masks by hand, in training mode, where torch is right."""
    torch.manual_seed(0)
    x, y = tokens(6), tokens(5, seed=2)
    model = nn.Transformer(WIDTH, 4, 2, 2, 24, dropout=0.0, batch_first=True)
    reference = copy.deepcopy(model)
    done = stock.attach(model, "relative", grid=6)
    randomise(model)
    reference.load_state_dict(model.state_dict(), strict=False)
    causal = nn.Transformer.generate_square_subsequent_mask(5)

    def mask(one, n):
        return stock.attention_mask(one.position(Positions.sequence(n, length=6)), BATCH)

    memory, out = x, y
    for plain, one in zip(reference.encoder.layers, model.encoder.layers, strict=True):
        memory = plain(memory, src_mask=mask(one, 6))
    memory = reference.encoder.norm(memory)
    for plain, one in zip(reference.decoder.layers, model.decoder.layers, strict=True):
        out = plain(out, memory, tgt_mask=mask(one, 5) + causal)
    expected = reference.decoder.norm(out)
    for name in MODES:
        with mode(model, name):
            close(model(x, y, tgt_mask=causal), expected)
    own = [name for name in model.state_dict() if "position" in name]
    assert len(own) == 4
    assert {name.split(".")[0] for name in own} == {"encoder", "decoder"}
    done.detach()
    assert list(model.state_dict()) == list(reference.state_dict())


def test_detach_leaves_no_trace():
    torch.manual_seed(0)
    layer_ = layer()
    module = nn.TransformerEncoder(layer_, DEPTH)
    before = {name: dict(vars(part)) for name, part in copy.deepcopy(module).named_modules()}
    keys, x = list(module.state_dict()), tokens()
    expected = module(x)
    done = stock.attach(module, "sincos+relative", **IMAGE)
    assert not module.use_nested_tensor
    assert [name for name in module.state_dict() if name not in keys] == [
        f"layers.{i}.position.relative_position_bias_table" for i in range(DEPTH)
    ]
    assert [name for name in module.state_dict() if "position" not in name] == keys
    assert not torch.equal(module(x), expected)
    with pytest.raises(ConfigError, match="positions already"):
        stock.attach(module, "alibi", **IMAGE)
    done.detach()
    done.detach()  # once is enough
    assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == keys
    after = {name: vars(part) for name, part in module.named_modules()}
    assert after.keys() == before.keys()
    for name, attributes in after.items():
        assert attributes.keys() == before[name].keys()
        assert not attributes["_forward_pre_hooks"]
        assert not attributes["_forward_pre_hooks_with_kwargs"]
    assert module.use_nested_tensor


def test_copies_are_attached_to_themselves():
    torch.manual_seed(0)
    module = encoder()
    stock.attach(module, "relative", **IMAGE)
    twin = copy.deepcopy(module)
    x = tokens()
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.layers[0].position.relative_position_bias_table[:, 0, 0] += 5.0
    assert not torch.equal(twin(x), module(x))
    stock.set_grid(twin, (3, 2))
    assert module.places.grid == (2, 3)
    assert all(one.places.grid == (3, 2) for one in twin.layers)


@pytest.mark.parametrize("word", ["sincos+alibi", "rope"])
def test_another_grid_and_a_policy(word):
    torch.manual_seed(0)
    module, _ = made(word, 4, True, IMAGE)
    x, wide = tokens(21), Positions.grid((4, 5)).with_prefix(1)
    with pytest.raises(ConfigError, match=r"expected 2x3 tokens behind 1 .* got 21; stock\.set_grid"):
        module(x)
    stock.set_grid(module, (4, 5))
    holders = [module] if word != "rope" else list(module.layers)
    encoding = build(word, Dims(WIDTH, 4, (2, 3)))
    for policy in ("extrapolate", "interpolate"):
        shim = nn.Module()
        shim.position, shim.train_grid = encoding, (2, 3)
        with use_policy(shim, policy):
            expected = core(module, x, [encoding(wide)] * DEPTH)
        contexts = [use_policy(holder, policy) for holder in holders]
        for context in contexts:
            context.__enter__()
        with mode(module, "no_grad"):
            close(module(x), expected)
        for context in contexts:
            context.__exit__(None, None, None)
    with pytest.raises(ConfigError, match="nothing in this Linear has places"):
        stock.set_grid(nn.Linear(2, 2), 3)


@pytest.mark.need("E3")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("word", ["sincos", "learned", "lookhere", "sincos+lookhere+relative", "learned+rope"])
def test_a_stack_of_rotary_layers_is_our_core(word, norm_first):
    """Token terms once, before the first layer; slopes by the layer; and what `attach` gives, where it can."""
    torch.manual_seed(0)
    rotary = layer(4, norm_first, stock.RotaryEncoderLayer, position=word, **IMAGE)
    module = randomise(nn.TransformerEncoder(rotary, 3, enable_nested_tensor=False))
    at, parts = places(**IMAGE), word.split("+")
    signals = [Signal()] * 3
    for i, one in enumerate(module.layers):
        for part, learned in zip(parts, getattr(one.position, "terms", [one.position]), strict=True):
            fixed = part in ("sincos", "lookhere", "rope")
            signals[i] += build(part, Dims(WIDTH, 4, (2, 3), block=i, depth=3))(at) if fixed else learned(at)
    for name in MODES:
        with mode(module, name):
            close(module(tokens()), core(module, tokens(), signals))
    if "rope" not in word:
        plain = encoder(4, norm_first, depth=3)
        stock.attach(plain, word, **IMAGE)
        named = {name.replace(".terms.2.", ".terms.1."): value for name, value in module.state_dict().items()}
        if word == "learned":
            named["position.pos_embed"] = named["layers.0.position.pos_embed"]
        plain.load_state_dict({name: named[name] for name in plain.state_dict()})
        close(module(tokens()), plain(tokens()))
    module(tokens()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    again = copy.deepcopy(module)
    close(again(tokens()), module(tokens()), 1e-6)
    single = layer(4, norm_first, stock.RotaryEncoderLayer, position=word, **IMAGE)
    assert copy.deepcopy(copy.deepcopy(single)).adds_token


@pytest.mark.need("E3")
def test_every_layer_of_a_stack_adds_its_token_terms_where_that_is_asked_for():
    torch.manual_seed(0)
    rotary = layer(kind=stock.RotaryEncoderLayer, position="sincos", every_layer=True, **LINE)
    module = randomise(nn.TransformerEncoder(rotary, DEPTH, enable_nested_tensor=False))
    signals = [module.layers[0].position(places(**LINE))] * DEPTH
    close(module(tokens()), core(module, tokens(), signals, token_once=False))


def test_a_policy_reaches_both_stacks_of_a_transformer_and_every_rotary_layer():
    torch.manual_seed(0)
    kinds = dict(d_model=WIDTH, nhead=4, dim_feedforward=WIDTH, batch_first=True, dropout=0.0)
    both = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **kinds).eval()
    stock.attach(both, "sincos", grid=5)
    rotary = nn.TransformerEncoder(
        stock.RotaryEncoderLayer(**kinds, position="rope", grid=5), 2, enable_nested_tensor=False
    ).eval()
    x, y = torch.randn(2, 10, WIDTH), torch.randn(2, 7, WIDTH)
    for run in (lambda: both.encoder(x), lambda: both.decoder(y, x), lambda: rotary(x)):
        plain = run()
        with use_policy(both, "interpolate"), use_policy(rotary, "interpolate"):
            assert not torch.allclose(run(), plain, atol=1e-3)
        assert torch.equal(run(), plain)
    with pytest.raises(ConfigError, match="Linear has no train_grid"), use_policy(nn.Linear(2, 2), "interpolate"):
        pass


def test_a_shorter_line_takes_its_first_places():
    torch.manual_seed(0)
    module = encoder()
    stock.attach(module, "learned", grid=7)
    randomise(module)
    at = Positions.sequence(4, length=7)
    with mode(module, "no_grad"):
        close(module(tokens(4)), core(module, tokens(4), [module.position(at)] * DEPTH))
    assert torch.equal(module.position(at).token[0], module.position.pos_embed[0, :4])


@pytest.mark.need("E6")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attached", "rotary"])
def test_an_exported_layer_serves_every_length(kind):
    """Within the line that it was built for, and beyond."""
    if kind == "attached":
        module = layer()
        stock.attach(module, "alibi", grid=8)
    else:
        module = stock.RotaryEncoderLayer(WIDTH, 4, 24, batch_first=True, dropout=0.0, grid=8)
    free = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=2, max=32)}
    module.eval()
    program = torch.export.export(module, (tokens(6),), dynamic_shapes=(free,)).module()
    for n in (3, 8, 9, 32):
        close(program(tokens(n)), module(tokens(n)))


def test_the_state_dict_of_the_rotary_layer_is_the_stock_one():
    torch.manual_seed(0)
    theirs = nn.TransformerEncoder(layer(), DEPTH, enable_nested_tensor=False)
    torch.manual_seed(0)
    rotary = layer(kind=stock.RotaryEncoderLayer, position="none", **LINE)
    ours = nn.TransformerEncoder(rotary, DEPTH, enable_nested_tensor=False)
    for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x = tokens()
    close(ours(x), theirs(x), 2e-6)  # without positions it is the stock layer
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    close(ours(x, mask=mask), theirs(x, mask=mask, is_causal=True), 2e-6)
    close(ours.layers[0](x, is_causal=True), theirs.layers[0](x, mask), 2e-6)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    close(ours(x), theirs(x))


def test_the_rotary_layer_reads_masks_as_the_stock_layer_does():
    torch.manual_seed(0)
    theirs = randomise(layer()).train()
    ours = layer(kind=stock.RotaryEncoderLayer, position="none", **LINE).train()
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = torch.arange(7) >= torch.tensor([7, 5, 3])[:, None]
    each = hidden.expand(BATCH * 4, -1, -1).clone()
    each[5, 3, 0] = True  # sample 1, head 1
    for given in (dict(src_mask=hidden), dict(src_mask=each), dict(src_key_padding_mask=padding),
                  dict(src_mask=hidden, src_key_padding_mask=padding)):  # fmt: skip
        close(ours(tokens(), **given), theirs(tokens(), **given), 2e-6)


@pytest.mark.parametrize("name", MODES)
def test_a_shared_nested_tensor_stack_never_meets_our_layers(name):
    """Padding alone makes nn.TransformerEncoder nest in inference, if its layers let it."""
    torch.manual_seed(0)
    padding = torch.arange(7) >= torch.tensor([7, 5, 3])[:, None]
    attached = nn.TransformerEncoder(layer(), DEPTH)
    assert attached.use_nested_tensor
    stock.attach(attached, "relative", **LINE)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        rotary = nn.TransformerEncoder(layer(kind=stock.RotaryEncoderLayer, **LINE), DEPTH)
    for module in (attached, rotary):
        with mode(module.train(), "train"):
            expected = module(tokens(), src_key_padding_mask=padding)
        with mode(module, name):
            close(module(tokens(), src_key_padding_mask=padding), expected, 2e-6)
    with pytest.raises(ConfigError, match="nested tensor"):
        attached(torch.nested.nested_tensor([torch.zeros(3, WIDTH)], layout=torch.jagged))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_type(dtype):
    torch.manual_seed(0)
    module = encoder().to(dtype)
    stock.attach(module, "sincos+alibi", **IMAGE)
    x = tokens().to(dtype)
    with mode(module, "no_grad"):
        out = module(x)
    assert out.dtype == dtype
    signal = build("sincos+alibi", Dims(WIDTH, 4, (2, 3))).double()(places(**IMAGE))
    exact = core(copy.deepcopy(module).double(), x.double(), [signal] * DEPTH)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.15)


def test_autocast_changes_nothing_but_the_precision():
    torch.manual_seed(0)
    module = encoder()
    stock.attach(module, "sincos+alibi", **IMAGE)
    exact = module(tokens())
    for name in MODES:
        with mode(module, name), torch.autocast("cpu", torch.bfloat16):
            assert (module(tokens()).float() - exact).abs().max() < 0.15


def test_refusals_say_what_to_do():
    module = encoder()
    with pytest.raises(ConfigError, match=r"AxialRoPE turns queries and keys.*RotaryEncoderLayer"):
        stock.attach(module, "rope", grid=7)
    assert not hasattr(module, "position")
    with pytest.raises(ConfigError, match="got Linear"):
        stock.attach(nn.Linear(2, 2), "alibi", grid=7)
    with pytest.raises(ConfigError, match="did you mean 'alibi'"):
        stock.attach(module, "alibbi", grid=7)
    with pytest.raises(ConfigError, match="each at least 1"):
        stock.attach(module, "alibi", grid=(0, 3))
    stock.attach(module, "alibi", grid=7)
    with pytest.raises(ConfigError, match="is_causal=True is a hint, not a mask"):
        module(tokens(), is_causal=True)


def test_check_finds_layers_that_would_read_a_bias_as_a_mask():
    safe = {
        "odd heads": layer(heads=1),
        "layout": layer(batch_first=False),
        "no bias": layer(bias=False),
        "rotary": layer(kind=stock.RotaryEncoderLayer, **LINE),
    }
    for module in (*safe.values(), nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2), 1), nn.Linear(2, 2)):
        stock.check(module)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), encoder(depth=5))
    with pytest.raises(ConfigError, match=r"in 1\.layers\.0, 1\.layers\.1, 1\.layers\.2 and 2 more"):
        stock.check(model)
    with pytest.raises(ConfigError, match="the layer itself"):
        stock.check(layer())
    with stock.attach(model[1], "alibi", grid=7):
        stock.check(model)
    with pytest.raises(ConfigError, match="float mask"):
        stock.check(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        stock.check(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_what_check_lets_pass_is_right():
    """Its conditions are the real ones: every layer it passes gives the same in inference, every other one does not."""
    torch.manual_seed(0)
    bias = stock.attention_mask(build("alibi", Dims(WIDTH, 4, (7,)))(places(7)), BATCH)
    one = stock.attention_mask(build("alibi", Dims(WIDTH, 1, (7,)))(places(7)), BATCH)
    variants = [dict(), dict(norm_first=True), dict(heads=1), dict(bias=False), dict(batch_first=False)]
    for options in variants:
        module = randomise(layer(**options))
        x = tokens(7, batch=7)[:3] if options.get("batch_first", True) else tokens().transpose(0, 1)
        mask = one if options.get("heads") == 1 else bias
        expected = module.train()(x, src_mask=mask)
        with mode(module, "no_grad"):
            same = torch.allclose(module(x, src_mask=mask), expected, atol=1e-5)
        try:
            stock.check(module)
            passed = True
        except ConfigError:
            passed = False
        assert same == passed, options


def test_the_fault_of_torch_is_still_there():
    """Documents torch's own behaviour. The day this is red torch has mended it, and `stock.check` can go."""
    torch.manual_seed(0)
    module, x = layer(), tokens()
    at = places(7)
    alibi = stock.attention_mask(build("alibi", Dims(WIDTH, 4, (7,)))(at), BATCH)  # zero on the diagonal alone
    alone = torch.full((7, 7), -torch.inf).fill_diagonal_(0.0)
    with mode(module, "eval"):
        right, only_itself = module(x, src_mask=alibi), module(x, src_mask=alone)
    with mode(module, "no_grad"):
        wrong = module(x, src_mask=alibi)
        dense = module(x, src_mask=alibi - 1.0)
    assert (wrong - right).abs().max() > 0.1
    torch.testing.assert_close(wrong, only_itself, rtol=0, atol=1e-5)  # every other token is silently hidden
    assert bool(dense.isnan().all())
    with stock.attach(module, "alibi", grid=7), mode(module, "no_grad"):
        close(module(x), right.detach())


class Pairs(PositionEncoding):
    """A learned number for each head and each pair of places on a line: what people pass as `mask`."""

    continuous = False
    gives = frozenset({"bias"})

    def __init__(self, heads, length):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, length, length))

    def bias(self, q, k):
        return self.table[:, q.places()[0, :, 0]][:, :, k.places()[0, :, 0]][None]


def test_reversing_a_sequence_through_a_stock_encoder():
    torch.manual_seed(0)
    length, words = 8, 16
    embed, head = nn.Embedding(words, 32), nn.Linear(32, words)
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
    )
    stock.attach(module, Pairs(2, length), grid=length)
    parameters = [*embed.parameters(), *module.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(200):
        x = torch.randint(words, (32, length))
        loss = nn.functional.cross_entropy(head(module(embed(x))).flatten(0, 1), x.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randint(words, (256, length))
    for name in MODES:
        with mode(module, name):
            accuracy = (head(module(embed(x))).argmax(-1) == x.flip(1)).float().mean()
        assert accuracy >= 0.99, name
    with torch.no_grad():  # the table was what told where tokens are
        module.position.table.zero_()
        assert (head(module(embed(x))).argmax(-1) == x.flip(1)).float().mean() < 0.5


def test_distance_in_a_stock_vit():
    """A ViT from nn.TransformerEncoder: rows and columns of a grid that is not square, behind a class token."""
    torch.manual_seed(0)
    grid = (3, 5)
    module = encoder()
    stock.attach(module, "alibi", grid=grid, prefix=1)
    at = Positions.grid(grid)
    bias = module.position(at.with_prefix(1)).bias[0].dense()
    assert bool((bias[..., 0, :] == 0).all())
    slope = bias[0, :, 1, 2] / -1.0
    torch.testing.assert_close(bias[0, :, 1:, 1:], (-slope[:, None, None] * distance(at, at)).float())
    with mode(module, "no_grad"):
        close(module(tokens(16)), core(module, tokens(16), [module.position(at.with_prefix(1))] * DEPTH))
