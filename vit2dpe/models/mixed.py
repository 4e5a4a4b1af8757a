"""Images of different sizes in one batch: lists, timm's NaFlex batches, padded batches.

What comes decides how it runs, and each image gets what it gets alone:

    [(C, H_i, W_i), ...]     packed: the tokens of all images are one row, and attend within their own image; nothing is
                             padded, and no matrix over the row is made
    dict(patches, patch_coord, patch_valid)     padded: (B, N, ...), and what is not valid is attended to by nothing
                             (timm's `NaFlexCollator` and its loader)
    dict(pixel_values, pixel_mask), torchvision's `ImageList`     padded likewise: images filled up on the right and
                             below, as transformers and torchvision have them

`pack` and `pad` make one of the other. Sources: NaViT, arXiv 2307.06304; SigLIP 2, arXiv 2502.14786; timm,
`data/naflex_dataset.py` and `models/naflexvit.py`.

Legend: B images, G images of one size, C channels, (p, q) patch, N patches, P leading tokens, L = P + N, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.fx import Proxy

from ..errors import ConfigError
from ..grids import readable
from ..packed import in_segments
from ..positions import Positions, exact
from ..segments import Segments
from .layers import PatchDrop, PatchEmbed, keep_tokens


class Sized(Protocol):
    """torchvision's `ImageList`: images (B, C, H, W) filled up on the right and below, and their sizes."""

    tensors: Tensor
    image_sizes: list[tuple[int, int]]


class Padded(NamedTuple):
    """Patches in a padded batch.

    Args:
        patches: (B, N, p q C), channels fastest.
        coord: (B, N, 2) int64, row and column of each.
        valid: (B, N) bool, which are patches.
        attn_mask: timm's, in place of one that is given beside the batch.
    """

    patches: Tensor
    coord: Tensor
    valid: Tensor
    attn_mask: Tensor | None = None


