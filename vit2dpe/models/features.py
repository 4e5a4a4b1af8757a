"""Features of a ViT by timm's names: outputs of chosen blocks, and which tokens may attend to which."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..attention.functional import Causal
from ..attention.masks import as_torch_takes_it
from ..encodings import PositionEncoding, terms
from ..errors import ConfigError, unknown
from ..positions import Positions
from ..signal import Signal
from .layers import PatchEmbed, run_block
from .windowed import View, Windowing, views

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]  # patches, or (patches, prefix)


def allow(
    x: Tensor, signal: Signal, at: Positions, attn_mask: Tensor | None, is_causal: bool, heads: int
) -> tuple[Signal, Tensor | Causal | None]:
    """The Signal of the blocks with what a mask adds, and where tokens may attend: boolean, `Causal` (no matrix, where
    there is no other mask), or None.

    See `attention.masks.as_torch_takes_it`.

    Raises:
        ConfigError: if patches were left out: a mask of all tokens does not say which of them may attend.
        ValueError: for a mask of another shape or kind.
    """
    if attn_mask is None and not is_causal:
        return signal, None
    if x.shape[1] != (count := at.prefix + math.prod(at.one_extent)):
        raise ConfigError(
            f"attn_mask and is_causal are about all {count} tokens, and {x.shape[1]} are left: patch_drop_rate "
            "(in training) and a token_filter that leaves patches out do not go with them"
        )
    if attn_mask is None:
        return signal, Causal(at)
    allowed, added = as_torch_takes_it(attn_mask, is_causal, x, heads)
    return signal.plus(added), allowed


def spaced(at: Positions, spacing: float | tuple[float, ...] | None) -> Positions:
    """All places of the grid, of patches of another size in the world; see `Positions.grid`."""
    return at if spacing is None else Positions.grid(at.one_extent, at.coords.device, spacing=spacing)


class Features(nn.Module):
    """The part of timm's interface of a ViT that reads features."""

    patch_embed: PatchEmbed
    blocks: nn.ModuleList
    norm: nn.Module
    cls_token: nn.Parameter | None
    num_prefix_tokens: int
    num_heads: int
    grad_checkpointing: bool
    position: PositionEncoding
    train_grid: tuple[int, ...]
    windowing: Windowing | None = None

    def views(self, x: Tensor, signal: Signal, at: Positions, mask: Tensor | Causal | None) -> list[View]:
        """What each block is given beside these: a mask, the windows it attends within, or nothing."""
        return views(self.windowing, len(self.blocks), self.position, x, signal, at, mask)

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The extent that an encoding of this model was trained on."""
        owned = [] if self.windowing is None else self.windowing.owned(self.blocks)
        if self.windowing is not None and any(encoding in terms(position) for position, _ in owned):
            return self.windowing.side
        return self.train_grid

    def position_groups(self) -> list[tuple[PositionEncoding, nn.Module, tuple[int, ...]]]:
        """For the model, and for each block whose encoding is measured by its window: what leads, where, the extent."""
        owned = [] if self.windowing is None else self.windowing.owned(self.blocks)
        return [(self.position, self, self.train_grid), *((p, part, self.train_extent(p)) for p, part in owned)]

    def embed(self, images: Tensor) -> tuple[Tensor, Signal, Positions]:
        """Tokens at the input of the first block, the shared Signal, and where the tokens are."""
        raise TypeError(f"{type(self).__name__} must define embed")

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates] | dict[str, Tensor | list[Tensor]]:
        """Outputs of chosen blocks beside the final features.

        Args:
            x: images (B, C, H, W), or videos (B, C, T, H, W).
            indices: the last n blocks, a list of blocks (negative from the end), or None for all.
            return_prefix_tokens: give prefix tokens too, as pairs (patches, prefix).
            norm: put the final norm on each of them.
            stop_early: run no block after the last chosen one.
            output_fmt: "NCHW", (B, D, rows, columns), of videos (B, D, frames, rows, columns), or "NLC", (B, N, D).
            intermediates_only: leave the final features out.
            output_dict: a dict `image_intermediates`, `image_intermediates_prefix`, `image_features`.
            attn_mask, is_causal: as in `ViT.forward_features`.

        Returns:
            (final features, [intermediates]), the list alone, or the dict.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NLC"))
        x, patches, prefix = self._outputs(x, indices, norm, stop_early, output_fmt == "NCHW", attn_mask, is_causal)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Tensor | list[Tensor]] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else result | {"image_features": self.norm(x)}
        listed: Intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return listed if intermediates_only else (self.norm(x), listed)

    def _outputs(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None,
        norm: bool,
        stop_early: bool,
        reshape: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The output of the last block that ran; patches and leading tokens of the chosen ones."""
        take, last = take_indices(len(self.blocks), indices)
        grid = self.patch_embed.grid(*x.shape[2:])
        x, signal, at = self.embed(x)
        signal, mask = allow(x, signal, at, attn_mask, is_causal, self.num_heads)
        views = self.views(x, signal, at, mask)
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = run_block(block, x, signal, at, *views[i], index=i, recompute=self.grad_checkpointing)
            if i in take:
                outputs.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        patches = [y[:, self.num_prefix_tokens :] for y in outputs]
        if reshape:
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]  # (B, D, *grid)
        return x, patches, prefix

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
        return_class_token: bool = False,
    ) -> Intermediates:
        """Outputs of chosen blocks, by the name and arguments of DINO; `forward_intermediates` gives more.

        Args:
            n: the last n blocks, or a list of blocks.
            reshape: (B, D, rows, columns) instead of (B, N, D).
            return_prefix_tokens: pairs (patches, prefix tokens (B, P, D)), as in timm.
            norm: put the final norm on each of them; off, as in timm (DINOv2's hub models have it on).
            return_class_token: pairs (patches, class token (B, D)), as in DINOv2.
        """
        if return_class_token and (return_prefix_tokens or not self.has_class_token):
            raise ConfigError(
                "return_class_token needs a model with a class token, and goes without return_prefix_tokens, which "
                "gives it first"
            )
        _, patches, prefix = self._outputs(x, n, norm, True, reshape, attn_mask, False)
        if return_class_token:
            prefix = [tokens[:, 0] for tokens in prefix]
        pairs = return_class_token or (return_prefix_tokens and self.num_prefix_tokens > 0)
        return list(zip(patches, prefix, strict=True)) if pairs else patches


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The chosen of `count` layers, counted from 0, and the last of them.

    Args:
        indices: the last n layers, a list of layers (negative from the end), or None for all.

    Raises:
        ConfigError: for a layer that the model has not.
    """
    if isinstance(indices, int):
        chosen = list(range(count - indices, count))
    else:
        chosen = list(range(count)) if indices is None else [i + count if i < 0 else i for i in indices]
    if not chosen or not 0 <= min(chosen) <= max(chosen) < count:
        raise ConfigError(f"layers are numbered from 0 to {count - 1}, or -{count} to -1: got {indices}")
    return chosen, max(chosen)
