"""Our text models as torch's own Transformer, with their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...encodings import NoPosition
from ...errors import ConfigError
from ...models.text.block import TextBlock
from ...models.text.heads import TextDecoder, TextEncoder
from ...models.text.model import TextModel
from ...models.text.seq2seq import Seq2Seq
from .read import State, names_of_layer

GIVEN = "TextEncoder, TextDecoder, Seq2Seq and TextBlock"
Activation = Callable[[Tensor], Tensor]


def to_torch(model: nn.Module) -> nn.Module:
    """Torch's own Transformer with the weights of ours, `batch_first`, in evaluation mode.

    A `TextEncoder` becomes an `nn.TransformerEncoder`; a `TextDecoder` too, to be called with a causal mask, or an
    `nn.TransformerDecoder` where it reads a memory; a `Seq2Seq` an `nn.Transformer`; a `TextBlock` a layer. Embedding
    and head stay with ours: the stack takes vectors, `model.embed(tokens)`, and gives `model.forward_features(tokens)`.

    Raises:
        ConfigError: for another model, with those that are taken; for parts that torch's Transformer lacks, with each.
    """
    made: nn.Module
    if isinstance(model, TextBlock):
        made = _layer(model)
    elif isinstance(model, Seq2Seq):
        made = _pair(model)
    elif isinstance(model, TextEncoder | TextDecoder):
        made = _stack(model)
    else:
        raise ConfigError(f"to_torch takes {GIVEN}, got {type(model).__name__}")
    like = next(model.parameters())
    return made.to(like.device, like.dtype).eval()


def _pair(model: Seq2Seq) -> nn.Transformer:
    encoder, decoder = _stack(model.encoder), _stack(model.decoder)
    made = nn.Transformer(
        model.encoder.embed_dim,
        encoder.layers[0].self_attn.num_heads,
        custom_encoder=copy.deepcopy(encoder),
        custom_decoder=copy.deepcopy(decoder),
        batch_first=True,
    )
    made.encoder.load_state_dict(encoder.state_dict())  # it draws the weights of what it is given anew
    made.decoder.load_state_dict(decoder.state_dict())
    return made


def _stack(model: TextModel) -> nn.TransformerEncoder | nn.TransformerDecoder:
    lacking = [f"position {model.position!r}"] * (not isinstance(model.position, NoPosition))
    lacking += [f"cross_position {model.cross_position!r}"] * (model.cross_position is not None)
    lacking += [f"window={model.window}"] * (model.window is not None)
    lacking += ["no block"] * (len(model.blocks) == 0)
    if lacking:
        raise ConfigError(
            f"torch's Transformer lacks {', '.join(lacking)}: build ours with position='none', write it, and add an "
            "encoding by vit2dpe.stock.attach"
        )
    layers = [_layer(block) for block in model.blocks if isinstance(block, TextBlock)]
    norm = None
    if isinstance(model.norm, nn.LayerNorm):
        norm = nn.LayerNorm(model.embed_dim, eps=model.norm.eps)
        norm.load_state_dict(model.norm.state_dict())
    first = layers[0]
    stack: nn.TransformerEncoder | nn.TransformerDecoder
    if isinstance(first, nn.TransformerDecoderLayer):
        stack = nn.TransformerDecoder(first, len(layers), norm)
    else:
        stack = nn.TransformerEncoder(first, len(layers), norm, enable_nested_tensor=False)
    for made, layer in zip(stack.layers, layers, strict=True):
        made.load_state_dict(layer.state_dict())
    return stack


def _layer(block: TextBlock) -> nn.TransformerEncoderLayer | nn.TransformerDecoderLayer:
    attention, mlp = block.attn, block.mlp
    wide = getattr(mlp, "fc1", None)  # gated ones have two
    act = _activation(getattr(mlp, "act", None)) if isinstance(wide, nn.Linear) else None
    norms = [norm for norm in (block.norm1, block.norm_cross, block.norm2) if norm is not None]
    eps = {norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)}
    lacking = ["norms other than LayerNorm"] * (not all(isinstance(norm, nn.LayerNorm) for norm in norms))
    lacking += [f"the MLP {type(mlp).__name__} with {getattr(mlp, 'act', None)!r}"] * (act is None)
    lacking += ["an encoding of the block's own"] * (attention.position is not None)
    lacking += ["fewer heads of keys (kv_heads)"] * (attention.kv_heads != attention.heads)
    lacking += ["norms of queries and keys (qk_norm)"] * (not isinstance(attention.q_norm, nn.Identity))
    lacking += [f"scale={attention.scale}"] * (attention.scale is not None)
    if lacking or act is None or not isinstance(wide, nn.Linear):
        raise ConfigError(f"torch's Transformer layers lack {', '.join(lacking)}")
    dim, kind = (
        attention.proj.in_features,
        nn.TransformerEncoderLayer if block.cross is None else nn.TransformerDecoderLayer,
    )
    biased = attention.qkv.bias is not None
    state = _write(block.state_dict(), block.cross is not None)
    if not biased:
        biases = [name for name in state if "norm" in name and name.endswith(".bias")]
        if any(bool(state[name].any()) for name in biases):
            raise ConfigError("a layer of torch's with bias=False has none in its norms, and those of ours are not 0")
        state = {name: value for name, value in state.items() if name not in biases}
    layer = kind(
        dim,
        attention.heads,
        wide.out_features,
        dropout=attention.proj_drop.p,
        activation=act,
        layer_norm_eps=eps.pop(),
        batch_first=True,
        norm_first=not block.post_norm,
        bias=biased,
    )
    layer.load_state_dict(state)
    layer.self_attn.dropout = attention.attn_drop
    return layer


def _activation(act: nn.Module | None) -> Activation | None:
    """As torch's layers take it, by the functions for which they have a fast path."""
    if isinstance(act, nn.ReLU):
        return F.relu
    if isinstance(act, nn.GELU):
        return F.gelu if act.approximate == "none" else nn.GELU(approximate=act.approximate)
    return None


def _write(state: State, cross: bool) -> State:
    """Weights of a block under their names."""
    names, written = names_of_layer(cross), State()
    for theirs, ours in names.items():
        written |= {theirs + n.removeprefix(ours): v for n, v in state.items() if n.startswith(ours)}
    for kind in ("weight", "bias"):
        if f"cross.q.{kind}" in state:
            written[f"multihead_attn.in_proj_{kind}"] = torch.cat([state[f"cross.q.{kind}"], state[f"cross.kv.{kind}"]])
    return written