class Packed(NamedTuple):
    """Images by size.

    Args:
        images: of each size (G, C, H, W).
        order: the number in the batch of each image, one size behind the other.
    """

    images: tuple[Tensor, ...]
    order: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on another device."""
        return Packed(tuple([x.to(device, non_blocking=non_blocking) for x in self.images]), self.order)


Mixed = list[Tensor] | tuple[Tensor, ...] | Mapping[str, Tensor] | Sized | Padded | Packed
Images = Tensor | Mixed
Tokens = Tensor | list[Tensor] | dict[str, Tensor]  # of one size; of each image; patches and patch_valid, padded


def read(images: Images, embed: PatchEmbed) -> Tensor | Padded | Packed:
    """A batch of any kind as one of three.

    Raises:
        ConfigError: for what is none, and patches that are not this model's.
    """
    if isinstance(images, Tensor | Padded | Packed):
        return images
    if isinstance(images, Proxy):  # of torch.fx, in place of a tensor
        return cast(Tensor, images)
    if isinstance(images, Mapping):
        return _of_pixels(images, embed) if "pixel_values" in images else _of_patches(images, embed)
    if isinstance(images, list | tuple):
        return pack(cast("list[Tensor]", images))
    if isinstance(getattr(images, "tensors", None), Tensor):
        sizes = torch.tensor(images.image_sizes, dtype=torch.int64)
        _check_sizes(sizes, images.tensors, embed)
        return _cut(images.tensors, sizes.to(images.tensors.device), embed)
    raise ConfigError(
        f"images are a tensor (B, C, H, W), a list of (C, H, W), timm's NaFlex batch or a padded one, got "
        f"{type(images).__name__}"
    )


def pack(images: Sequence[Tensor]) -> Packed:
    """Images (C, H_i, W_i) by size, to be run as one row of tokens; a list that a model is given becomes this.

    Raises:
        ConfigError: for an empty list, and what is no image.
    """
    wrong = next((x for x in images if not isinstance(x, Tensor) or x.ndim < 3), None)
    if wrong is not None or not images:
        came = "an empty list" if wrong is None else tuple(getattr(wrong, "shape", (type(wrong).__name__,)))
        raise ConfigError(f"a list of images has one tensor (C, H, W) for each, got {came}")
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(tuple(image.shape), []).append(i)
    stacked = [torch.stack([images[i] for i in of]) if len(of) > 1 else images[of[0]][None] for of in sizes.values()]
    return Packed(tuple(stacked), tuple([i for of in sizes.values() for i in of]))


def pad(images: Sequence[Tensor], patch: int | tuple[int, int], length: int | None = None) -> dict[str, Tensor]:
    """Images (C, H_i, W_i) as timm's NaFlex batch: `patches` (B, N, p q C), `patch_coord`, `patch_valid`.

    Args:
        patch: (rows, columns) of a patch, or one number; it divides every side.
        length: N; default: the patches of the largest image.

    Raises:
        ConfigError: for a side that the patch does not divide, and a length that an image exceeds.
    """
    p, q = (patch, patch) if isinstance(patch, int) else patch
    grids = [(x.shape[-2] // p, x.shape[-1] // q) for x in images]
    for x, (h, w) in zip(images, grids, strict=True):
        if (h * p, w * q) != tuple(x.shape[-2:]) or not h * w:
            raise ConfigError(f"every side must be a multiple of the patch {p}x{q}, got {tuple(x.shape[-2:])}")
    most = max(h * w for h, w in grids)
    n = most if length is None else length
    if n < most:
        raise ConfigError(f"length must be at least {most}, the patches of the largest image, got {length}")
    flat = [rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=p, q=q) for x in images]
    device = flat[0].device
    places = [Positions.grid(grid, device).coords[0].long() for grid in grids]
    return dict(
        patches=torch.stack([F.pad(x, (0, 0, 0, n - len(x))) for x in flat]),
        patch_coord=torch.stack([F.pad(at, (0, 0, 0, n - len(at))) for at in places]),
        patch_valid=torch.arange(n, device=device) < torch.tensor([len(x) for x in flat], device=device)[:, None],
    )


def _of_patches(images: Mapping[str, Tensor], embed: PatchEmbed) -> Padded:
    missing = [name for name in ("patches", "patch_coord") if name not in images]
    if missing:
        raise ConfigError(
            f"a batch as a dict has patches, patch_coord and patch_valid (timm's NaFlex), or pixel_values and "
            f"pixel_mask (transformers'); got {', '.join(images) or 'none'}"
        )
    patches, coord = images["patches"], images["patch_coord"]
    if len(embed.patch_size) != 2:
        raise ConfigError("a padded batch is one of images; of videos of different sizes give a list")
    if patches.ndim == 5:  # of patches of several sizes, one in each batch
        if tuple(patches.shape[2:4]) != embed.patch_size:
            raise ConfigError(
                f"the model takes patches of {embed.patch_size}, got {tuple(patches.shape[2:4])}: "
                "set_input_size(patch_size=...) resamples its kernel"
            )
        patches = patches.flatten(2)
    values = embed.proj.weight[0].numel()
    if patches.ndim != 3 or patches.shape[-1] != values or coord.shape != (*patches.shape[:2], 2):
        raise ConfigError(
            f"patches of this model are (B, N, {values}) = rows x columns x channels, and patch_coord (B, N, 2); got "
            f"{tuple(patches.shape)} and {tuple(coord.shape)}"
        )
    valid = images.get("patch_valid", patches.new_ones(patches.shape[:2], dtype=torch.bool))
    return Padded(patches, coord.long(), valid.bool(), images.get("attn_mask"))


def _of_pixels(images: Mapping[str, Tensor], embed: PatchEmbed) -> Padded:
    pixels, mask = images["pixel_values"], images.get("pixel_mask")
    if pixels.ndim != 4 or (mask is not None and mask.shape != pixels.shape[:1] + pixels.shape[2:]):
        came = None if mask is None else tuple(mask.shape)
        raise ConfigError(f"pixel_values are (B, C, H, W) and pixel_mask (B, H, W), got {tuple(pixels.shape)}, {came}")
    if mask is None:
        mask = pixels.new_ones(pixels.shape[:1] + pixels.shape[2:], dtype=torch.bool)
    sizes = torch.stack([mask.bool().any(-1).sum(-1), mask.bool().any(-2).sum(-1)], dim=-1)  # (B, 2)
    if readable(sizes):
        _check_sizes(sizes.cpu(), pixels, embed)
    return _cut(pixels, sizes, embed)


def _check_sizes(sizes: Tensor, pixels: Tensor, embed: PatchEmbed) -> None:
    if sizes.shape != (pixels.shape[0], 2) or (sizes > torch.tensor(pixels.shape[-2:])).any():
        raise ConfigError(f"each image of {tuple(pixels.shape)} has a size (H, W) within it, got {sizes.tolist()}")
    for height, width in sizes.tolist():
        embed.grid(height, width)


def _cut(pixels: Tensor, sizes: Tensor, embed: PatchEmbed) -> Padded:
    """Images (B, C, H, W), of which the first rows and columns are theirs, sizes (B, 2), as patches."""
    patch = torch.tensor(embed.patch_size, device=sizes.device)
    p, q = embed.patch_size
    below, right = -pixels.shape[-2] % p, -pixels.shape[-1] % q
    if embed.pad:  # a patch across the border is filled up with zeros, whatever the batch is filled up with
        rows, columns = (torch.arange(side, device=sizes.device) for side in pixels.shape[-2:])
        own = (rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])  # (B, H, W)
        pixels = pixels.masked_fill(~own[:, None], 0.0)
    pixels = F.pad(pixels, (0, right, 0, below))
    patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)
    at = Positions.grid((pixels.shape[-2] // p, pixels.shape[-1] // q), pixels.device)
    coord = at.coords.long().expand(len(patches), -1, -1)
    extent = (sizes + patch - 1) // patch if embed.pad else sizes // patch
    return Padded(patches, coord, (coord < extent[:, None]).all(-1))


def embed_patches(embed: PatchEmbed, batch: Padded) -> tuple[Tensor, Positions]:
    """Tokens (B, N, D) of patches by the model's convolution as one linear map, and where they are."""
    if tuple(embed.proj.stride) != tuple(embed.proj.kernel_size) or not embed.any_size:
        raise ConfigError(
            "a padded batch is of patches beside each other, of images of any size: this model's overlap, or it takes "
            f"{embed.img_size} only (dynamic_img_size)"
        )
    # What a batch is filled up with may be anything, NaN among it, and may lie anywhere.
    patches, coord = (x.masked_fill(~batch.valid[..., None], 0) for x in (batch.patches, batch.coord))
    kernel = embed.proj.weight.movedim(1, -1).flatten(1)  # (D, p q C)
    tokens = embed.norm(F.linear(patches, kernel, embed.proj.bias))
    extent = (coord + 1).amax(1)  # (B, 2)
    largest = tuple(extent.amax(0).tolist()) if readable(extent) else ()
    at = Positions(coord.to(torch.float32), extent, on_grid=True, valid=batch.valid, box=largest)
    return tokens.to(kernel.dtype), at


