"""Weights of torch's own Transformer in our models and back: equal outputs, names that are taken."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vit2dpe import (
    MAE,
    Positions,
    Seq2Seq,
    Signal,
    TextDecoder,
    TextEncoder,
    ViT,
    from_timm,
    from_torch,
    from_transformers,
    stock,
    to_timm,
    to_torch,
)
from vit2dpe.errors import ConfigError
from vit2dpe.models.text.block import TextBlock
from vit2dpe.testing import randomise

E, H, HIDDEN, V, N, S = 24, 3, 40, 11, 6, 5
KINDS = [
    dict(norm_first=norm_first, activation=activation, bias=bias, batch_first=batch_first)
    for norm_first, activation, bias, batch_first in (
        (False, "relu", True, False), (True, "gelu", True, True), (True, "relu", False, True),
        (False, F.gelu, False, False),
        (True, nn.GELU(approximate="tanh"), True, False), (False, nn.ReLU(), True, True),
    )
]  # fmt: skip


def ids(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def stack_of(kind, norm, depth=2, **more):
    decoder = kind is nn.TransformerDecoder
    layer = (nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer)(E, H, HIDDEN, **more)
    final = nn.LayerNorm(E, bias=more.get("bias", True)) if norm else None
    rest = {} if decoder else dict(enable_nested_tensor=False)
    return randomise(kind(layer, depth, final, **rest)).eval()


def called(module, *inputs, **masks):
    """A stock module on (B, N, E), whichever layout it takes."""
    if module_batch_first(module):
        return module(*inputs, **masks)
    return module(*(x.transpose(0, 1) for x in inputs), **masks).transpose(0, 1)


def module_batch_first(module):
    return next(part for part in module.modules() if isinstance(part, nn.MultiheadAttention)).batch_first


def back(model, module):
    """to_torch(model) has the weights of `module`, name by name."""
    written = to_torch(model)
    theirs, again = module.state_dict(), written.state_dict()
    for name in again:
        if name in theirs:
            assert torch.equal(again[name], theirs[name]), name
        else:  # theirs has no bias in its norm, ours one of 0
            assert "norm" in name
            assert not again[name].any()
    assert theirs.keys() <= again.keys()
    return written


def causal(n):
    return nn.Transformer.generate_square_subsequent_mask(n)


@pytest.mark.need("B10")
@pytest.mark.parametrize("more", KINDS, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_an_encoder_stack_and_back(more, norm):
    torch.manual_seed(0)
    stack, embedding = stack_of(nn.TransformerEncoder, norm, **more), nn.Embedding(V, E)
    valid = torch.arange(N) < torch.tensor([[N], [4]])
    x = embedding(ids(2, N))
    ours = from_torch(stack, embedding, context=N)
    assert isinstance(ours, TextEncoder)
    wanted = called(stack, x, src_key_padding_mask=~valid)
    assert_close(ours(ids(2, N), valid)[valid], wanted[valid], rtol=1e-5, atol=1e-5)
    assert_close(called(back(ours, stack), x), called(stack, x), rtol=1e-5, atol=1e-5)
    decoder = from_torch(stack, embedding, context=N, causal=True)
    assert isinstance(decoder, TextDecoder)
    assert_close(decoder.forward_features(ids(2, N)), called(stack, x, mask=causal(N)), rtol=1e-5, atol=1e-5)
    back(decoder, stack)


@pytest.mark.need("B10")
@pytest.mark.parametrize("more", KINDS, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_a_decoder_stack_and_back(more, norm):
    torch.manual_seed(0)
    stack, embedding = stack_of(nn.TransformerDecoder, norm, **more), nn.Embedding(V, E)
    model = from_torch(stack, embedding, context=N)
    reader = TextEncoder("none", vocab_size=V, context=N, embed_dim=E, depth=1, num_heads=H, pool="").eval()
    memory = reader.encode(ids(2, S), torch.arange(S) < torch.tensor([[S], [3]]))
    wanted = called(
        stack, embedding(ids(2, N)), memory.tokens, tgt_mask=causal(N), memory_key_padding_mask=~memory.valid
    )
    assert_close(model.forward_features(ids(2, N), memory=memory), wanted, rtol=1e-5, atol=1e-5)
    back(model, stack)


@pytest.mark.need("B10")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # nn.Transformer's own
@pytest.mark.parametrize("more", KINDS[:4], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_a_whole_transformer_and_back(more, shared):
    torch.manual_seed(0)
    theirs = randomise(nn.Transformer(E, H, 2, 1, HIDDEN, **more)).eval()
    source, target = nn.Embedding(V, E), nn.Embedding(V, E)
    target = source if shared else target
    ours = from_torch(theirs, source, None if shared else target, context=N, embed_scale=E**0.5)
    assert isinstance(ours, Seq2Seq)
    a, b = source(ids(2, S)) * E**0.5, target(ids(2, N, seed=2)) * E**0.5
    wanted = F.linear(called(theirs, a, b, tgt_mask=causal(N)), target.weight)
    assert_close(ours(ids(2, S), ids(2, N, seed=2)), wanted, rtol=1e-5, atol=1e-4)
    back(ours, theirs)
    trained = from_torch(theirs, source, context=N, position="rope")  # the same weights under an encoding
    assert not torch.allclose(trained(ids(2, S), ids(2, N)), ours(ids(2, S), ids(2, N)))


@pytest.mark.need("B10")
@pytest.mark.parametrize("more", KINDS[:4], ids=str)
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_layer_and_back(more, kind):
    layer = randomise(kind(E, H, HIDDEN, **more)).eval()
    block, x = from_torch(layer), torch.randn(2, N, E)
    assert isinstance(block, TextBlock)
    if kind is nn.TransformerEncoderLayer:
        assert_close(block(x, Signal(), Positions.sequence(N)), called(layer, x), rtol=1e-5, atol=1e-5)
    assert back(block, layer).norm_first == more["norm_first"]


@pytest.mark.need("B10")
def test_what_goes_beside_the_weights():
    """Type, dropout, the mode; a model of ours that was never torch's; norms without biases stay so."""
    layer = nn.TransformerEncoderLayer(E, H, HIDDEN, dropout=0.3, bias=False).double()
    ours = from_torch(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Embedding(V, E), context=N)
    assert (ours.embed.weight.dtype, ours.training) == (torch.float64, False)
    assert (ours.blocks[0].attn.attn_drop, ours.blocks[0].mlp.drop1.p) == (0.3, 0.3)
    written = to_torch(ours)
    assert (written.layers[0].dropout1.p, written.layers[0].self_attn.dropout) == (0.3, 0.3)
    assert written.layers[0].norm1.bias is None
    with torch.no_grad():
        ours.blocks[0].norm1.bias.add_(1)
    with pytest.raises(ConfigError, match="bias=False"):
        to_torch(ours)
    model = randomise(
        Seq2Seq("none", source_vocab=V, target_vocab=V, context=N, embed_dim=E, depth=1, num_heads=H)
    ).eval()
    made, a, b = to_torch(model), model.encoder.embed(ids(2, S)), model.decoder.embed(ids(2, N))
    wanted = F.linear(made(a, b, tgt_mask=causal(N)), model.decoder.embed.weight)
    assert_close(model(ids(2, S), ids(2, N)), wanted, rtol=1e-5, atol=1e-5)


