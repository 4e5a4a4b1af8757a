"""The base of the text models: embedding, places, blocks, on the attention of the vision models.

A line is a grid of one axis. Places count tokens that are not padding, from 0 on, so that a padded batch, on whichever
side, is the unpadded one. The line they live on is at least as long as the context the model was built for: the extent
is `max(context, N)`, and with a cache `max(context, cache.length)`. So a short text never meets a resized table, and a
policy acts beyond the context alone. A BERT's [CLS] is a token like others and has a place.

Legend: B batch, N tokens, D width, V vocabulary. `valid` is boolean (B, N), False for padding.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ...attention import masks
from ...attention.cache import KVCache
from ...attention.functional import Causal, FullMask, Mask, materialize_shared_bias
from ...encodings import (
    Dims,
    Position,
    PositionEncoding,
    build,
    encoding_parameters,
    modules_outside_encodings,
    split_shared_and_per_block,
)
from ...encodings.base import terms
from ...encodings.find import named_encodings
from ...errors import ConfigError
from ...grids import checkable, longer, readable
from ...packed import in_segments
from ...positions import Positions, is_tracing
from ...segments import Segments, nested
from ..arguments import check_arguments
from ..layers import block_inputs, run_block
from ..parts import norm_factory
from ..unwrap import unwrap_names
from .block import Memory, TextBlock, signal_of
from .ragged import lines, packed_places, too_long
from .ragged import pack as pack
from .ragged import pad as pad
from .word_scale import read_scale, scale_words


class Encoded(NamedTuple):
    """An encoder's output (B, S, D) for a decoder, where those tokens are, and which of them are padding (False)."""

    tokens: Tensor
    at: Positions
    valid: Tensor | None = None

    def take(self, index: Tensor) -> Encoded:
        """Reorder samples: sample b becomes the former sample index[b]."""
        at = self.at
        if at.coords.shape[0] > 1:
            at = Positions(at.coords[index], at.extent, on_grid=at.on_grid)
        return Encoded(self.tokens[index], at, None if self.valid is None else self.valid[index])


class SequenceOptions(TypedDict, total=False):
    """Further arguments of `TextModel.forward_features`; see there."""

    types: Tensor | None
    segments: Tensor | Segments | None
    cache: KVCache | None
    memory: Encoded | None
    length: int | None


