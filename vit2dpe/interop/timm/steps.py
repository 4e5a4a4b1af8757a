"""Steps between timm's parameters and ours, each with its way back.

A step changes a state_dict in place: `into` takes timm's names and layouts to ours, `back` ours to timm's. It
reads sizes from its fields and from the shapes of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...models.mae_names import State
from ...models.swin.model import Swin
from ...models.timm_api import Step
from ...models.vit import ViT


@dataclass(frozen=True)
class Rename:
    """`theirs` <-> `ours`, whole parts of a dotted name: gamma_1 <-> ls1.gamma."""

    theirs: str
    ours: str

    def into(self, state: State) -> None:
        _rename(state, self.theirs, self.ours)

    def back(self, state: State) -> None:
        _rename(state, self.ours, self.theirs)


def keep_training(ours: ViT | Swin, theirs: nn.Module, steps: Iterable[Step]) -> None:
    """What is frozen there is frozen here; evaluation mode and gradient checkpointing come along too."""
    ours.train(theirs.training)
    if any(getattr(part, "grad_checkpointing", False) for part in theirs.modules()):  # a Swin's are in its stages
        ours.set_grad_checkpointing()
    state = theirs.state_dict(keep_vars=True)
    if all(value.requires_grad or value.is_meta for value in state.values() if isinstance(value, nn.Parameter)):
        return
    learns: State = {name: torch.full_like(value, float(value.requires_grad)) for name, value in state.items()}
    for step in steps:
        step.into(learns)
    for name, parameter in ours.named_parameters():
        if name in learns:
            parameter.requires_grad_(bool(learns[name].any()))


@dataclass(frozen=True)
class Fuse:
    """q_proj, k_proj, v_proj <-> qkv; biases of q and v alone become q_bias and v_bias."""

    def into(self, state: State) -> None:
        for key in [key for key in state if key.endswith("attn.q_proj.weight")]:
            owner = key.removesuffix("q_proj.weight")
            state[f"{owner}qkv.weight"] = torch.cat([state.pop(f"{owner}{x}_proj.weight") for x in "qkv"])
            for x in "qv":
                if f"{owner}{x}_proj.bias" in state:
                    state[f"{owner}{x}_bias"] = state.pop(f"{owner}{x}_proj.bias")

    def back(self, state: State) -> None:
        for key in [key for key in state if key.endswith("attn.qkv.weight")]:
            owner = key.removesuffix("qkv.weight")
            for x, part in zip("qkv", state.pop(key).chunk(3), strict=True):
                state[f"{owner}{x}_proj.weight"] = part.clone()
            for x in "qv":
                if f"{owner}{x}_bias" in state:
                    state[f"{owner}{x}_proj.bias"] = state.pop(f"{owner}{x}_bias")


@dataclass(frozen=True)
class Reorder:
    """The channels of every head of q and k in another order: our channel i is their channel order[i].

    Their products do not change, so this is how pairs that are not (2i, 2i+1), or axes that are not rows first, become
    ours. v keeps its order.
    """

    heads: int
    order: tuple[int, ...]

    def into(self, state: State) -> None:
        self._apply(state, torch.tensor(self.order, device="cpu"))

    def back(self, state: State) -> None:
        self._apply(state, torch.tensor(self.order, device="cpu").argsort())

    def _apply(self, state: State, order: Tensor) -> None:
        for key in state:
            name = key.rpartition("attn.")[2]
            order = order.to(state[key].device)
            if name in ("qkv.weight", "qkv.bias"):
                q, k, v = state[key].chunk(3)
                state[key] = torch.cat([self._heads(q, order), self._heads(k, order), v])
            elif name == "q_bias":
                state[key] = self._heads(state[key], order)
            elif name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
                state[key] = state[key][order]

    def _heads(self, rows: Tensor, order: Tensor) -> Tensor:
        return rows.unflatten(0, (self.heads, -1))[:, order].flatten(0, 1)


def halves(width: int) -> tuple[int, ...]:
    """Pairs (i, i + Dh/2), as in DINOv3, become (2i, 2i+1)."""
    return tuple(i + half for i in range(width // 2) for half in (0, width // 2))


def columns_first(width: int) -> tuple[int, ...]:
    """Columns in the first half of a head's channels, as in rope-vit, become rows first."""
    return tuple((i - width // 2) % width for i in range(width))


@dataclass(frozen=True)
class FlatTable:
    """`pos_embed` (1, rows + h w, D) <-> `owner` (1, h, w, D).

    The rows belong to leading tokens, which have no place: they are added to the tokens, and on the way back they are
    zeros. The model's output is the same, bit for bit.

    Args:
        grid: (h, w) that the flat table was learned on.
        tokens: leading tokens that have a row, in order, each with its number of rows.
    """

    owner: str
    grid: tuple[int, int]
    tokens: tuple[tuple[str, int], ...] = ()

    def into(self, state: State) -> None:
        flat = state.pop("pos_embed")
        *rows, table = flat.split([*(n for _, n in self.tokens), self.grid[0] * self.grid[1]], dim=1)
        state[self.owner] = table.unflatten(1, self.grid)
        for (name, _), row in zip(self.tokens, rows, strict=True):
            state[name] = state[name] + row

    def back(self, state: State) -> None:
        table = state.pop(self.owner).flatten(1, 2)
        rows = sum(count for _, count in self.tokens)
        state["pos_embed"] = torch.cat([table.new_zeros(1, rows, table.shape[-1]), table], dim=1)


@dataclass(frozen=True)
class Embeds:
    """NaFlexViT's `embeds.*` <-> `patch_embed.*`, leading tokens, and the tables of `owner`.

    Its linear map of flat patches (D, p q C) is the convolution (D, C, p, q).

    Args:
        patch: (p, q); () where it is a convolution there too.
        owner: "position", or "position.terms.0" beside a rotation.
    """

    patch: tuple[int, ...]
    owner: str

    def _names(self) -> dict[str, str]:
        tables = {"pos_embed": "pos_embed", "pos_embed_y": "tables.0", "pos_embed_x": "tables.1"}
        parts = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
        return (
            {f"embeds.{token}": token for token in ("cls_token", "reg_token")}
            | {f"embeds.{theirs}": f"{self.owner}.{ours}" for theirs, ours in tables.items()}
            | {f"embeds.{part}": f"patch_embed.{part}" for part in parts}
        )

    def into(self, state: State) -> None:
        for theirs, ours in self._names().items():
            if theirs in state:
                value = state.pop(theirs)
                state[ours] = value[0] if ".tables." in ours else value
        if self.patch:
            kernel = state["patch_embed.proj.weight"].unflatten(1, (*self.patch, -1))
            state["patch_embed.proj.weight"] = kernel.movedim(-1, 1).contiguous()

    def back(self, state: State) -> None:
        if self.patch:
            state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].movedim(1, -1).flatten(1)
        for theirs, ours in self._names().items():
            if ours in state:
                value = state.pop(ours)
                state[theirs] = value[None] if ".tables." in ours else value


@dataclass(frozen=True)
class Evaluated:
    """The token terms of encodings as a flat `pos_embed` (1, rows + h w, D): the way out alone.

    Args:
        names: parameters of the encodings, which the table replaces.
        table: of the training grid.
    """

    names: tuple[str, ...]
    table: Tensor

    def into(self, state: State) -> None:
        raise ConfigError("a flat table does not determine which encodings it was made from")

    def back(self, state: State) -> None:
        for name in self.names:
            state.pop(name, None)
        state["pos_embed"] = self.table


@dataclass(frozen=True)
class Frequencies:
    """`rope.freqs` (2, depth, H, Dh/2) <-> `blocks.i.<owner>` (2, H, Dh/2); columns first there if `xy`."""

    owner: str = "attn.position.freqs"
    xy: bool = True

    def into(self, state: State) -> None:
        for i, freqs in enumerate(state.pop("rope.freqs").unbind(1)):
            state[f"blocks.{i}.{self.owner}"] = freqs.flip(0) if self.xy else freqs

    def back(self, state: State) -> None:
        keys = sorted((key for key in state if key.endswith(self.owner)), key=lambda key: int(key.split(".")[1]))
        freqs = torch.stack([state.pop(key) for key in keys], dim=1)
        state["rope.freqs"] = freqs.flip(0) if self.xy else freqs


@dataclass(frozen=True)
class BiasTable:
    """`<theirs>relative_position_bias_table` (T [+ 3], H) <-> `<ours>...` (H, 2h-1, 2w-1) and `<ours>prefix_bias`.

    Args:
        grid: (h, w) that the flat table was learned on.
        prefix: whether its last three rows are for pairs with prefix tokens.
    """

    theirs: str
    ours: str
    grid: tuple[int, int]
    prefix: bool

    def into(self, state: State) -> None:
        name = "relative_position_bias_table"
        for key in [key for key in state if key.endswith(self.theirs + name)]:
            owner = key.removesuffix(self.theirs + name) + self.ours
            flat = state.pop(key).t()
            if self.prefix:
                flat, state[f"{owner}prefix_bias"] = flat[:, :-3], flat[:, -3:].contiguous()
            h, w = self.grid
            state[owner + name] = flat.reshape(-1, 2 * h - 1, 2 * w - 1)

    def back(self, state: State) -> None:
        name = "relative_position_bias_table"
        for key in [key for key in state if key.endswith(self.ours + name)]:
            owner = key.removesuffix(name)
            flat = state.pop(key).flatten(1)
            none = flat.new_zeros(flat.shape[0], 3)  # a table of ours without entries for the prefix gives it none
            front = state.pop(f"{owner}prefix_bias", none)
            if self.prefix:
                flat = torch.cat([flat, front], dim=1)
            state[owner.removesuffix(self.ours) + self.theirs + name] = flat.t().contiguous()


def _rename(state: State, old: str, new: str) -> None:
    pattern = re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])")
    for key in list(state):
        renamed = pattern.sub(new, key)
        if renamed != key:
            state[renamed] = state.pop(key)
