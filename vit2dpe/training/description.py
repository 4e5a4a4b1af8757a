"""What a model is, before its weights are loaded: the lines of `vit2dpe info`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..encodings import named_encodings
from ..models.timm_api import TimmModel
from ..models.vit import ViT
from ..resolution.apply import policies_of
from .starting_model import Start, on_meta

MANY = 8  # names of classes that are printed


def lines(start: Start) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known."""
    model = on_meta(start.spec)
    yield "read from", start.what
    yield "model", f"{type(model).__name__}, {_parts(model)}"
    yield "encoding", start.position or "its own"
    yield "trained at", f"{_sides(start.size)} pixels, {start.channels} channels" + _grid(model)
    if prefix := getattr(model, "num_prefix_tokens", 0):
        names = model.prefix_tokens() if isinstance(model, ViT) else {}
        yield "leading", ", ".join(f"{token.shape[1]} {name}" for name, token in names.items()) or f"{prefix} tokens"
    if start.classes:
        more = f", ... ({len(start.classes)})" if len(start.classes) > MANY else ""
        yield "classes", ", ".join(start.classes[:MANY]) + more
    else:
        yield "classes", str(getattr(model, "num_classes", 0) or "none")
    if start.mean and start.std:
        yield "normalized", f"mean {_numbers(start.mean)}, std {_numbers(start.std)}"
    if start.policy is not None:
        yield "at other sizes", f"{start.policy['policy']}, temperature {start.policy['temperature'] or 'none'}"
    elif named_encodings(model):
        first, *others = policies_of(model)
        yield "at other sizes", first + (f"; or {', '.join(others)}" if others else "")
    yield "exchange", "vit2dpe swap --to WORD" if start.position is not None else f"no: {start.reason}"


def _parts(model: nn.Module) -> str:
    count = sum(one.numel() for one in model.parameters())
    size = f"{count / 1e6:.2f} M parameters"
    if not isinstance(model, TimmModel) or not hasattr(model, "blocks"):
        return size
    depth = len(list(model.get_submodule("blocks").children()))
    return f"{depth} blocks of {model.embed_dim} channels, {model.num_heads} heads; {size}"


def _grid(model: nn.Module) -> str:
    if not isinstance(model, TimmModel):
        return ""
    return f": {_sides(model.train_grid)} patches of {_sides(model.patch_embed.patch_size)}"


def _sides(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