class TextModel(nn.Module):
    """Base class of the text models: embedding, encoding, blocks, norm.

    Args:
        position: the encoding, a spec such as "rope" or "sincos+alibi", or an instance; of each block in turn:
            "rope/rope/rope/none", or a list.
        vocab_size: V.
        context: tokens the model is trained on; tables have this length, and policies measure other lengths against
            it.
        embed_dim, depth, num_heads, mlp_ratio, qk_norm: as in `ViT`; `hidden` gives the MLP's channels themselves.
        kv_heads: fewer heads of keys and values (arXiv 2305.13245).
        block_position: a further encoding that every block owns.
        cross: whether blocks read a memory; `cross_position` is the encoding between the two sequences (default: none).
        norm, norm_eps, post_norm, mlp, bias, scale: see `TextBlock` and `Attention`.
        final_norm: a norm behind the last block (default: with norms before each branch, not with `post_norm`).
        embed_norm: a norm after the embedding; embed_scale: a factor on it (default: √D beside the sines of "sincos",
            as in arXiv 1706.03762, else 1; weights that were trained without keep 1, see `word_scale.py`).
        token_types: kinds of segments with an embedding of their own (BERT: 2).
        window: how many tokens back (and, without causality, ahead) attention reaches; default all.
        drop_rate, attn_drop_rate, drop_path_rate: dropout of embedding and outputs, of weights, of whole branches.

    Raises:
        ConfigError: for sizes that do not fit each other, or an unknown encoding, norm or MLP; for a decoder with fewer
            `kv_heads` under an encoding whose heads turn differently ("rope_mixed", "rope_golden").
    """

    causal = False

    def __init__(
        self,
        position: Position = "rope",
        *,
        vocab_size: int,
        context: int,
        embed_dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        hidden: int | None = None,
        block_position: Position | None = None,
        cross: bool = False,
        cross_position: str | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        post_norm: bool = False,
        final_norm: bool | None = None,
        mlp: str = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        scale: float | None = None,
        embed_norm: bool = False,
        embed_scale: float | None = None,
        token_types: int = 0,
        window: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(locals())
        super().__init__()
        nn.Module.register_load_state_dict_pre_hook(self, unwrap_names)
        if embed_dim % num_heads or num_heads % (kv_heads or 1):
            raise ConfigError(
                "embed_dim must be a multiple of num_heads, and this of kv_heads: "
                f"got {embed_dim}, {num_heads} and {kv_heads}"
            )
        hidden = hidden or int(embed_dim * mlp_ratio)
        if hidden < 1:
            raise ConfigError(f"the MLP needs hidden channels: got mlp_ratio={mlp_ratio}, hidden={hidden}")
        self.vocab_size, self.context, self.embed_dim, self.window = vocab_size, context, embed_dim, window
        self.embed_scale, self.grad_checkpointing = 1.0 if embed_scale is None else embed_scale, False
        self.train_grid = (context,)
        dims = Dims(embed_dim, num_heads, self.train_grid, depth=depth)
        make_norm = norm_factory(norm, norm_eps)
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.type_embed = nn.Embedding(token_types, embed_dim) if token_types else None
        self.embed_norm = make_norm(embed_dim) if embed_norm else nn.Identity()
        self.embed_drop = nn.Dropout(drop_rate)
        self.position, own = split_shared_and_per_block(position, dims, block_position)
        if self.causal and kv_heads not in (None, num_heads):
            _check_shared_keys([self.position, *own], num_heads, kv_heads or num_heads)
        self.word_scale = scale_words(embed_dim, (self.position, *own)) if embed_scale is None else nn.Identity()
        nn.Module.register_load_state_dict_pre_hook(self, read_scale)
        self.cross_position = _cross_position(cross_position, cross, dims)
        self.blocks = nn.ModuleList(
            TextBlock(
                embed_dim,
                num_heads,
                kv_heads=kv_heads,
                hidden=hidden,
                norm=norm,
                eps=norm_eps,
                mlp=mlp,
                bias=bias,
                post_norm=post_norm,
                cross=cross,
                qk_norm=qk_norm,
                scale=scale,
                position=own[i],
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                drop_path=drop_path_rate * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.norm = make_norm(embed_dim) if (not post_norm if final_norm is None else final_norm) else nn.Identity()
        self.init_weights()

    def forward_features(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        types: Tensor | None = None,
        segments: Tensor | Segments | None = None,
        cache: KVCache | None = None,
        memory: Encoded | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Token ids (B, N) -> (B, N, D).

        Args:
            valid: (B, N), False for padding, which nothing attends to.
            types: (B, N) kinds of segments; default 0.
            segments: of a packed batch, made by `pack`: places begin anew at each document, and attention stays within
                it. Or document numbers (B|1, N): the same by a mask of all pairs, which any model that is compiled or
                exported makes too, one graph for all.
            cache: keys and values of earlier tokens; those of these tokens are appended.
            memory: an encoder's output, for cross-attention.
            length: the extent of the line, where that is longer than the context and N (or, packed, than the context):
                one for all texts of the batch.

        Raises:
            ConfigError: for a nested tensor, or a combination that has no meaning; for texts of different lengths
                beyond the context, padded, where the answer depends on the length of the line (see `one_line`).
        """
        if tokens.is_nested:
            raise nested("pad the batch and give `valid`, or join it with `pack`")
        if segments is not None and (cache is not None or valid is not None):
            raise ConfigError("a packed batch has neither padding nor a cache: give `segments` alone")
        if isinstance(segments, Segments) and _is_traced(tokens):
            segments = segments.numbers  # one graph for all
        at = self.positions(tokens, valid, segments, cache, length)
        keys, present = at, valid
        if cache is not None:
            cache.extend(at, valid)
            keys, present = cache.at or at, cache.valid
        mask = self._mask(at, keys, present, segments)
        read = None if memory is None else self._read(memory, at)
        x = self._embed(tokens, types)  # (B, N, D)
        x, signal = block_inputs(x, signal_of(self.position, at, keys))  # geometry becomes tensors, once
        x = self.embed_drop(self.embed_norm(x))
        for i, block in enumerate(self.blocks):
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            layer = None if cache is None or recompute else cache.layer(i)
            read_on = dict(keys=keys, cache=layer, memory=read)
            x = run_block(block, x, signal, at, mask, index=i, recompute=recompute, **read_on)
        out: Tensor = self.norm(x)
        return out

    def positions(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        segments: Tensor | Segments | None = None,
        cache: KVCache | None = None,
        length: int | None = None,
    ) -> Positions:
        """Positions of these tokens, the argument of `position`."""
        n, device = tokens.shape[1], tokens.device
        if segments is not None:
            line = max(self.context, length or 0)
            places = packed_places(segments.numbers if isinstance(segments, Segments) else segments)
            if isinstance(segments, Segments):
                by_kind = lines(segments, line)
                return in_segments(Positions(places.float()[..., None], (line,), on_grid=True), segments, by_kind)
            if checkable(places) and places.numel() and int(places.max()) >= line:
                raise too_long(int(places.max()) + 1, line)
            known = checkable(places) or not readable(places) or n <= line
            return Positions(places.float()[..., None], (line,), on_grid=known)
        line = longer(max(self.context, length or 0), n if cache is None else cache.length)
        if valid is not None and cache is None and not _is_traced(valid) and line == n > self.context:
            line = self.one_line(valid)
        cached = 0 if cache is None else cache.size
        before = None if cache is None else cache.valid
        if valid is None and before is None:
            return Positions.sequence(n, cached, line, device)
        new = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        count = cached if before is None else before.sum(dim=1, keepdim=True)
        # Padding stands where the token before it stands, or at 0: inside the line, and never attended to.
        places = (count + new.cumsum(dim=1) - 1).clamp(min=0)
        return Positions(places.float()[..., None], (line,), on_grid=True)

    def one_line(self, valid: Tensor, new: int = 0) -> int:
        """The extent of the line of a padded batch whose texts, `new` tokens longer, may go beyond the context.

        A resized table, a policy or a temperature act by the length of the line. Were that of the longest text taken
        for all, a short one would change with its neighbours. Tested in eager mode alone.

        Raises:
            ConfigError: where texts that want lines of different lengths stand in one batch, and it matters.
        """
        line = max(self.context, valid.shape[1] + new)
        if line == self.context or _is_traced(valid):
            return line
        measuring = [e for e in named_encodings(self).values() if e.measures_extent()]
        if not measuring:
            return line
        shortest, longest = ((valid.sum(dim=1) + new).clamp(min=self.context).aminmax()) if len(valid) else (line, line)
        if shortest != longest:
            raise ConfigError(
                f"texts of {int(shortest)} (or fewer) and {int(longest)} tokens in one batch, beyond a context of "
                f"{self.context}: {type(measuring[0]).__name__} goes by the length of the line, and the short text "
                "would change with its neighbours. Give texts of one length together, or name the length of the line "
                "for all: length= or a KVCache"
            )
        return int(longest)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Full names of the encodings' parameters."""
        return encoding_parameters(self)

    def init_weights(self) -> None:
        """GPT-2's: normal 0.02, zero biases, maps that end in the residual sum divided by √(2 depth)."""
        for name, module in modules_outside_encodings(self):
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith(("proj", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / ((2 * len(self.blocks)) ** 0.5 if last else 1.0))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _mask(
        self, at: Positions, keys: Positions, present: Tensor | None, segments: Tensor | Segments | None
    ) -> Mask | None:
        """Where tokens at `at` may attend among those at `keys`, which are themselves or end with them."""
        if isinstance(segments, Segments):
            reach, by_kind = self.window, () if at.row is None else at.row.places
            near = () if reach is None else tuple([masks.window(one, one, reach) for one in by_kind])
            return segments.under(self.causal, near)
        if self.causal and keys is at and self.window is None and present is None and segments is None:
            return Causal(at)
        newest = keys is not at and at.coords.shape[1] == 1  # one new token: all others are before it
        mask = masks.both(
            masks.causal(at, keys) if self.causal and not newest else None,
            None if self.window is None else masks.window(at, keys, self.window),
            None if present is None else masks.present(present),
            None if segments is None else masks.same(segments, segments),
        )
        return FullMask(mask) if mask is not None and present is None else mask  # a token attends to itself at least

    def _embed(self, tokens: Tensor, types: Tensor | None) -> Tensor:
        x: Tensor = self.word_scale(self.embed(tokens))
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        if self.type_embed is None:
            return x
        typed: Tensor = x + self.type_embed(torch.zeros_like(tokens) if types is None else types)
        return typed

    def _read(self, memory: Encoded, at: Positions) -> Memory:
        """The memory with its mask, and the Signal between the two sequences where there is one."""
        mask = None if memory.valid is None else masks.present(memory.valid)
        if self.cross_position is None:
            return Memory(memory.tokens, mask)
        extent = (max(at.one_extent[0], memory.at.one_extent[0]),)
        q, k = (Positions(side.coords, extent, on_grid=side.on_grid) for side in (at, memory.at))
        return Memory(memory.tokens, mask, materialize_shared_bias(self.cross_position(q, k), memory.tokens))


def _is_traced(x: Tensor) -> bool:
    """Whether the numbers in `x` cannot be looked at."""
    return torch.compiler.is_compiling() or is_tracing() or x.is_meta


def _check_shared_keys(encodings: list[PositionEncoding | None], heads: int, kv_heads: int) -> None:
    """A decoder keeps its keys turned: heads that share one must turn alike."""
    for encoding in [e for part in encodings if part is not None for e in terms(part) if "rotation" in e.gives]:
        device = next((p.device for p in encoding.parameters()), None)
        training = encoding.training
        with torch.no_grad():
            turn = encoding.eval()(Positions.sequence(1, device=device)).q_rotation
        encoding.train(training)
        if turn is not None and turn.cos.shape[1] not in (1, kv_heads):
            raise ConfigError(
                f"the {heads} heads of {type(encoding).__name__} turn differently and cannot share {kv_heads} heads of "
                "keys, which a decoder keeps turned: give kv_heads as many as num_heads, or another encoding"
            )


def _cross_position(spec: str | None, cross: bool, dims: Dims) -> PositionEncoding | None:
    if spec is None:
        return None
    if not cross:
        raise ConfigError(f"cross_position={spec!r} is for models with cross-attention: Seq2Seq, or cross=True")
    encoding = build(spec, dims)
    if "token" in encoding.gives:
        raise ConfigError(
            f"cross_position={spec!r} adds to tokens; between two sequences only a rotation or a bias can"
        )
    return encoding
