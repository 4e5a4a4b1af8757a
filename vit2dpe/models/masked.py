"""The base of masked image models: drawing masks, reconstructions as images, calls passed to the encoder.

Legend: B batch, C channels, N patches or units that are hidden one by one, K kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..encodings import encoding_parameters, named_encodings
from ..encodings.along import extent_of
from ..errors import ConfigError
from ..segments import nested
from .arguments import sides
from .swin.model import Swin
from .vit import ViT


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) in the scale of the input, and which pixels were hidden, (B, 1, H, W) boolean; or videos."""

    original: Tensor
    painted: Tensor  # the prediction everywhere
    pasted: Tensor  # the prediction where pixels were hidden, the original elsewhere
    hidden: Tensor


class MaskedModel(nn.Module):
    """Base class of `MAE` and `SimMIM`: an encoder, and a learned token in place of hidden units."""

    encoder: ViT | Swin
    mask_token: nn.Parameter
    norm_pix: bool
    masked = "(B, N)", "patch"  # the shape of a mask, and what one of its entries hides
    mask_ratio = 0.75  # by default

    def mask_grid(self, *size: int) -> tuple[int, ...]:
        """The units that are hidden one by one, along the axes of an image."""
        raise TypeError(f"{type(self).__name__} must define mask_grid")

    def choose(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Indices of the kept units, (B, K) in the order of their noise, and the mask (B, N), 0 kept, 1 hidden."""
        only_one_size(images)
        if images.is_nested:
            raise nested("give images of one size as a tensor (B, C, H, W)")
        batch, n = images.shape[0], math.prod(self.mask_grid(*images.shape[2:]))
        if noise is None:
            device = images.device if generator is None else generator.device
            noise = torch.rand(batch, n, generator=generator, device=device)
        if noise.shape != (batch, n):
            shape, one = self.masked
            raise ValueError(
                f"noise must be {shape} = {(batch, n)}, one value for each {one}, got {tuple(noise.shape)}"
            )
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        noise = noise.to(images.device)
        # ONNX lacks a stable sort, and its own puts the lower index first among equals.
        order = noise.sort(dim=1)[1] if torch.onnx.is_in_onnx_export() else noise.argsort(dim=1, stable=True)
        keep = order[:, : keep_count(n, ratio)]
        return keep, torch.ones(batch, n, device=images.device).scatter(1, keep, 0.0)

    def picture(self, prediction: Tensor, mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction of `forward` as images (B, C, H, W), and which pixels were hidden, (B, 1, H, W)."""
        raise TypeError(f"{type(self).__name__} must define picture")

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """The prediction as images.

        With `norm_pix` it is brought back with the mean and variance of the very patch that was hidden: such a picture
        contains more than the model predicts, and must be labelled so.
        """
        only_one_size(images)
        _, prediction, mask = self(images, self.mask_ratio if mask_ratio is None else mask_ratio, noise, generator)
        painted, hidden = self.picture(prediction.float(), mask, images)
        return Reconstruction(images, painted, torch.where(hidden, painted, images.float()), hidden)

    @property
    def train_grid(self) -> tuple[int, ...]:
        return self.encoder.train_grid

    def set_input_size(self, img_size: int | tuple[int, ...]) -> None:
        """Make another size the model's own: tables are resized for good, of a decoder too.

        Raises:
            ConfigError: for a size that patches or mask units do not fill; the model is then as it was.
        """
        self.mask_grid(*sides(img_size, len(self.train_grid)))
        self.encoder.set_input_size(img_size)
        for name, encoding in named_encodings(self).items():
            if not name.startswith("encoder."):
                encoding.set_grid(extent_of(encoding, self.train_grid))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Full names of tokens, tables and frequencies."""
        encoder = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return {"mask_token"} | encoding_parameters(self) | encoder


def only_one_size(images: Tensor) -> None:
    """Refuse what is no tensor (B, C, H, W), whatever its annotation promises."""
    if isinstance(images, list | tuple | dict):
        raise ConfigError(
            "images of different sizes in one batch are for ViT, and for MAE but its pictures: give one tensor "
            f"(B, C, H, W) here, got {type(images).__name__}"
        )


def keep_count(n: int, ratio: float) -> int:
    """How many of n patches are kept: the floor of n (1 - ratio), at least 1, at most n - 1."""
    if not 0 < ratio < 1:
        raise ConfigError(f"mask_ratio must be above 0 and below 1, got {ratio}")
    if n < 2:
        raise ConfigError("an image of one patch cannot be masked: use a smaller patch or a larger image")
    return min(max(math.floor(n * (1 - ratio) + 1e-6), 1), n - 1)  # 20 x (1 - 0.9) is 1.9999999999999996