def drop_patches(drop: PatchDrop, x: Tensor, at: Positions) -> tuple[Tensor, Positions]:
    """`PatchDrop`, of each image of a padded batch its own share of its own patches."""
    if at.valid is None or not drop.training or drop.rate == 0:
        dropped: tuple[Tensor, Positions] = drop(x, at)
        return dropped
    noise = torch.rand(x.shape[:2], device=x.device).masked_fill(~at.valid, 2.0)  # padding last
    keep = max(1, int(x.shape[1] * (1 - drop.rate)))
    x, at = keep_tokens(x, at, noise.argsort(dim=1)[:, :keep])
    own = (exact(batch_counts(noise)) * (1 - drop.rate)).floor().clamp(min=1).to(x.device)  # (B,)
    valid = torch.arange(keep, device=x.device) < own[:, None]
    return x, Positions(at.coords, at.extent, at.prefix, at.on_grid, at.spacing, valid, at.segment, at.box)


def batch_counts(noise: Tensor) -> Tensor:
    """(B,) how many patches each image has, from numbers that are above 1 where there is none."""
    return (noise <= 1).sum(1)


def laid_out(parts: Sequence[tuple[Tensor, Positions]]) -> tuple[Tensor, Positions]:
    """One row of tokens (1, Σ G L, D) from those of each size (G, L, D), leading ones with their image, and its places.

    Encodings are evaluated at the places of each size, (1|G, N, d) behind P leading tokens, as of a batch of that size.
    """
    row = torch.cat([tokens.flatten(0, 1) for tokens, _ in parts])[None]
    sizes = [(i, x.shape[1]) for i, (x, _) in enumerate(parts) for _ in range(x.shape[0])]
    segments = Segments.of([length for _, length in sizes], [i for i, _ in sizes], device=row.device)
    largest = [max(along) for along in zip(*(at.one_extent for _, at in parts), strict=True)]
    nowhere = torch.zeros(1, row.shape[1], len(largest), device=row.device)
    return row, in_segments(Positions(nowhere, tuple(largest)), segments, [at for _, at in parts])


