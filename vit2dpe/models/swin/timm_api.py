"""What timm's tools and users do with a timm Swin; what a Swin computes is in `swin.py`.

Signatures are timm's (`timm/models/swin_transformer.py`), except that a window changes only as `window_policy` or
`window_size` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...encodings import PositionEncoding
from ...errors import ConfigError, unknown
from ...positions import Positions
from ..card import save_card
from ..layers import PatchEmbed
from ..timm_api import change_patch, pair

POOLS = ("avg", "max", "avgmax", "catavgmax", "")
Size = tuple[int, int]


class TimmSwin(nn.Module):
    """Features, classifier, optimizer groups, sizes and windows, as timm's tools ask for them."""

    patch_embed: PatchEmbed
    position: PositionEncoding
    layers: nn.Sequential
    norm: nn.Module
    head: Any
    feature_info: list[dict[str, Any]]
    train_grid: Size
    num_classes: int
    num_features: int
    head_hidden_size: int
    global_pool: str
    save_card = save_card

    def embed(self, images: Tensor) -> Tensor:
        """(B, H, W, D) at the input of the first stage."""
        raise TypeError(f"{type(self).__name__} must say how it embeds images")

    # Windows and sizes ------------------------------------------------------------------------------------------

    @property
    def window_policy(self) -> str:
        """What windows do at another size: "keep" or "scale"."""
        return self.layers[0].window_policy  # type: ignore[return-value]

    @window_policy.setter
    def window_policy(self, policy: str) -> None:
        if policy not in ("keep", "scale"):
            raise unknown("window_policy", policy, ("keep", "scale"))
        for stage in self.layers:
            stage.window_policy = policy  # type: ignore[assignment]

    @property
    def window_sizes(self) -> tuple[Size, ...]:
        """(h, w) of each stage at the training size."""
        return tuple(stage.window for stage in self.layers)  # type: ignore[misc]

    def position_groups(self) -> list[tuple[PositionEncoding, nn.Module, Size]]:
        """For each part with places of its own: the encoding that leads it, where its encodings are, their extent.

        Tokens live on the grid; what acts within windows lives on the window of its stage.
        """
        stages = [(stage.position, stage, stage.trained_window) for stage in self.layers]
        return [(self.position, self.position, self.train_grid), *stages]  # type: ignore[list-item]

    def train_extent(self, encoding: PositionEncoding) -> Size:
        """The extent that an encoding of this model was trained on."""
        for _, part, extent in self.position_groups():
            if any(module is encoding for module in part.modules()):
                return extent
        raise ValueError(f"{type(encoding).__name__} is no encoding of this model")

    def positions(self, height: int, width: int, device: torch.device | str | None = None) -> Positions:
        """Where the tokens of an image of this size are: what `position` is called with."""
        return Positions.grid(self.patch_embed.grid(height, width), device)

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: Any = None,
        window_size: int | Size | Sequence[int | Size] | None = None,
        window_ratio: int | Sequence[int] | None = None,
    ) -> None:
        """Make another size the model's own: tables are resized for good, and policies measure from there.

        Args:
            img_size: pixels, H or (H, W); None keeps it.
            patch_size: another patch, P or (rows, columns): its kernel is resampled as `from_timm` does.
            window_size: windows, as in the constructor.
            window_ratio: windows as a fraction of the patch grid, one number or one for each stage. Without either,
                windows do what `window_policy` says (timm scales them).
        """
        count = len(self.layers)
        size = self.patch_embed.img_size if img_size is None else pair(img_size)
        self.train_grid = grid = change_patch(self, size, patch_size)
        self.patch_embed.img_size = size
        given = None if window_size is None else per_stage(window_size, count)
        if given is None and window_ratio is not None:
            ratios = [window_ratio] * count if isinstance(window_ratio, int) else list(window_ratio)
            given = [(max(1, grid[0] // ratio), max(1, grid[1] // ratio)) for ratio in ratios]
        for i, stage in enumerate(self.layers):
            grid = grid if i == 0 else (-(-grid[0] // 2), -(-grid[1] // 2))
            stage.resize(grid, stage.window_at(grid) if given is None else given[i])  # type: ignore[operator]
        for module in self.modules():
            if isinstance(module, PositionEncoding):
                module.set_grid(self.train_extent(module))
        try:  # timm's record of the size, for its data config and for saving
            from timm.models._input import update_model_input_size
        except ImportError:
            return
        patch = None if patch_size is None else self.patch_embed.patch_size
        update_model_input_size(self, size, patch_size=patch, window_size=self.window_sizes)

    # Features and head ------------------------------------------------------------------------------------------

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen stages beside the final features.

        Args:
            x: images (B, C, height, width).
            indices: the last n stages, a list of stages (negative from the end), or None for all.
            norm: put the final norm on the last stage's.
            stop_early: run no stage after the last one asked for; the final features are then that stage's.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: leave the final features out.

        Returns:
            (final features (B, H, W, D), [intermediates]), or the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NHWC"))
        count = len(self.layers)
        take, last = feature_take_indices(count, indices)
        x, found, places = self.embed(x), [], {}  # type: ignore[var-annotated]
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage(x, places)
            if i in take:
                y = self.norm(x) if norm and i == count - 1 else x
                found.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return found
        return (x if stop_early and last < count - 1 else self.norm(x)), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one asked for; norm and head go with the last stage. Returns kept indices."""
        take, last = feature_take_indices(len(self.layers), indices)
        shorter = last < len(self.layers) - 1
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.layers = self.layers[: last + 1]
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` (0: none), and another pooling if named."""
        if global_pool is not None:
            check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features, device=like.device, dtype=like.dtype
        )
        self.head_hidden_size = self.head.num_features

    # Training -----------------------------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Full names of tables, networks and frequencies of encodings, and of the factors of cosine attention."""
        found = {name for name, _ in self.named_parameters() if name.endswith(".logit_scale")}
        for owner, part in self.named_modules():
            if isinstance(part, PositionEncoding):
                found |= {f"{owner}.{name}" for name, _ in part.named_parameters()}
        return found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer-decay groups: stem, blocks stage by stage, the rest; an encoding is with its block, or its stage."""
        fine = [
            (r"^layers\.(\d+)\.(?:downsample|position)", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed|^position", blocks=r"^layers\.(\d+)" if coarse else fine)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Truncated normal 0.02 for linear maps with zero biases, as timm does; encodings draw their own.

        Norms after attention and MLP start at 0 (Swin V2), so that every block starts as the identity. With
        `needs_reset` every submodule draws its parameters anew first, as after a build on the meta device.
        """
        own = tuple(f"{name}." for name, part in self.named_modules() if isinstance(part, PositionEncoding))
        for name, module in self.named_modules():
            if name.startswith(own) or not name:
                continue
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for stage in self.layers:
            stage.start_as_identity()  # type: ignore[operator]


def check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise unknown("global_pool", global_pool, POOLS)


def per_stage(size: int | Size | Sequence[int | Size], stages: int, least: int = 1) -> list[Size]:
    """(h, w) for each stage, of a side, (h, w), or one of either for each stage; two numbers are (h, w)."""
    if isinstance(size, int) or (len(size) == 2 and all(isinstance(side, int) for side in size)):
        sizes = [pair(size)] * stages  # type: ignore[arg-type]
    else:
        sizes = [pair(one) for one in size]
    if len(sizes) != stages or any(side < least for one in sizes for side in one):
        raise ConfigError(
            f"windows are a side, (h, w), or one for each of {stages} stages, at least {least}; got {size}"
        )
    return sizes
