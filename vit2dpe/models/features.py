"""Features of a ViT by timm's names: outputs of chosen blocks, and which tokens may attend to which."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..attention.functional import Causal, FullMask, Mask
from ..attention.masks import as_torch_takes_it, both, together
from ..encodings import PositionEncoding, terms
from ..encodings.along import extent_of
from ..errors import ConfigError, unknown
from ..positions import Positions
from ..signal import Signal
from .layers import PatchEmbed, run_blocks
from .mixed import Images, Packed, Padded, Tokens, by_size, given_back, in_order, mapped, read
from .strided import read_between
from .windowed import View, Windowing, views

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]  # patches, or (patches, prefix)
OfImages = list[list[Tensor]] | list[tuple[list[Tensor], list[Tensor]]]  # the same, of each image of a list
Outputs = list[Tensor] | list[list[Tensor]]


def allow(
    x: Tensor,
    signal: Signal,
    at: Positions,
    attn_mask: Tensor | None,
    is_causal: bool,
    heads: int,
    batch: Tensor | Padded | Packed,
) -> tuple[Signal, Mask | None]:
    """The Signal of the blocks with what a mask adds, and where tokens may attend, None: everywhere.

    Causality without any other mask is `Causal`, no matrix.

    Of a padded batch to what is valid; of a packed row within the own image. See `attention.masks.as_torch_takes_it`.

    Args:
        batch: what the tokens were made of; a padded one may have a mask of its own, which is taken for `attn_mask`.

    Raises:
        ConfigError: if patches were left out: a mask of all tokens does not say which of them may attend; and for a
            matrix beside a packed row.
        ValueError: for a mask of another shape or kind.
    """
    if at.row is not None:
        if attn_mask is not None:
            raise ConfigError(
                "attn_mask is about the tokens of one grid, and a list of images has several: give a padded batch "
                "(vit2dpe.models.mixed.pad) with a mask of (B, 1, N, N)"
            )
        if is_causal:
            for place in at.row.places:
                _check_all(place.prefix + place.coords.shape[1], place.prefix + math.prod(place.one_extent))
        return signal, at.row.segments.under(causal=is_causal)
    patches = batch.patches.shape[1] if isinstance(batch, Padded) else None
    if isinstance(batch, Padded) and batch.attn_mask is not None:
        attn_mask = batch.attn_mask
    held = together(at)
    if attn_mask is None and not is_causal:
        # Every query has a leading token to attend to; without one, an image of no patch has nothing.
        return signal, FullMask(held) if held is not None and at.prefix else held
    if held is None or patches is not None:
        _check_all(x.shape[1], at.prefix + (math.prod(at.one_extent) if patches is None else patches))
    if attn_mask is None and held is None:
        return signal, Causal(at)
    allowed, added = as_torch_takes_it(attn_mask, is_causal, x, heads)
    return signal.plus(added), both(allowed, held)


def _check_all(left: int, count: int) -> None:
    if left != count:
        raise ConfigError(
            f"attn_mask and is_causal are about all {count} tokens, and {left} are left: patch_drop_rate "
            "(in training) and a token_filter that leaves patches out do not go with them"
        )


def spaced(at: Positions, spacing: float | tuple[float, ...] | None) -> Positions:
    """All places of the grid, of patches of another size in the world; see `Positions.grid`.

    Raises:
        ConfigError: for a padded batch.
    """
    if spacing is None:
        return at
    if at.valid is not None:
        raise ConfigError("spacing goes with a tensor (B, C, H, W) or a list of images, not with a padded batch")
    made = Positions.grid(at.one_extent, at.coords.device, spacing=spacing)
    if not at.spacing:
        return made
    scale = made.coords.new_tensor(made.spacing or (1.0,) * at.axes)  # of patches that overlap
    both = tuple(one * other for one, other in zip(at.spacing, made.spacing or (1.0,) * at.axes, strict=True))
    return Positions((at.coords + 0.5) * scale - 0.5, at.one_extent, spacing=both)


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

    def views(self, x: Tensor, signal: Signal, at: Positions, mask: Mask | None) -> list[View]:
        """What each block is given beside these: a mask, the windows it attends within, or nothing.

        Raises:
            ConfigError: for windows in a list of images of different sizes.
        """
        if self.windowing is None:
            return [() if mask is None else (mask,)] * len(self.blocks)
        if isinstance(mask, FullMask):  # within windows a query of padding has nothing to attend to
            mask = mask.mask
        if mask is not None and not isinstance(mask, Tensor | Causal):
            raise ConfigError(
                "blocks in windows take no list of images of different sizes: give a padded batch "
                "(vit2dpe.models.mixed.pad), or call the model for each size"
            )
        return views(self.windowing, len(self.blocks), self.position, x, signal, at, mask)

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The extent that an encoding of this model was trained on."""
        owned = [] if self.windowing is None else self.windowing.owned(self.blocks)
        if self.windowing is not None and any(encoding in terms(position) for position, _ in owned):
            return extent_of(encoding, self.windowing.side)
        return extent_of(encoding, self.train_grid)

    def position_groups(self) -> list[tuple[PositionEncoding, nn.Module, tuple[int, ...]]]:
        """For the model, and for each block whose encoding is measured by its window: what leads, where, the extent."""
        owned = [] if self.windowing is None else self.windowing.owned(self.blocks)
        side = self.train_grid if self.windowing is None else self.windowing.side  # of all axes
        return [(self.position, self, self.train_grid), *((p, part, side) for p, part in owned)]

    def read_between(self) -> None:
        """With a stride below the patch, tables are read at the centres of patches instead of being resized."""
        if self.patch_embed.stride is not None:
            owned = [] if self.windowing is None else self.windowing.owned(self.blocks)
            read_between(self, self.train_extent, [term for position, _ in owned for term in terms(position)])

    def embed(self, images: Images) -> tuple[Tensor, Signal, Positions]:
        """Tokens at the input of the first block, the shared Signal, and where the tokens are."""
        raise TypeError(f"{type(self).__name__} must define embed")

    def forward_intermediates(
        self,
        x: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> (
        Intermediates
        | OfImages
        | tuple[Tokens, Intermediates | OfImages]
        | dict[str, Tokens | list[Tensor] | list[list[Tensor]]]
    ):
        """Outputs of chosen blocks beside the final features.

        Args:
            x: images (B, C, H, W), or videos (B, C, T, H, W); or of different sizes, see `mixed.py`: a list gives of
                each block a list of what each image gives; a padded batch "NLC" alone, and `patch_valid` in the dict.
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
        last, patches, prefix = self._outputs(x, indices, norm, stop_early, output_fmt == "NCHW", attn_mask, is_causal)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Tokens | list[Tensor] | list[list[Tensor]]] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if isinstance(last, dict):
                result["patch_valid"], last = last["patch_valid"], last["patches"]
            return result if intermediates_only else result | {"image_features": mapped(self.norm, last)}
        listed = _pairs(patches, prefix) if with_prefix else patches
        return listed if intermediates_only else (mapped(self.norm, last), listed)

    def _outputs(
        self,
        images: Images,
        indices: int | Sequence[int] | None,
        norm: bool,
        stop_early: bool,
        reshape: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tokens, Outputs, Outputs]:
        """The output of the last block that ran; patches and leading tokens of the chosen ones."""
        take, last = take_indices(len(self.blocks), indices)
        batch = read(images, self.patch_embed)
        if reshape and isinstance(batch, Padded):
            raise ConfigError(
                "a padded batch has no one grid: output_fmt='NLC' (reshape=False) gives (B, N, D) and patch_valid; a "
                "list of images gives (D, rows, columns) of each"
            )
        grid = () if isinstance(batch, Padded | Packed) else self.patch_embed.grid(*batch.shape[2:])
        x, signal, at = self.embed(batch)
        signal, mask = allow(x, signal, at, attn_mask, is_causal, self.num_heads, batch)
        views = self.views(x, signal, at, mask)
        blocks, outputs = self.blocks[: last + 1] if stop_early else self.blocks, list[Tensor]()
        x = run_blocks(blocks, x, signal, at, views, take, outputs, recompute=self.grad_checkpointing)
        outputs = [self.norm(y) for y in outputs] if norm else outputs
        if isinstance(batch, Packed):
            return given_back(batch, x, at), *self._of_images(outputs, batch, at, reshape)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        patches = [y[:, self.num_prefix_tokens :] for y in outputs]
        if reshape:
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]  # (B, D, *grid)
        return given_back(batch, x, at) if isinstance(batch, Padded) else x, patches, prefix

    def _of_images(
        self, outputs: list[Tensor], batch: Packed, at: Positions, reshape: bool
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Patches and leading tokens of each block and image of a packed row."""
        p, patches, prefix = self.num_prefix_tokens, list[list[Tensor]](), list[list[Tensor]]()
        for row in outputs:
            parts = by_size(row, at)
            prefix.append(in_order([y[:, :p] for y in parts], batch.order))
            rest = [y[:, p:] for y in parts]
            if reshape:
                grids = [self.patch_embed.grid(*x.shape[2:]) for x in batch.images]
                rest = [y.transpose(1, 2).unflatten(2, g).contiguous() for y, g in zip(rest, grids, strict=True)]
            patches.append(in_order(rest, batch.order))
        return patches, prefix

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
        return_class_token: bool = False,
    ) -> Intermediates | OfImages:
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
            prefix = [_first(tokens) for tokens in prefix]  # type: ignore[assignment]
        pairs = return_class_token or (return_prefix_tokens and self.num_prefix_tokens > 0)
        return _pairs(patches, prefix) if pairs else patches


def _first(prefix: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The class token (B, D), or of each image (D,)."""
    return [tokens[0] for tokens in prefix] if isinstance(prefix, list) else prefix[:, 0]


def _pairs(patches: Outputs, prefix: Outputs) -> Intermediates | OfImages:
    found: Intermediates | OfImages = list(zip(patches, prefix, strict=True))  # type: ignore[assignment]
    return found


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
