"""Patch embedding, patch dropout, and the transformer block, whose parts are made in `parts.py`. The rest is
`timm.layers`.

Legend: B batch, C channels, D width, N tokens, p patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention.functional import Mask, materialize_shared_bias
from ..attention.tiles import Tiles
from ..encodings.tables import replace
from ..errors import ConfigError
from ..positions import Positions
from ..segments import nested
from ..signal import Signal
from .kernels import CONVS, resampled
from .parts import BlockParts, LayerScale
from .strided import check_stride, strided_grid, strided_places
from .windowed import own_in_tiles

# Leaves patches out, or puts another token in their place: masked pretraining.
TokenFilter = Callable[[Tensor, Positions], tuple[Tensor, Positions]]


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map; timm's names (`proj`). Of images, or of any axes (`CONVS`):
    tubes of a video (frames before rows before columns: ViViT, arXiv 2103.15691), pieces of a line.

    Args:
        patch: (rows, columns) of a patch in pixels, or its sides along all axes.
        in_chans: C.
        dim: D.
        img_size: (height, width) that is expected where `any_size` is off, or all sides.
        bias: whether the map has a bias.
        norm: factory `width -> norm layer` of a norm after the map.
        any_size: whether images of other sizes are taken.
        pad: fill images up to a multiple of the patch with zeros, below and on the right.
        stride: from patch to patch; default: the patch (`strided.py`).
    """

    def __init__(
        self,
        patch: tuple[int, ...],
        in_chans: int,
        dim: int,
        *,
        img_size: tuple[int, ...],
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        any_size: bool = True,
        pad: bool = False,
        stride: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.img_size, self.any_size, self.pad = patch, img_size, any_size, pad
        self.stride = stride  # None: the patch, also where that changes
        if stride is not None:
            check_stride(stride, patch)
        self.proj = CONVS[len(patch)](in_chans, dim, kernel_size=patch, stride=stride or patch, bias=bias)
        self.norm = nn.Identity() if norm is None else norm(dim)

    def grid(self, *size: int) -> tuple[int, ...]:
        """Patches along each axis of an image of this height and width, or of these sides.

        Raises:
            ConfigError: if the size is not one this model takes.
        """
        if len(size) != len(self.patch_size):
            raise ConfigError(f"an input has the {len(self.patch_size)} axes of a patch, got sides {size}")
        if self.stride is not None:
            return strided_grid(size, self.patch_size, self.stride, self.pad)
        return self.patches(*size)

    def patches(self, *size: int) -> tuple[int, ...]:
        """`grid` without a stride: the grid of training, in which places are measured."""
        each = list(zip(size, self.patch_size, strict=True))
        if self.pad:
            return tuple((side + p - 1) // p for side, p in each)  # no negative number, which ONNX divides otherwise
        if any(side < p or side % p for side, p in each):
            patch, came, near = (
                "x".join(map(str, sides))
                for sides in (self.patch_size, size, (max(1, round(side / p)) * p for side, p in each))
            )
            raise ConfigError(f"the image must be a multiple of the patch {patch}: got {came}; nearest: {near}")
        return tuple(side // p for side, p in each)

    # timm's names.

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis at the model's own size."""
        return self.grid(*self.img_size)

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_size)

    @property
    def strict_img_size(self) -> bool:
        """Whether other sizes than `img_size` are refused."""
        return not self.any_size

    @strict_img_size.setter
    def strict_img_size(self, strict: bool) -> None:
        self.any_size = not strict

    @property
    def dynamic_img_pad(self) -> bool:
        """Whether images are filled up to a multiple of the patch."""
        return self.pad

    def dynamic_feat_size(self, img_size: tuple[int, ...]) -> tuple[int, ...]:
        """`grid` of a size (height, width)."""
        return self.grid(*img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, ...]:
        """Pixels a token covers along the axes, or the larger of both."""
        step = self.stride or self.patch_size
        return max(step) if as_scalar else step

    def places(self, extent: tuple[int, ...], device: torch.device | str | None = None) -> Positions:
        """Where the patches of a grid are."""
        if self.stride is None:
            return Positions.grid(extent, device)
        return strided_places(extent, self.patch_size, self.stride, device)

    def resample(self, patch: tuple[int, ...]) -> None:
        """Another patch: its kernel is made by the pseudo-inverse of resizing images (FlexiViT, arXiv 2212.08013)."""
        if self.stride is not None:
            check_stride(self.stride, patch)
        with torch.no_grad():
            kernel = resampled(self.proj.weight, patch)
        replace(self.proj.weight, kernel)
        self.proj.kernel_size = self.patch_size = patch
        self.proj.stride = self.stride or patch

    def forward(self, images: Tensor) -> tuple[Tensor, Positions]:
        """(B, C, height, width), or all sides, -> tokens (B, N, D) in the weights' dtype, and where they are."""
        if isinstance(images, list | tuple | dict):  # whatever its annotation promises
            raise ConfigError(f"one tensor (B, C, H, W) is taken here, got {type(images).__name__}; a ViT takes lists")
        if images.is_nested:
            raise nested("give images of one size as a tensor (B, C, H, W)")
        size = tuple(images.shape[2:])
        if not self.any_size and size != self.img_size:
            raise ConfigError(
                f"this model takes {self.img_size} images only, got {size}; dynamic_img_size=True or "
                "set_input_size change that"
            )
        extent = self.grid(*size)
        if self.pad:
            steps = self.stride or self.patch_size
            each = zip(extent, steps, self.patch_size, size, strict=True)
            lacking = [(n - 1) * step + p - side for n, step, p, side in each]
            images = F.pad(images, [x for side in reversed(lacking) for x in (0, side)])
        tokens = self.norm(self.proj(images).flatten(2).transpose(1, 2))
        # The residual stream keeps the precision of the weights under autocast, with any encoding.
        return tokens.to(self.proj.weight.dtype), self.places(extent, images.device)


class PatchDrop(nn.Module):
    """In training, keep a random part of each sample's tokens, and their places with them.

    Args:
        rate: the part that is dropped, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ConfigError(f"patch_drop_rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        if not self.training or self.rate == 0:
            return x, at
        keep = max(1, int(x.shape[1] * (1 - self.rate)))
        index = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :keep]  # (B, K)
        return keep_tokens(x, at, index)


def keep_tokens(x: Tensor, at: Positions, index: Tensor) -> tuple[Tensor, Positions]:
    """The tokens of x (B, N, D) at `index` (B, K), each sample its own, and their places with them."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), at.take(index)


def add_branch(
    x: Tensor, branch: Tensor, scale: nn.Module, drop_path: nn.Module, at: Positions | None = None
) -> Tensor:
    """x + drop_path(scale(branch)): the end of a residual branch."""
    idle = isinstance(drop_path, nn.Identity) or (type(drop_path) is DropPath and not drop_path.training)
    if isinstance(scale, LayerScale) and idle:
        out: Tensor = scale(branch, onto=x)
        return out
    return x + (scale(branch) if idle else drop_branch(scale(branch), drop_path, at))


def drop_branch(branch: Tensor, drop_path: nn.Module, at: Positions | None) -> Tensor:
    """drop_path(branch); of a packed row drawn for each of its segments."""
    if at is None or at.row is None or not isinstance(drop_path, DropPath) or not drop_path.training:
        whole: Tensor = drop_path(branch)
        return whole
    segments = at.row.segments.of_rows(branch.shape[0])
    drawn = [drop_path(branch.new_ones(size, 1, 1)).expand(-1, length, -1) for size, length in segments.groups]
    kept: Tensor = segments.join(drawn, branch.new_ones(1, 1)).unflatten(0, segments.numbers.shape)  # (B, N, 1)
    dropped: Tensor = branch * kept
    return dropped


class Block(BlockParts):
    """Pre-norm transformer block. The token term of its own encoding is added to its input, the rest joins the signal.

    Args:
        dim, heads: width D and number of heads H.
        **parts: see `BlockParts`.
    """

    def with_own(
        self, x: Tensor, signal: Signal, at: Positions, mask: Mask | Tiles | None
    ) -> tuple[Tensor, Signal, Mask | Tiles | None]:
        """The inputs of attention with what the block's own encoding does."""
        if self.attn.position is None:
            return x, signal, mask
        if isinstance(mask, Tiles):
            own, mask = own_in_tiles(self.attn.position, mask)
        else:
            own = self.attn.position(at)
        return add_token(x, own), signal.plus(own), mask

    def forward(self, x: Tensor, signal: Signal, at: Positions, mask: Mask | Tiles | None = None) -> Tensor:
        x, signal, mask = self.with_own(x, signal, at, mask)
        x = add_branch(x, self.attn(self.norm1(x), signal, mask), self.ls1, self.drop_path1, at)
        return add_branch(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2, at)


class PostNormBlock(Block):
    """The norms after attention and MLP, inside the residual branches, instead of before (Swin V2's order)."""

    def forward(self, x: Tensor, signal: Signal, at: Positions, mask: Mask | Tiles | None = None) -> Tensor:
        x, signal, mask = self.with_own(x, signal, at, mask)
        x = add_branch(x, self.norm1(self.attn(x, signal, mask)), self.ls1, self.drop_path1, at)
        return add_branch(x, self.norm2(self.mlp(x)), self.ls2, self.drop_path2, at)


def run_block(
    block: Callable[..., Tensor],
    x: Tensor,
    signal: Signal,
    at: Positions,
    *args: Any,
    index: int = 0,
    recompute: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The output of block `index`; with `recompute` it keeps its inputs alone, and the backward runs it again.

    The second run is under the policy of the first, whichever thread runs the backward (on CUDA one of autograd's).
    """
    signal = signal_of_block(signal, index)
    if not (recompute and torch.is_grad_enabled()):
        return block(x, signal, at, *args, **kwargs)
    again = block if torch.compiler.is_compiling() else partial(copy_context().run, block)
    out: Tensor = checkpoint(again, x, signal, at, *args, use_reentrant=False, **kwargs)
    return out


def run_blocks(
    blocks: Iterable[Callable[..., Tensor]],
    x: Tensor,
    signal: Signal,
    at: Positions,
    views: Sequence[Iterable[object]] = (),
    take: Sequence[int] = (),
    outputs: list[Tensor] | None = None,
    recompute: bool = False,
) -> Tensor:
    """The output of the last block.

    Args:
        views: further arguments of each block; without any, all have none.
        take, outputs: the outputs of these blocks are appended to the list.
    """
    for i, block in enumerate(blocks):
        x = run_block(block, x, signal, at, *(views[i] if views else ()), index=i, recompute=recompute)
        if outputs is not None and i in take:
            outputs.append(x)
    return x


def signal_of_block(signal: Signal, index: int) -> Signal:
    """What a block is given of the shared Signal."""
    return signal.of_block(index) if signal.blocks else signal


def block_inputs(x: Tensor, signal: Signal) -> tuple[Tensor, Signal]:
    """The inputs of the blocks from the embedded tokens and the Signal of an encoding that all blocks share.

    Returns:
        x + signal.token; the signal, with matrices that each block would look up looked up once.
    """
    return add_token(x, signal), materialize_shared_bias(signal, x) if signal.bias or signal.blocks else signal


def add_token(x: Tensor, signal: Signal) -> Tensor:
    """x + signal.token in x's dtype; x where there is none."""
    return x if signal.token is None else x + signal.token.to(x.dtype)
