"""`attach`: positions for stock modules that exist, through hooks that run before their forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..encodings import NoPosition, PositionEncoding, split_shared_and_per_block
from ..errors import ConfigError
from ..signal import Signal
from .masks import attention_mask, floats
from .places import InputLayout, dims_of, instance_of, layout_of, table_dtype

STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)
LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Call(NamedTuple):
    """How a stock module is called: its arguments, and the names of those that concern self-attention."""

    names: tuple[str, ...]
    mask: str
    padding: str
    causal: str

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Call:
        names = tuple(inspect.signature(kind.forward).parameters)[1:]
        x = names[0]  # "src" or "tgt"
        mask, causal = (full if (full := f"{x}_{name}") in names else name for name in ("mask", "is_causal"))
        return cls(names, mask, f"{x}_key_padding_mask", causal)


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
            an encoding of its own on the same grid) or one of their layers. It is changed in place; its call is not.
        encoding: a spec such as "relative" or "sincos+alibi", or an instance. What is `per_block` (a table for each
            layer) lives in `layers.i.position`, the rest in `position`; both learn, move and save with the module.
        grid: the grid that tables are learned on: a length, or (rows, columns). `use_policy` scales to it.
        prefix: leading tokens that have no place, such as a class token.
        every_layer: each layer owns the whole encoding, so that token terms are added before every layer.

    Raises:
        ConfigError: for rotations, which no mask can bring about (`RotaryEncoderLayer` can); for a module of another
            kind, or one that has positions already.

    While attached `use_nested_tensor` is off: padded tokens keep their rows, as in training. A causal mask has to be
    given as `mask`; the hint `is_causal` is not relied on.
    """
    done = Attached(module)
    if isinstance(module, nn.Transformer):
        parts = [attach(m, encoding, grid=grid, prefix=prefix, every_layer=every_layer)
                 for m in (module.encoder, module.decoder)]  # fmt: skip
        done._undo += [part.detach for part in parts]
        return done
    if not isinstance(module, STACKS + LAYERS):
        raise ConfigError(
            "attach takes nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer or one of their layers, got "
            f"{type(module).__name__}"
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
    for part in (shared, *own):
        if part is not None and "rotation" in part.gives:
            raise ConfigError(
                f"{type(part).__name__} turns queries and keys, which a mask cannot: build the layers as "
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
) -> tuple[tuple[Tensor], dict[str, Tensor | bool]] | None:
    """Hook before a stock module: token terms into its input, bias terms into its mask."""
    position, places = getattr(module, "position", None), getattr(module, "places", None)
    if not isinstance(places, InputLayout) or position is None:
        return None  # a hook is all that it takes to keep a layer off the fast path
    call = next(call for kind, call in CALLS.items() if isinstance(module, kind))
    arguments = dict(zip(call.names, args, strict=False)) | kwargs
    x, mask, padding = arguments.pop(call.names[0]), arguments.get(call.mask), arguments.get(call.padding)
    signal: Signal = position(places.of(x))
    if signal.bias:
        if mask is None and arguments.get(call.causal):
            raise ConfigError(f"{call.causal}=True is a hint, not a mask: give the causal mask as {call.mask} too")
        batch = 1 if x.ndim == 2 else x.shape[0 if places.batch_first else 1]
        bias = attention_mask(signal, batch, x.dtype)
        mask = bias if mask is None else bias + floats(mask, x.dtype)
        if padding is not None:
            arguments[call.padding] = floats(padding, x.dtype)
    handed_on: dict[str, Tensor | bool] = {**arguments}
    if mask is not None:
        # The stock modules compare a mask with the causal one and drop it where they are equal, and with it the
        # gradient of a table that starts at zero.
        handed_on |= {call.mask: mask, call.causal: False}
    return (places.plus(x, signal),), handed_on