def text(position="none", **more):
    return TextEncoder(position, vocab_size=V, context=N, embed_dim=E, depth=1, num_heads=H, **more)


@pytest.mark.need("B10")
def test_refusals_name_what_is_taken():
    embedding, layer = nn.Embedding(V, E), nn.TransformerEncoderLayer(E, H, HIDDEN)
    stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for module in (nn.Linear(2, 2), text(), nn.MultiheadAttention(E, H)):
        with pytest.raises(ConfigError, match=r"from_torch takes nn\.TransformerEncoder, .*, got"):
            from_torch(module, embedding, context=N)
    for given in (dict(), dict(embedding=embedding), dict(context=N)):
        with pytest.raises(ConfigError, match=r"give both, as in from_torch\(module, embedding, context="):
            from_torch(stack, **given)
    with pytest.raises(ConfigError, match=f"as wide as the layers, {E}, got"):
        from_torch(stack, nn.Embedding(V, 8), context=N)
    with pytest.raises(ConfigError, match="a layer becomes a TextBlock"):
        from_torch(layer, embedding)
    odd = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, HIDDEN, activation=F.silu), 1, enable_nested_tensor=False
    )
    with pytest.raises(ConfigError, match=r"activations that ours has: relu, gelu, .*silu"):
        from_torch(odd, embedding, context=N)
    with pytest.raises(ConfigError, match="LayerNorm"):
        from_torch(nn.TransformerEncoder(layer, 1, nn.RMSNorm(E), enable_nested_tensor=False), embedding, context=N)
    with stock.attach(stack, "alibi", grid=N), pytest.raises(ConfigError, match="detach them"):
        from_torch(stack, embedding, context=N)
    rotary = nn.TransformerEncoder(stock.RotaryEncoderLayer(E, H, HIDDEN, grid=N), 1, enable_nested_tensor=False)
    with pytest.raises(ConfigError, match="torch's own"):
        from_torch(rotary, embedding, context=N)
    with pytest.raises(ConfigError, match=r"position .*AxialRoPE[\s\S]*stock\.attach"):
        to_torch(text("rope"))
    lacking = [(dict(norm="rms"), "LayerNorm"), (dict(mlp="swiglu"), "SwiGLU"), (dict(kv_heads=1), "kv_heads")]
    lacking += [(dict(qk_norm=True), "qk_norm"), (dict(window=2), "window"), (dict(scale=1.0), "scale")]
    for more, name in lacking:
        with pytest.raises(ConfigError, match=name):
            to_torch(text(**more))
    images = ViT("learned", img_size=32, patch_size=8, embed_dim=E, depth=1, num_heads=H)
    with pytest.raises(ConfigError, match=r"to_torch takes TextEncoder, .*, got ViT"):
        to_torch(images)
    for module, way in (
        (stack, "from_torch"),
        (text(), "TextEncoder"),
        (timm.create_model("vit_tiny_patch16_224"), "from_timm"),
    ):
        with pytest.raises(ConfigError, match=rf"from_transformers takes a model of transformers.*{way}"):
            from_transformers(module)
    plain = ViT("learned", img_size=32, patch_size=8, embed_dim=E, depth=1, num_heads=H, num_classes=0)
    for module in (text(), stack, MAE(plain, decoder_embed_dim=E, decoder_depth=1, decoder_num_heads=H)):
        with pytest.raises(ConfigError, match=rf"to_timm takes a ViT or a Swin of ours, got {type(module).__name__}"):
            to_timm(module)
    with pytest.raises(ConfigError, match="to_torch"):
        to_timm(text())
    for module in (stack, text(), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=r"from_torch|timm"):
            from_timm(module)
