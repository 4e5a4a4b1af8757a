"""timm's interface of a Swin: sizes and windows, features, classifier, groups; the forward pass is in `model.py`.

Signatures are timm's (`timm/models/swin_transformer.py`), except that a window changes only by `window_policy` or
`window_size`.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import ClassifierHead
from torch import Tensor, nn

from ...attention.windows import Size
from ...encodings import PositionEncoding
from ...encodings.along import extent_of
from ...errors import ConfigError, unknown
from ..features import take_indices
from ..timm_api import Groups, ImageSize, TimmModel, pair
from .stage import SwinStage, WindowPositions

POOLS = ("avg", "max", "avgmax", "catavgmax", "")
PADDINGS = ("mask", "attend", "timm")
WindowSize = int | Size | Sequence[int | Size]


class TimmSwin(TimmModel):
    """timm's interface of a Swin: stages of blocks, windows, pooling by the head."""

    layers: nn.Sequential
    head: ClassifierHead

    def embed(self, images: Tensor) -> Tensor:
        """(B, H, W, D) at the input of the first stage."""
        raise TypeError(f"{type(self).__name__} must define embed")

    # Windows and sizes ------------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[SwinStage, ...]:
        """The stages of `layers`, typed; an nn.Sequential holds modules of any type."""
        return tuple(self.layers)  # type: ignore[arg-type]

    @property
    def window_policy(self) -> str:
        """The windows at another size: "keep" or "scale"."""
        return self.stages[0].window_policy

    @window_policy.setter
    def window_policy(self, policy: str) -> None:
        if policy not in ("keep", "scale"):
            raise unknown("window_policy", policy, ("keep", "scale"))
        if policy != self.stages[0].own_window_policy:
            self.record_arguments(window_policy=policy)
        for stage in self.stages:
            stage.own_window_policy = policy

    @property
    def padding(self) -> str:
        """What stands where windows do not fill the grid: see `Swin`."""
        return self.stages[0].padding

    @padding.setter
    def padding(self, padding: str) -> None:
        if padding not in PADDINGS:
            raise unknown("padding", padding, PADDINGS)
        for stage in self.stages:
            stage.padding = padding

    @property
    def window_sizes(self) -> tuple[Size, ...]:
        """(h, w) of each stage at the training size."""
        return tuple(stage.window for stage in self.stages)

    def position_groups(self) -> list[tuple[PositionEncoding, nn.Module, tuple[int, ...]]]:
        """For each part with places of its own: the encoding that leads it, where its encodings are, their extent.

        Token terms are defined on the grid, the others on the window of their stage.
        """
        stages = [(stage.position, stage, stage.trained_window) for stage in self.stages]
        return [(self.position, self.position, self.train_grid), *stages]

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The extent that an encoding of this model was trained on."""
        for _, part, extent in self.position_groups():
            if any(module is encoding for module in part.modules()):
                return extent_of(encoding, extent)
        raise ValueError(f"{type(encoding).__name__} is no encoding of this model")

    def set_input_size(
        self,
        img_size: ImageSize | None = None,
        patch_size: ImageSize | None = None,
        window_size: WindowSize | None = None,
        window_ratio: int | Sequence[int] | None = None,
    ) -> None:
        """Make another size the model's own: tables are resized for good, and policies measure from there.

        Parameters stay the objects that they are, see `ViT.set_input_size`.

        Args:
            img_size: pixels, H or (H, W); None keeps it.
            patch_size: another patch, P or (rows, columns): its kernel is resampled as `from_timm` does.
            window_size: windows, as in the constructor.
            window_ratio: windows as a fraction of the patch grid, one number or one for each stage. Without either,
                windows follow `window_policy` (timm scales them).
        """
        count = len(self.layers)
        size = self.patch_embed.img_size if img_size is None else pair(img_size)
        self.train_grid = grid = pair(self.change_patch(size, patch_size))
        self.patch_embed.img_size = size
        windows = None if window_size is None else per_stage(window_size, count)
        if windows is None and window_ratio is not None:
            ratios = [window_ratio] * count if isinstance(window_ratio, int) else list(window_ratio)
            windows = [(max(1, grid[0] // ratio), max(1, grid[1] // ratio)) for ratio in ratios]
        if any(stage.trained_window != stage.window for stage in self.stages):
            self.record_arguments(pretrained_window_sizes=0)  # from here on encodings are measured by the windows
        for i, stage in enumerate(self.stages):
            grid = grid if i == 0 else (-(-grid[0] // 2), -(-grid[1] // 2))
            stage.resize(grid, stage.window_at(grid) if windows is None else windows[i])
        self.resize_encodings()
        self.record_size(patch_size, self.window_sizes)
        self.measure_policy()

    # Features and head ------------------------------------------------------------------------------------------

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen stages beside the final features.

        Args:
            x: images (B, C, height, width).
            indices: the last n stages, a list of stages (negative from the end), or None for all.
            norm: put the final norm on the last stage's.
            stop_early: run no stage after the last chosen one; the final features are then that stage's.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: leave the final features out.

        Returns:
            (final features (B, H, W, D), [intermediates]), or the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NHWC"))
        count = len(self.layers)
        take, last = take_indices(count, indices)
        x = self.embed(x)
        outputs: list[Tensor] = []
        cache: WindowPositions = {}
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x, cache)
            if i in take:
                y = self.norm(x) if norm and i == count - 1 else x
                outputs.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return outputs
        return (x if stop_early and last < count - 1 else self.norm(x)), outputs

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last chosen one; norm and head go with the last stage. Returns kept indices."""
        take, last = take_indices(len(self.layers), indices)
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
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` (0: none), and another pooling if named.

        Its parameters are new, as in timm: an optimizer is made afterwards.
        """
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
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Groups:
        """Layer-decay groups: stem, blocks stage by stage, the rest; an encoding is with its block, or its stage."""
        if coarse:
            return dict(stem=r"^patch_embed|^position", blocks=r"^layers\.(\d+)")
        fine: list[tuple[str, tuple[int, ...] | None]] = [
            (r"^layers\.(\d+)\.(?:downsample|position)", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed|^position", blocks=fine)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As `TimmModel`'s; norms after attention and MLP start at 0 (Swin V2): a block starts as the identity."""
        super().init_weights(mode, needs_reset)
        for stage in self.stages:
            stage.start_as_identity()


def check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise unknown("global_pool", global_pool, POOLS)


def per_stage(size: WindowSize, stages: int, least: int = 1) -> list[Size]:
    """(h, w) for each stage, of a side, (h, w), or one of either for each stage; two numbers are (h, w)."""
    listed = [*size] if isinstance(size, Sequence) else [size, size]
    sides = [side for side in listed if isinstance(side, int)]
    sizes = [pair(sides)] * stages if len(sides) == len(listed) == 2 else [pair(one) for one in listed]
    if len(sizes) != stages or any(side < least for one in sizes for side in one):
        raise ConfigError(
            f"windows are a side, (h, w), or one for each of {stages} stages, at least {least}; got {size}"
        )
    return sizes