def by_size(row: Tensor, at: Positions) -> list[Tensor]:
    """(1, Σ G L, D) -> (G, L, D) of each size."""
    if at.row is None:
        raise ConfigError("these places are of no packed row")
    return list(at.row.segments.split(row[0]))


def in_order(parts: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
    """(G, L, ...) of each size -> (L_i, ...) of each image, in the order of the batch."""
    found = [one for part in parts for one in part.unbind()]
    return [found[i] for i in sorted(range(len(order)), key=lambda i: order[i])]


def given_back(images: Padded | Packed, x: Tensor, at: Positions) -> list[Tensor] | dict[str, Tensor]:
    """Tokens as a batch of this kind gets them: of each image (L_i, D), or padded (B, L, D) with what is valid."""
    if isinstance(images, Packed):
        return in_order(by_size(x, at), images.order)
    return dict(patches=x, patch_valid=images.valid if at.valid is None else at.valid)


def mapped(change: Callable[[Tensor], Tensor], features: Tokens) -> Tokens:
    """Tokens of which each tensor of tokens is changed."""
    if isinstance(features, dict):
        return features | dict(patches=change(features["patches"]))
    return [change(x) for x in features] if isinstance(features, list) else change(features)


def pooled(x: Tensor, kind: str, valid: Tensor) -> Tensor:
    """(B, N, D) -> (B, D) by "avg", "max" or "avgmax", over valid tokens."""
    own = valid[..., None]
    if kind == "max":
        return x.masked_fill(~own, float("-inf")).amax(dim=1)
    total = x.masked_fill(~own, 0.0).sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = (total / own.sum(dim=1).clamp(min=1)).to(x.dtype)
    return mean if kind == "avg" else (x.masked_fill(~own, float("-inf")).amax(dim=1) + mean) / 2


def attention_pooled(pool: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
    """(B, N, D) -> (B, D) by timm's attention pooling, over valid tokens."""
    mask = torch.zeros_like(valid, dtype=x.dtype).masked_fill(~valid, float("-inf"))
    out: Tensor = pool(x, mask[:, None, None])
    return out


def leading(features: Tokens, count: int) -> Tensor:
    """(B, count, D): the first leading tokens of each image."""
    if isinstance(features, dict):
        return features["patches"][:, :count]
    return torch.stack([x[:count] for x in features]) if isinstance(features, list) else features[:, :count]


def whole(batch: Tensor | Padded | Packed, patch: tuple[int, ...]) -> Packed:
    """A batch of any kind as images by size.

    Raises:
        ConfigError: for an image of which patches are missing, and a mask of its tokens.
    """
    if isinstance(batch, Packed):
        return batch
    if isinstance(batch, Tensor):
        return Packed((batch,), tuple(range(len(batch))))
    if batch.attn_mask is not None:
        raise ConfigError("attn_mask is about all tokens of a batch, and here patches are hidden: leave it out")
    images = []
    for patches, coord, valid in zip(batch.patches, batch.coord, batch.valid, strict=True):
        patches, coord = patches[valid], coord[valid]
        h, w = (int(side) + 1 for side in (coord.amax(0) if len(coord) else coord.new_full((2,), -1)))
        if len(patches) != h * w or not len(patches):
            raise ConfigError(f"of an image of {h}x{w} patches {len(patches)} came: it is needed whole here")
        canvas = torch.empty_like(patches).index_copy(0, coord[:, 0] * w + coord[:, 1], patches)
        p, q = patch
        images.append(rearrange(canvas, "(h w) (p q c) -> c (h p) (w q)", h=h, w=w, p=p, q=q))
    return pack(images)
