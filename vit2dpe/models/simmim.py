"""SimMIM: hidden patches become one learned token, and one linear layer predicts their pixels. Windows stay whole.

    tokens     = mask token at hidden patches, the patch's own elsewhere
    prediction = pixels from W feature + b, each feature predicting its r x s pixels           (B, C, H, W)
    loss       = mean over hidden pixels of |prediction - image|

Source: Xie et al., arXiv 2111.09886. Since every token stays at its place it serves Swin, whose windows MAE would tear,
and a ViT alike, with every encoding that the model takes. How ours differs: rectangles, and a unit and a reduction that
need not be square.

Legend: B batch, C channels, N patches, U units, (u, v) unit rows and columns, (r, s) pixels a feature stands for.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions
from .arguments import check_arguments
from .masked import MaskedModel
from .swin.model import Swin
from .timm_api import pair
from .unwrap import unwrap_names
from .vit import ViT


class SimMIM(MaskedModel):
    """Masked image modelling around an encoder whose `forward_features` takes a `token_filter`: a ViT or a Swin.

    Args:
        encoder: without classifier (num_classes=0). It is not altered.
        mask_unit: pixels, side or (rows, columns), hidden together; a multiple of the patch. 32 at 192 pixels in the
            original; 4 to 8 suit images of 32.

    Raises:
        ConfigError: for an encoder with a classifier, or a unit that patches do not fill.
    """

    norm_pix = False
    masked = "(B, U)", "unit"
    mask_ratio = 0.6

    def __init__(self, encoder: ViT | Swin, *, mask_unit: int | tuple[int, int] = 32) -> None:
        check_arguments(locals())
        super().__init__()
        nn.Module.register_load_state_dict_pre_hook(self, unwrap_names)
        if encoder.num_classes > 0:
            raise ConfigError("a classifier gets no gradient here: build the encoder with num_classes=0")
        if len(encoder.train_grid) != 2:
            raise ConfigError(f"SimMIM is of images, and this encoder has {len(encoder.train_grid)} axes: use MAE")
        self.encoder, self.mask_unit = encoder, pair(mask_unit)
        p, q = encoder.patch_embed.patch_size
        if self.mask_unit[0] % p or self.mask_unit[1] % q or min(self.mask_unit) < 1:
            raise ConfigError(f"mask_unit must be a multiple of the patch {p}x{q}, got {self.mask_unit}")
        merged = 2 ** (getattr(encoder, "num_layers", 1) - 1)  # a Swin halves its grid before every later stage
        self.reduction = (p * merged, q * merged)
        like = encoder.patch_embed.proj.weight
        with torch.device(like.device):
            self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
            pixels = math.prod(self.reduction) * encoder.in_chans
            self.decoder = nn.Sequential(nn.Conv2d(encoder.num_features, pixels, kernel_size=1))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.to(dtype=like.dtype)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.6,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of predicting hidden units.

        Args:
            images: (B, C, H, W), H and W multiples of the unit.
            mask_ratio: the part of the units that is hidden, rounded up; at least one is kept and one hidden.
            noise: (B, U), the units with the smallest values are kept; default: uniform, from `generator`.
            generator: on any device.

        Returns:
            loss: a float32 scalar, over the hidden pixels.
            prediction: (B, C, H, W).
            mask: (B, U), 0 kept, 1 hidden.
        """
        _, mask = self.choose(images, mask_ratio, noise, generator)
        hidden = self.spread(mask, images, self.encoder.patch_embed.patch_size).flatten(1)[..., None]  # (B, N, 1)

        def mask_tokens(tokens: Tensor, at: Positions) -> tuple[Tensor, Positions]:
            return torch.where(hidden, self.mask_token.to(tokens.dtype), tokens), at

        prediction = self.paint(self.encoder.forward_features(images, token_filter=mask_tokens), images)  # (B, C, H, W)
        pixels = self.spread(mask, images, (1, 1))[:, None]  # (B, 1, H, W)
        error = (prediction.float() - images.float()).abs() * pixels
        return error.sum() / (pixels.sum() * images.shape[1]), prediction, mask

    def paint(self, features: Tensor, images: Tensor) -> Tensor:
        """The output of the encoder's `forward_features` -> (B, C, H, W)."""
        if features.ndim == 3:
            prefix, extent = self.encoder.num_prefix_tokens, self.encoder.patch_embed.grid(*images.shape[-2:])
            features = features[:, prefix:].unflatten(1, extent)
        r, s = self.reduction
        pixels = self.decoder(features.permute(0, 3, 1, 2))
        painted: Tensor = rearrange(pixels, "b (c r s) h w -> b c (h r) (w s)", r=r, s=s)
        return painted[..., : images.shape[-2], : images.shape[-1]]  # a grid of odd size was filled up in merging

    def mask_grid(self, *size: int) -> tuple[int, int]:
        """Mask units along both axes of an image."""
        (height, width), (u, v) = size, self.mask_unit
        if height % u or width % v:
            raise ConfigError(f"the image must be a multiple of the mask unit {u}x{v}, got {height}x{width}")
        return height // u, width // v

    def spread(self, mask: Tensor, images: Tensor, cell: tuple[int, ...]) -> Tensor:
        """(B, U) -> (B, H / rows, W / columns) boolean, for cells of so many pixels."""
        units = mask.bool().unflatten(1, self.mask_grid(*images.shape[-2:]))
        (u, v), (rows, columns) = self.mask_unit, cell
        pixels: Tensor = units.repeat_interleave(u // rows, 1).repeat_interleave(v // columns, 2)
        return pixels

    def picture(self, prediction: Tensor, mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return prediction, self.spread(mask, images, (1, 1))[:, None]

    def init_weights(self) -> None:
        """Draw the mask token; the encoder keeps its initialisation, as in the original."""
        nn.init.trunc_normal_(self.mask_token, std=0.02)
