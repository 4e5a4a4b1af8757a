"""Weights of torch's own Transformer in our text models, and back.

    nn.TransformerEncoder                        TextEncoder, or TextDecoder where it is called with a causal mask
    nn.TransformerDecoder                        TextDecoder that reads a memory
    nn.Transformer                               Seq2Seq
    nn.TransformerEncoderLayer, DecoderLayer     TextBlock

Torch's modules begin behind an embedding, which is yours: `model.forward_features(tokens)` is what the stack gives for
`embedding(tokens)`. They have no encoding either; ours has the one that is named, by default `none`. q, k and v are one
matrix in the same order on both sides, so that weights change their names alone.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ...models.spec import Arguments
from ...models.text.block import TextBlock
from ...models.text.heads import TextDecoder, TextEncoder
from ...models.text.seq2seq import Seq2Seq

State = dict[str, Tensor]
TheirLayer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
TheirStack = nn.TransformerEncoder | nn.TransformerDecoder
TAKEN = (
    "nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.TransformerEncoderLayer and "
    "nn.TransformerDecoderLayer"
)


def names_of_layer(cross: bool) -> dict[str, str]:
    """Maps and norms of a layer, theirs -> ours, but for the `in_proj` of cross-attention, which ours has in two."""
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "norm1.": "norm1."}
    names |= {"linear1.": "mlp.fc1.", "linear2.": "mlp.fc2."}
    if not cross:
        return names | {"norm2.": "norm2."}
    return names | {"multihead_attn.out_proj.": "cross.proj.", "norm2.": "norm_cross.", "norm3.": "norm2."}


class Layer(NamedTuple):
    """What a layer of theirs is, apart from its weights."""

    dim: int
    heads: int
    hidden: int
    act: str
    eps: float
    norm_first: bool
    cross: bool
    bias: bool
    dropout: float
    attention_dropout: float
    final_norm: bool = False
    depth: int = 1  # of its stack

    def block(self) -> Arguments:
        """Arguments of `TextBlock`, those of a model too."""
        return dict(hidden=self.hidden, mlp=self.act, post_norm=not self.norm_first, cross=self.cross, bias=self.bias)


def from_torch(
    module: nn.Module,
    embedding: nn.Embedding | None = None,
    target_embedding: nn.Embedding | None = None,
    *,
    context: int | None = None,
    position: str = "none",
    causal: bool = False,
    embed_scale: float = 1.0,
) -> TextEncoder | TextDecoder | Seq2Seq | TextBlock:
    """Our model, or block, with the weights of torch's own; in evaluation mode, in their type and on their device.

    Args:
        module: a stack, an `nn.Transformer`, or one layer, with `batch_first` or without (ours takes (B, N) ids).
        embedding: what stands before it, of the source for an `nn.Transformer`; copied. A layer has none.
        target_embedding: of an `nn.Transformer`'s decoder; default: `embedding`, shared by both.
        context: tokens the model is for; see `TextModel`. A layer has none.
        position: the encoding, such as "rope"; with "none" the outputs are equal.
        causal: whether an `nn.TransformerEncoder` is called with a causal mask: it becomes a `TextDecoder`. An
            `nn.TransformerDecoder` becomes a causal one in any case.
        embed_scale: factor on the embedding's vectors, often √D.

    Returns:
        a `TextEncoder` with pool="" and without head, a `TextDecoder` whose head is the embedding's matrix, a
        `Seq2Seq`, or a `TextBlock`. Where theirs has no biases, the norms of ours have some, of 0. Dropout is theirs,
        and acts on the embedding too.

    Raises:
        ConfigError: for a module of another kind, with the kinds that are taken; for layers that differ from one
            another; for parts that ours lacks.
    """
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        if embedding is not None or context is not None or causal or position != "none":
            raise ConfigError("a layer becomes a TextBlock, which has no embedding, context, causality or position")
        about = about_layer(module)
        block = TextBlock(about.dim, about.heads, eps=about.eps, **about.block(), **_dropout(about, "proj_drop"))
        return _filled(block, read_layer(module), module)
    if not isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder | nn.Transformer):
        raise ConfigError(f"from_torch takes {TAKEN}, got {type(module).__name__}")
    if embedding is None or context is None:
        raise ConfigError(
            f"an {type(module).__name__} begins behind an embedding and has no length: give both, as in "
            "from_torch(module, embedding, context=512)"
        )
    parts = (
        {"": module} if not isinstance(module, nn.Transformer) else dict(encoder=module.encoder, decoder=module.decoder)
    )
    read: dict[str, tuple[Layer, State]] = {}
    for name, stack in parts.items():
        if not isinstance(stack, nn.TransformerEncoder | nn.TransformerDecoder) or len(stack.layers) == 0:
            raise ConfigError(f"a stack of torch's own with layers is needed, got {type(stack).__name__}")
        read[name] = _read_stack(stack)
    about = next(iter(read.values()))[0]
    if len({kind._replace(cross=False, depth=1) for kind, _ in read.values()}) > 1:
        raise ConfigError(
            f"a Seq2Seq has layers of one kind, encoder and decoder differ: {[k for k, _ in read.values()]}"
        )
    widths = {part.embedding_dim for part in (embedding, target_embedding) if part is not None}
    if widths != {about.dim}:
        raise ConfigError(f"the embedding must be as wide as the layers, {about.dim}, got {sorted(widths)}")
    state = {f"{name}.{n}" if name else n: value for name, (_, part) in read.items() for n, value in part.items()}
    arguments: Arguments = about.block() | _dropout(about, "drop_rate") | dict(
        position=position, context=context, embed_scale=embed_scale, embed_dim=about.dim, num_heads=about.heads,
        norm_eps=about.eps, final_norm=about.final_norm,
    )  # fmt: skip
    if "" not in read:
        target = target_embedding or embedding
        del arguments["cross"]
        arguments |= dict(source_vocab=embedding.num_embeddings, target_vocab=target.num_embeddings)
        arguments |= dict(shared=target is embedding, depth=read["encoder"][0].depth)
        state |= {"encoder.embed.weight": embedding.weight, "decoder.embed.weight": target.weight}
        return _filled(Seq2Seq(decoder_depth=read["decoder"][0].depth, **arguments), state, module)
    if target_embedding is not None:
        raise ConfigError(f"target_embedding is for an nn.Transformer, not for an {type(module).__name__}")
    state["embed.weight"] = embedding.weight
    arguments |= dict(vocab_size=embedding.num_embeddings, depth=about.depth)
    if about.cross or causal:
        return _filled(TextDecoder(**arguments), state, module)
    return _filled(TextEncoder(pool="", **arguments), state, module)


def _read_stack(stack: TheirStack) -> tuple[Layer, State]:
    """What its layers are, and its weights under our names."""
    if hasattr(stack, "position"):
        raise ConfigError(
            f"this {type(stack).__name__} has positions attached: detach them, and name them as position="
        )
    kinds = [about_layer(layer) for layer in stack.layers]
    if len(set(kinds)) > 1:
        raise ConfigError(f"the layers of a stack must be of one kind, got {kinds}")
    about, norm = kinds[0], stack.norm
    state = {f"blocks.{i}.{n}": v for i, layer in enumerate(stack.layers) for n, v in read_layer(layer).items()}
    if norm is not None:
        if not isinstance(norm, nn.LayerNorm) or norm.eps != about.eps:
            raise ConfigError(f"the final norm must be a LayerNorm with the eps {about.eps} of the layers, got {norm}")
        state |= {f"norm.{name}": value for name, value in norm.named_parameters()}
    return about._replace(final_norm=norm is not None, depth=len(kinds)), state


def about_layer(layer: nn.Module) -> Layer:
    """What a layer of theirs is; refuses those that are no torch layer, or of parts that ours lacks."""
    own = type(layer) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer) and not hasattr(layer, "position")
    if not isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) or not own:
        raise ConfigError(
            "layers must be torch's own, nn.TransformerEncoderLayer or nn.TransformerDecoderLayer without positions, "
            f"got {type(layer).__name__}"
        )
    attention, cross = layer.self_attn, isinstance(layer, nn.TransformerDecoderLayer)
    norms = [layer.norm1, layer.norm2, *([layer.norm3] if cross else [])]
    eps = {norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)}
    if len(eps) != 1 or not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        raise ConfigError(f"norms of a layer must be LayerNorms of one eps, got {norms}")
    return Layer(
        dim=attention.embed_dim,
        heads=attention.num_heads,
        hidden=layer.linear1.out_features,
        act=_activation(layer.activation),
        eps=eps.pop(),
        norm_first=layer.norm_first,
        cross=cross,
        bias=layer.linear1.bias is not None,
        dropout=layer.dropout.p,
        attention_dropout=attention.dropout,
    )


def _activation(activation: object) -> str:
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    raise ConfigError(f"activations that ours has: relu, gelu, gelu with approximate='tanh'; got {activation!r}")


def read_layer(layer: nn.Module) -> State:
    """Weights of a layer under our names."""
    names, state = names_of_layer(isinstance(layer, nn.TransformerDecoderLayer)), State()
    for name, value in layer.state_dict().items():
        if name.startswith("multihead_attn.in_proj_"):
            kind, width = name.removeprefix("multihead_attn.in_proj_"), len(value) // 3
            state |= {f"cross.q.{kind}": value[:width], f"cross.kv.{kind}": value[width:]}
            continue
        found = next((theirs for theirs in names if name.startswith(theirs)), None)
        if found is None:
            raise CheckpointError(f"a weight that ours has no place for: {name}")
        state[names[found] + name.removeprefix(found)] = value
    return state


def _dropout(about: Layer, name: str) -> Arguments:
    attention = "attn_drop" if name == "proj_drop" else "attn_drop_rate"
    return {name: about.dropout, attention: about.attention_dropout}


Ours = TypeVar("Ours", TextEncoder, TextDecoder, Seq2Seq, TextBlock)


def _filled(ours: Ours, state: State, theirs: nn.Module) -> Ours:
    """`ours` with these weights; norms of which theirs has no bias keep one of 0."""
    missing, unexpected = ours.load_state_dict(state, strict=False)
    wrong = [n for n in missing if not ("norm" in n and n.endswith(".bias")) and "position." not in n] + unexpected
    if wrong:
        raise CheckpointError(f"weights without a counterpart: {', '.join(wrong[:5])}")
    like = next(theirs.parameters())
    return ours.to(like.device, like.dtype).eval()
