"""A ViT that did not come from timm, written for timm's model of the same function: the steps, from its encodings.

timm has vectors added to tokens (`VisionTransformer`), rotations beside them (`Eva`), and relative biases without them
(`VisionTransformerRelPos`). Everything else is refused, naming what timm lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...encodings import AxialRoPE, CentredRoPE, Cycle, LogCPB, MixedRoPE, PositionEncoding, RelativeBias, Sum, terms
from ...errors import ConfigError
from ...models.layers import Block
from ...models.timm_api import Step, pair
from ...models.vit import ViT
from ...positions import Positions
from ...signal import Signal
from .steps import BiasTable, Evaluated, Frequencies, Rename, Reorder, halves


def native_steps(model: ViT) -> tuple[Step, ...]:
    """The steps between timm's names and this model's.

    Raises:
        ConfigError: where timm has no such model, with the reason.
    """
    shared = [part for part in terms(model.position) if part.gives]
    block = _first_block(model)
    if len(model.train_grid) != 2:
        raise ConfigError("timm has no ViT of videos or lines: keep such a model in its own names (state_dict)")
    kinds_of_blocks = {_kinds(one.attn.position) for one in model.blocks if isinstance(one, Block)}
    if isinstance(model.position, Cycle) or len(kinds_of_blocks) > 1:
        raise ConfigError(
            "timm has no ViT whose blocks have different encodings: keep it in its own names (state_dict)"
        )
    position = block.attn.position
    own = [part for part in terms(position) if part.gives] if isinstance(position, PositionEncoding) else []
    tokens, rest = [part for part in shared if part.gives == {"token"}], [p for p in shared if p.gives != {"token"}]
    kinds = [type(part).__name__ for part in (*rest, *own)]
    steps: list[Step] = []
    if tokens:
        steps.append(Evaluated(tuple(_names(model, tokens)), token_table(model, tokens)))
    if not kinds:
        return tuple(steps)
    if len(kinds) == 1 and kinds[0] in ("RelativeBias", "LogCPB"):
        return _relpos(model, (*rest, *own)[0], bool(tokens))
    steps = [Rename("gamma_1", "ls1.gamma"), Rename("gamma_2", "ls2.gamma"), *steps]
    plain = all(part.even for part in (*rest, *own) if isinstance(part, AxialRoPE | CentredRoPE | MixedRoPE))
    if kinds == ["AxialRoPE"] and plain:
        return tuple(steps)
    if kinds == ["CentredRoPE"] and plain:
        return (*steps, Reorder(block.attn.heads, halves(model.embed_dim // block.attn.heads)))
    if kinds == ["MixedRoPE"] and plain:
        return (*steps, Frequencies())
    raise ConfigError(
        f"timm has no ViT with {' + '.join(kinds)}; it has vectors added to tokens, rotary encodings with or without "
        "them, and relative biases without them: keep such a model in its own names (state_dict), which vit2dpe loads"
    )


def _kinds(position: nn.Module | None) -> tuple[type[PositionEncoding], ...]:
    return tuple(type(part) for part in terms(position)) if isinstance(position, PositionEncoding) else ()


def _first_block(model: ViT) -> Block:
    block = model.blocks[0]
    if not isinstance(block, Block):
        raise ConfigError(f"timm has no ViT with blocks like {type(block).__name__}")
    return block


def token_table(model: ViT, tokens: list[PositionEncoding]) -> Tensor:
    """(1, prefix + N, D) sum of these token terms on the training grid; zeros for leading tokens."""
    at = Positions.grid(model.train_grid, model.patch_embed.proj.weight.device).with_prefix(model.num_prefix_tokens)
    with torch.no_grad():
        signal: Signal = (tokens[0] if len(tokens) == 1 else Sum(tokens))(at)
    if signal.token is None:
        raise ConfigError("these encodings add no vectors to tokens")
    return signal.token.to(model.patch_embed.proj.weight.dtype)


def _names(model: ViT, parts: list[PositionEncoding]) -> list[str]:
    owners = {id(part): name for name, part in model.named_modules()}
    return [f"{owners[id(part)]}.{name}" for part in parts for name in part.state_dict()]


def _relpos(model: ViT, part: PositionEncoding, tokens: bool) -> tuple[Step, ...]:
    """For `VisionTransformerRelPos`, which has a bias for each offset and nothing else."""
    block = _first_block(model)
    lacks = {
        "a table of vectors beside it": tokens,
        "registers or a distillation token": model.num_prefix_tokens > int(model.cls_token is not None),
        "attention pooling": model.attn_pool is not None,
        "a norm before the blocks": model.patch_embed.proj.bias is None,
        "norms inside attention or MLP": not all(
            isinstance(m, torch.nn.Identity) for m in (block.attn.norm, getattr(block.mlp, "norm", torch.nn.Identity()))
        ),
        "an MLP of another kind": not hasattr(block.mlp, "fc1") or type(block.mlp).__name__ != "Mlp",
        "biases of q and v alone": block.attn.q_bias is not None,
        "a bias network trained on another grid": isinstance(part, LogCPB)
        and part.form == "swin"
        and part.grid != tuple(model.train_grid),
        "a table of offsets without their sign": isinstance(part, RelativeBias) and part.attention_biases is not None,
    }
    missing = [part for part, present in lacks.items() if present]
    if missing:
        raise ConfigError(
            f"timm's ViT with a relative bias (VisionTransformerRelPos) has no {' and no '.join(missing)}: keep such a "
            "model in its own names (state_dict), which vit2dpe loads"
        )
    theirs, ours = ("attn.rel_pos", "attn.position") if part.per_block else ("shared_rel_pos", "position")
    if isinstance(part, RelativeBias):
        prefix = model.cls_token is not None
        return (BiasTable(f"{theirs}.", f"{ours}.", pair(model.train_grid), prefix),)
    return Rename(f"{theirs}.mlp.fc1", f"{ours}.cpb_mlp.0"), Rename(f"{theirs}.mlp.fc2", f"{ours}.cpb_mlp.2")
