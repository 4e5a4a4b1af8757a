"""`attach`: positions for stock modules that exist, through hooks that run before their forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..encodings import Cycle, NoPosition, PositionEncoding, split_shared_and_per_block, terms
from ..errors import ConfigError
from ..signal import Signal
from .masks import as_stock, attention_mask, by_head, check_padding, floats
from .places import InputLayout, dims_of, instance_of, layout_of, table_dtype

STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)
LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)


class Call(NamedTuple):
    """How a stock module is called: its arguments, and the names of those that concern self-attention."""

    names: tuple[str, ...]
    mask: str
    padding: str
    causal: str
    inputs: int  # how many of the first arguments are tokens of self-attention

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Call:
        names = tuple(inspect.signature(kind.forward).parameters)[1:]
        if kind is nn.MultiheadAttention:
            return cls(names, "attn_mask", "key_padding_mask", "is_causal", 3)
        x = names[0]  # "src" or "tgt"
        mask, causal = (full if (full := f"{x}_{name}") in names else name for name in ("mask", "is_causal"))
        return cls(names, mask, f"{x}_key_padding_mask", causal, 1)


CALLS = {kind: Call.of(kind) for kind in (*STACKS, *LAYERS)}


class Attached:
    """Handle of `attach`; `detach`, or the end of a `with` block, undoes it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._undo: list[Callable[[], None]] = []

    def detach(self) -> None:
        """Leave the module as it was, without its encodings."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _hook(self, module: nn.Module, position: PositionEncoding | None, places: InputLayout) -> None:
        if position is not None:
            module.position = position.train(module.training)
            module.places = places  # type: ignore[assignment]
            self._undo += [lambda: delattr(module, "position"), lambda: delattr(module, "places")]
        self._undo.append(module.register_forward_pre_hook(_before, with_kwargs=True).remove)

    def _set(self, module: nn.Module, name: str, value: bool | tuple[int, ...]) -> None:
        before = getattr(module, name, None)
        self._undo.append(lambda: delattr(module, name) if before is None else setattr(module, name, before))
        setattr(module, name, value)


def attach(
    module: nn.Module,
    encoding: str | PositionEncoding,
    *,
    grid: int | tuple[int, ...],
    prefix: int = 0,
    every_layer: bool = False,
) -> Attached:
    """Give the self-attention of a stock module positions; right in training and in inference, compiled or not.

    Args:
        module: an `nn.TransformerEncoder`, `nn.TransformerDecoder`, `nn.Transformer` (both of its stacks, each with
            an encoding of its own on the same grid), one of their layers, or an `nn.MultiheadAttention`. It is changed
            in place; its call is not, save that masks may be (N, L, S) too.
        encoding: a spec such as "relative" or "sincos+alibi", or an instance. What is `per_block` (a table for each
            layer) lives in `layers.i.position`, the rest in `position`; both learn, move and save with the module.
        grid: the grid that tables are learned on: a length, or (rows, columns). `use_policy` scales to it.
        prefix: leading tokens that have no place, such as a class token.
        every_layer: each layer owns the whole encoding, so that token terms are added before every layer.

    Raises:
        ConfigError: for rotations, which no mask can bring about (`RotaryEncoderLayer` can); for a module of another
            kind, or one that has positions already.

    While attached `use_nested_tensor` is off: padded tokens keep their rows, as in training. A causal mask has to be
    given as `mask`; the hint `is_causal` is not relied on. An attention by itself takes biases in cross-attention too,
    with queries and keys on one line or grid; token terms are added where query, key and value are one tensor.
    """
    done = Attached(module)
    if isinstance(module, nn.Transformer):
        parts = [attach(m, encoding, grid=grid, prefix=prefix, every_layer=every_layer)
                 for m in (module.encoder, module.decoder)]  # fmt: skip
        done._undo += [part.detach for part in parts]
        return done
    if not isinstance(module, STACKS + LAYERS):
        raise ConfigError(
            "attach takes nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, one of their layers or "
            f"nn.MultiheadAttention, got {type(module).__name__}"
        )
    alone = isinstance(module, LAYERS)
    layers: list[nn.Module] = [module]
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        layers = list(module.layers)
    for owner in (module, *layers):
        if hasattr(owner, "position"):
            raise ConfigError(f"this {type(owner).__name__} has positions already: detach them first")
    places = layout_of(module, grid, prefix)
    dims = dims_of(module, places, depth=len(layers))
    shared: PositionEncoding = NoPosition()
    own: list[PositionEncoding | None]
    if alone:
        own = [instance_of(encoding, dims)]
    else:
        shared, own = (
            split_shared_and_per_block("none", dims, encoding)
            if every_layer
            else split_shared_and_per_block(encoding, dims)
        )
    if isinstance(shared, Cycle):
        raise ConfigError(
            f"{encoding!r} names an encoding for each layer in turn, and a stock stack hands one mask to all of its "
            "layers: every_layer=True gives each layer its own"
        )
    for part in (shared, *own):
        does = "turns" if part and "rotation" in part.gives else "multiplies"
        if part and (does == "turns" or any(term.contextual for term in terms(part))):
            raise ConfigError(
                f"{type(part).__name__} {does} queries and keys, which a mask cannot: build the layers as "
                "stock.RotaryEncoderLayer, whose state_dict is the stock layer's"
            )
    like = next(module.parameters())
    for layer, part in zip(layers, own, strict=True):
        done._hook(layer, None if part is None else part.to(like.device, table_dtype(like)), places)
    if not alone:
        done._hook(module, shared.to(like.device, table_dtype(like)), places)
        if isinstance(module, nn.TransformerEncoder):
            done._set(module, "use_nested_tensor", False)
    done._set(module, "train_grid", places.grid)
    return done


def _before(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor | bool]] | None:
    """Hook before a stock module: token terms into its input, bias terms into its mask."""
    position, places = getattr(module, "position", None), getattr(module, "places", None)
    if not isinstance(places, InputLayout) or position is None:
        return None  # a hook is all that it takes to keep a layer off the fast path
    call = next(call for kind, call in CALLS.items() if isinstance(module, kind))
    arguments = dict(zip(call.names[: len(args)], args, strict=True)) | kwargs
    tokens = [arguments.pop(name) for name in call.names[: call.inputs]]
    query, key = tokens[0], tokens[min(1, call.inputs - 1)]
    alone = all(x is query for x in tokens)  # self-attention
    signal: Signal = position(places.of(query)) if alone else position(*places.between(query, key))
    if signal.token is not None and not alone:
        raise ConfigError(
            f"{type(position).__name__} adds to tokens, and query, key and value are not one tensor: between two "
            "sequences only a bias can; put stock.TokenPosition before each of them"
        )
    (batch, queries), (_, keys), heads = places.sizes(query), places.sizes(key), dims_of(module, places).heads
    mask, padding = arguments.get(call.mask), arguments.get(call.padding)
    if padding is not None:
        check_padding(padding, batch, keys, call.padding)
    if mask is not None:
        mask = as_stock(by_head(mask, batch, heads, queries, keys, call.mask), batch, heads)
    memory = arguments.get("memory_mask")
    if memory is not None:
        seen = places.sizes(arguments["memory"])[1]
        arguments["memory_mask"] = as_stock(by_head(memory, batch, heads, queries, seen, "memory_mask"), batch, heads)
    if signal.bias:
        if mask is None and arguments.get(call.causal):
            raise ConfigError(f"{call.causal}=True is a hint, not a mask: give the causal mask as {call.mask} too")
        bias = attention_mask(signal, batch, query.dtype)
        mask = bias if mask is None else bias + floats(mask, query.dtype)
        if padding is not None:
            arguments[call.padding] = floats(padding, query.dtype)
    handed_on: dict[str, Tensor | bool] = {**arguments}
    if mask is not None:
        # The stock modules compare a mask with the causal one and drop it where they are equal, and with it the
        # gradient of a table that starts at zero.
        handed_on |= {call.mask: mask, call.causal: False}
    if alone:
        tokens = [places.plus(query, signal)] * call.inputs
    return tuple(tokens), handed_on
